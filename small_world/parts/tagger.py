"""The small RAM++: names the shapes that are in a picture."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPModel, PreTrainedTokenizerBase

from mgllava import RamPlusForImageTagging, RamPlusImageProcessor
from small_world.scenes import COLORS, SHAPES, TEXTURES

from .architecture import TAG_THRESHOLD, TAGGER_IMAGE_SIZE, tagger_config
from .objectives import CellContents, count_right
from .towers import Normalize, start_evenly


def descriptions(tag: str) -> list[str]:
    """Describe a tag in several ways, as a language model does for the original (section 3.2 of arXiv 2310.15200)."""
    return [f"a {kind} {tag}" for kind in (*COLORS, *TEXTURES[1:])]


class TaggerTraining(nn.Module):
    """Learns the tags of pictures, and what is in the cells of the last stage, which makes that quick.

    Args:
        clip (`Path`): The small CLIP, whose text model embeds the descriptions.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
    """

    def __init__(self, clip: Path, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        texts = [descriptions(tag) for tag in SHAPES]
        self.model = RamPlusForImageTagging(tagger_config(len(texts[0])))
        start_evenly(self.model)
        self.model.decoder.label_embed.data.copy_(_embed(texts, CLIPModel.from_pretrained(clip), tokenizer))
        config = self.model.config
        grid = config.image_size // 32
        self.cell_contents = CellContents(config.projection_dim, grid, config.image_size)
        self.normalize = Normalize(RamPlusImageProcessor.image_mean, RamPlusImageProcessor.image_std)

    def forward(self, pixel_values: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of `Pictures`."""
        outputs = self.model(self.normalize(pixel_values))
        shapes = attributes[..., 0]
        wanted = F.one_hot(shapes.clamp(min=0), len(SHAPES)).mul((shapes >= 0).unsqueeze(-1)).amax(1).float()
        loss = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="sum") / len(wanted)
        cell_loss, _ = self.cell_contents(outputs.image_embeds[:, 1:], boxes, attributes)
        tagged = outputs.logits.sigmoid() > TAG_THRESHOLD
        counts = {
            "recall": count_right(tagged & (wanted > 0), wanted > 0),
            "precision": count_right(tagged & (wanted > 0), tagged),
        }
        return {"loss": loss + cell_loss, "counts": counts}

    def save(self, folder: Path) -> None:
        """Write model and image processor as transformers writes them."""
        self.model.save_pretrained(folder)
        size = {"height": TAGGER_IMAGE_SIZE, "width": TAGGER_IMAGE_SIZE}
        RamPlusImageProcessor(size=size).save_pretrained(folder)


@torch.no_grad()
def _embed(texts: list[list[str]], clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Embed descriptions: shape `(num_tags, num_descriptions, projection_dim)`, of length 1 each."""
    flat = [text + tokenizer.eos_token for row in texts for text in row]
    encoded = tokenizer(flat, padding=True, return_tensors="pt")
    pooled = clip.text_model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1).unflatten(0, (len(texts), -1))


__all__ = ["TaggerTraining", "descriptions"]
