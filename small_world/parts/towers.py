"""Train the two vision towers, and save them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mgllava.modeling import MGLlavaHighResVisionConfig
from mgllava.modeling.vision_mgllava import POOLED_SIZE, MGLlavaHighResVisionModel, pool_boxes

from .architecture import (
    HIGH_RES_ARCHITECTURE,
    HIGH_RES_DEPTHS,
    HIGH_RES_HIDDEN_SIZES,
    IMAGE_SIZE,
    LOW_RES_IMAGE_SIZE,
    clip_config,
)
from .objectives import BoxAttributes, CellContents, CellPlace, CenterAttributes, count_right


class Normalize(nn.Module):
    """Normalizes 8-bit pixels by mean and standard deviation of pixels between 0 and 1."""

    def __init__(self, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalize `(num_images, 3, height, width)`."""
        return (pixels - self.mean) / self.std


def initialize_by_fan_in(model: nn.Module) -> None:
    """Initialize weights with the standard deviation 1 / sqrt(fan_in); the usual 0.02 suits wider networks."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


class HighResTowerTraining(nn.Module):
    """Trains the ConvNeXt to predict attributes from boxes, pooled as in the model, and from cells of the last map.

    The mean over a box contains little about the character in its center, so attributes are also predicted from the
    centers of objects on every map but the first. Without that, the tower does not learn to read.
    """

    def __init__(self):
        super().__init__()
        config = MGLlavaHighResVisionConfig(
            architecture=HIGH_RES_ARCHITECTURE,
            depths=HIGH_RES_DEPTHS,
            hidden_sizes=HIGH_RES_HIDDEN_SIZES,
            image_size=IMAGE_SIZE,
        )
        self.normalize = Normalize()
        self.tower = MGLlavaHighResVisionModel(config)
        initialize_by_fan_in(self.tower)
        for name, parameter in self.tower.named_parameters():
            if name.endswith("gamma"):  # the scale of a block, which is 1e-6 in timm
                nn.init.ones_(parameter)
        self.box_attributes = BoxAttributes(sum(HIGH_RES_HIDDEN_SIZES))
        self.center_attributes = CenterAttributes(HIGH_RES_HIDDEN_SIZES[1:], IMAGE_SIZE)
        self.cell_contents = CellContents(HIGH_RES_HIDDEN_SIZES[-1], IMAGE_SIZE // 32, IMAGE_SIZE)

    def forward(self, pixel_values: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of `Pictures`."""
        # All maps get the memory format of the pixels, in which a CPU runs depthwise convolutions three times as fast.
        pixels = self.normalize(pixel_values).contiguous(memory_format=torch.channels_last)
        maps = self.tower(pixels).feature_maps
        pooled = torch.cat(pool_boxes(maps, boxes, IMAGE_SIZE, POOLED_SIZE["pyramid"]), -1)
        loss, counts = self.box_attributes(pooled, attributes)
        tokens = maps[-1].flatten(2).transpose(1, 2)
        cell_loss, counts["reading from the grid"] = self.cell_contents(tokens, boxes, attributes)
        center_loss, _ = self.center_attributes(maps[1:], boxes, attributes)
        return {"loss": loss + cell_loss + center_loss, "counts": counts}

    def save(self, folder: Path) -> None:
        """Save the tower in open_clip's format."""
        save_high_res_tower(self.tower, folder)


def save_high_res_tower(tower: MGLlavaHighResVisionModel, folder: Path) -> None:
    """Save a high-resolution tower in open_clip's format, which the converter reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"visual.trunk.{name}": value.contiguous() for name, value in tower.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = tower.config
    vision = {
        "timm_model_name": config.architecture,
        "timm_model_kwargs": {"depths": list(config.depths), "dims": list(config.hidden_sizes)},
        "image_size": config.image_size,
    }
    described = {
        "model_cfg": {"embed_dim": config.hidden_sizes[-1], "vision_cfg": vision, "text_cfg": {}},
        "preprocess_cfg": {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


class VisionTowerTraining(nn.Module):
    """Trains CLIP to match pictures and captions, and to predict the contents and the place of each cell of its grid.

    The grid is taken from the last but one layer, as in the model. Without the places as targets, that layer loses
    them (a linear probe is wrong by 1.8 cells), and answers such as "left" cannot be learned later.
    """

    def __init__(self):
        super().__init__()
        self.normalize = Normalize()
        self.clip = CLIPModel(clip_config())
        vision = self.clip.config.vision_config
        grid = vision.image_size // vision.patch_size
        self.cell_contents = CellContents(vision.hidden_size, grid, IMAGE_SIZE)
        self.place = CellPlace(vision.hidden_size, grid)

    def forward(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor,
        attributes: torch.Tensor,
        caption_ids: torch.Tensor,
        caption_mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Compute the loss of a batch of `Pictures` with their captions as ids."""
        # Resized like the low-resolution image in the model.
        size = (LOW_RES_IMAGE_SIZE, LOW_RES_IMAGE_SIZE)
        pixels = F.interpolate(self.normalize(pixel_values), size=size, mode="bilinear", align_corners=False)
        outputs = self.clip(
            input_ids=caption_ids,
            attention_mask=caption_mask,
            pixel_values=pixels,
            return_loss=True,
            output_hidden_states=True,
        )
        tokens = outputs.vision_model_output.hidden_states[-2][:, 1:]
        cell_loss, reading = self.cell_contents(tokens, boxes, attributes)
        place_loss, placed = self.place(tokens)
        own = torch.arange(len(pixels), device=pixels.device)
        matched = outputs.logits_per_image.argmax(-1) == own
        counts = {
            "matching captions": count_right(matched, torch.ones_like(matched)),
            "reading from the grid": reading,
            "places of cells": placed,
        }
        return {"loss": outputs.loss + cell_loss + place_loss, "counts": counts}

    def save(self, folder: Path) -> None:
        """Save CLIP as transformers does."""
        self.clip.save_pretrained(folder)


__all__ = ["HighResTowerTraining", "Normalize", "VisionTowerTraining", "initialize_by_fan_in", "save_high_res_tower"]
