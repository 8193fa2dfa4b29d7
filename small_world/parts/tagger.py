"""Train the small RAM++, which names the shapes in a picture."""

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
from .towers import Normalize, initialize_by_fan_in


def descriptions(tag: str) -> list[str]:
    """Return several descriptions of a tag; the original's are by a language model (section 3.2, arXiv 2310.15200)."""
    return [f"a {kind} {tag}" for kind in (*COLORS, *TEXTURES[1:])]


class TaggerTraining(nn.Module):
    """Trains RAM++ to predict the tags of pictures; predicting attributes from every stage as well speeds that up.

    The small language model embeds the descriptions of tags. The text model of the small CLIP is not used, because its
    embeddings of the shapes differ by only a thousandth.
    """

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        texts = [descriptions(tag) for tag in SHAPES]
        self.model = RamPlusForImageTagging(tagger_config(len(texts[0])))
        initialize_by_fan_in(self.model)
        # Descriptions have length 1. This enlarges the tags, which would be small next to what they attend to.
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
        """Save model and image processor as transformers does."""
        self.model.save_pretrained(folder)
        size = {"height": TAGGER_IMAGE_SIZE, "width": TAGGER_IMAGE_SIZE}
        RamPlusImageProcessor(size=size).save_pretrained(folder)


@torch.no_grad()
def _embed(
    texts: list[list[str]], language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Return normalized embeddings of descriptions, of shape `(num_tags, num_descriptions, hidden_size)`."""
    flat = [text for row in texts for text in row]
    encoded = tokenizer(flat, padding=True, padding_side="left", return_tensors="pt")
    last = language_model.base_model(**encoded).last_hidden_state[:, -1]
    return F.normalize(last, dim=-1).unflatten(0, (len(texts), -1))


__all__ = ["TaggerTraining", "descriptions"]
