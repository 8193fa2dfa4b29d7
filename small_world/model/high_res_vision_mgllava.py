"""The high-resolution tower: a timm ConvNeXt without its head (MG-LLaVA, arXiv 2406.17770, section 3.1)."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXtBlock
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput

from .configuration_mgllava import MGLlavaHighResVisionConfig

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TRUNK = "visual.trunk."


class MGLlavaHighResVisionModel(PreTrainedModel):
    """Stem and four stages of a ConvNeXt; parameter names are timm's own."""

    config: MGLlavaHighResVisionConfig
    config_class = MGLlavaHighResVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ConvNeXtStage"]
    # It has no attention, so it must not be what refuses an implementation for the whole model.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MGLlavaHighResVisionConfig):
        super().__init__(config)
        trunk = timm.create_model(
            config.architecture,
            pretrained=False,
            num_classes=0,
            depths=tuple(config.depths),
            dims=tuple(config.hidden_sizes),
        )
        self.stem = trunk.stem
        self.stages = trunk.stages
        self.post_init()

    @classmethod
    def from_open_clip(
        cls, name: str | os.PathLike, image_size: int = 768, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "MGLlavaHighResVisionModel":
        """Take the image trunk of an open_clip repository.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub id with `open_clip_config.json` and weights.
            image_size (`int`, *optional*, defaults to 768): Side of the square input, in pixels.
            dtype (`torch.dtype`, *optional*): Of the weights; by default as they are stored.
            **kwargs: Arguments of `huggingface_hub.snapshot_download`, such as `revision` and `local_files_only`.

        Returns:
            `MGLlavaHighResVisionModel`: The tower, in evaluation mode.

        Raises:
            ValueError: If the repository holds no ConvNeXt of timm, or not all of it.
            OSError: If it cannot be read.
        """
        folder = Path(name)
        if not folder.is_dir():
            config_and_safetensors = [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[0]]
            folder = Path(snapshot_download(str(name), allow_patterns=config_and_safetensors, **kwargs))
            if not (folder / _OPEN_CLIP_WEIGHTS[0]).is_file():
                folder = Path(snapshot_download(str(name), allow_patterns=_OPEN_CLIP_WEIGHTS[1], **kwargs))
        config_path = folder / _OPEN_CLIP_CONFIG
        open_clip_config = json.loads(config_path.read_text(encoding="utf-8"))
        architecture = open_clip_config.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "")
        if not architecture.startswith("convnext"):
            raise ValueError(
                f"`name` must be an open_clip repository whose image trunk is a ConvNeXt of timm, but {config_path} "
                f"names {architecture!r}."
            )
        path = next((folder / file for file in _OPEN_CLIP_WEIGHTS if (folder / file).is_file()), None)
        if path is None:
            raise ValueError(f"`name`: {folder} has neither {' nor '.join(_OPEN_CLIP_WEIGHTS)}.")
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = weights.get("state_dict", weights)
        parts = (f"{_TRUNK}stem.", f"{_TRUNK}stages.")
        trunk = {key.removeprefix(_TRUNK): tensor for key, tensor in weights.items() if key.startswith(parts)}
        depths, hidden_sizes = trunk_sizes({key: tensor.shape for key, tensor in trunk.items()})
        config = MGLlavaHighResVisionConfig(
            architecture=architecture, depths=depths, hidden_sizes=hidden_sizes, image_size=image_size
        )
        with torch.device("meta"):
            model = cls(config)
        # Strict: a tower that is half there would train as if it were whole.
        model.load_state_dict(trunk, assign=True)
        return model.requires_grad_(True).to(dtype).eval()

    def _init_weights(self, module: torch.nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            init.constant_(module.gamma, 1e-6)

    def forward(self, pixel_values: torch.Tensor) -> BackboneOutput:
        """Compute the maps of all four stages.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`):
                Normalised high-resolution images.

        Returns:
            `BackboneOutput` whose `feature_maps` are four tensors of shape
            `(num_images, hidden_sizes[i], height / 2**(i + 2), width / 2**(i + 2))`.
        """
        hidden_states = self.stem(pixel_values.to(self.dtype))
        feature_maps = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            feature_maps.append(hidden_states)
        return BackboneOutput(feature_maps=tuple(feature_maps))


def trunk_sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Read the sizes of a ConvNeXt from the shapes of its weights.

    Args:
        shapes (`Mapping[str, Sequence[int]]`): Shapes by timm's names.

    Returns:
        `tuple[list[int], list[int]]`: Number of blocks, and number of channels, of each stage; 0 where it is missing.
    """
    depths, widths = [0] * 4, [0] * 4
    for name, shape in shapes.items():
        if match := re.fullmatch(r"stages\.([0-3])\.blocks\.(\d+)\.conv_dw\.weight", name):
            stage = int(match[1])
            depths[stage], widths[stage] = max(depths[stage], int(match[2]) + 1), shape[0]
    return depths, widths


__all__ = ["MGLlavaHighResVisionModel", "trunk_sizes"]
