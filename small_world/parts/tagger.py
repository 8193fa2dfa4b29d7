"""The small RAM++: names the shapes that are in a picture."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgllava import RamPlusForImageTagging, RamPlusImageProcessor
from small_world.scenes import COLORS, SHAPES, TEXTURES

from .architecture import TAG_THRESHOLD, TAGGER_IMAGE_SIZE, tagger_config
from .objectives import CenterAttributes, count_right
from .towers import Normalize, start_evenly


def descriptions(tag: str) -> list[str]:
    """Describe a tag in several ways, as a language model does for the original (section 3.2 of arXiv 2310.15200)."""
    return [f"a {kind} {tag}" for kind in (*COLORS, *TEXTURES[1:])]


class TaggerTraining(nn.Module):
    """Learns the tags of pictures. The attributes of objects, read at their centers off every stage, make that quick.

    Args:
        language_model (`PreTrainedModel`): The small language model, which embeds the descriptions. The small CLIP
            cannot: to its text model all shapes are the same but for a thousandth.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
    """

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        texts = [descriptions(tag) for tag in SHAPES]
        self.model = RamPlusForImageTagging(tagger_config(len(texts[0])))
        start_evenly(self.model)
        # Embeddings have length 1. Were tags not made larger, what they attend to would drown them.
        nn.init.normal_(self.model.decoder.word_projection.weight)
        self.model.decoder.label_embed.data.copy_(_embed(texts, language_model, tokenizer))
        config = self.model.config
        widths = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        self.center_attributes = CenterAttributes(widths, config.image_size)
        self.normalize = Normalize(RamPlusImageProcessor.image_mean, RamPlusImageProcessor.image_std)

    def forward(self, pixel_values: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of `Pictures`."""
        outputs = self.model(self.normalize(pixel_values), output_hidden_states=True)
        shapes = attributes[..., 0]
        wanted = F.one_hot(shapes.clamp(min=0), len(SHAPES)).mul((shapes >= 0).unsqueeze(-1)).amax(1).float()
        loss = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="sum") / len(wanted)
        stages = (stage.permute(0, 3, 1, 2) for stage in outputs.vision_hidden_states[1:])
        center_loss, center_counts = self.center_attributes(stages, boxes, attributes)
        tagged = outputs.logits.sigmoid() > TAG_THRESHOLD
        counts = {
            "recall": count_right(tagged & (wanted > 0), wanted > 0),
            "precision": count_right(tagged & (wanted > 0), tagged),
            "right shapes": center_counts["shape"],
        }
        return {"loss": loss + center_loss, "counts": counts}

    def save(self, folder: Path) -> None:
        """Write model and image processor as transformers writes them."""
        self.model.save_pretrained(folder)
        size = {"height": TAGGER_IMAGE_SIZE, "width": TAGGER_IMAGE_SIZE}
        RamPlusImageProcessor(size=size).save_pretrained(folder)


@torch.no_grad()
def _embed(
    texts: list[list[str]], language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Embed descriptions: shape `(num_tags, num_descriptions, hidden_size)`, of length 1 each."""
    flat = [text for row in texts for text in row]
    encoded = tokenizer(flat, padding=True, padding_side="left", return_tensors="pt")
    last = language_model.base_model(**encoded).last_hidden_state[:, -1]
    return F.normalize(last, dim=-1).unflatten(0, (len(texts), -1))


__all__ = ["TaggerTraining", "descriptions"]
