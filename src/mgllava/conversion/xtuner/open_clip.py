"""The high-resolution tower: the ConvNeXt trunk of an open_clip repository."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgllava.conversion.parts import Rules, Source, sort_tensors
from mgllava.model_files.errors import ConversionError, UnreadableSourceError
from mgllava.model_files.json_files import read_json
from mgllava.model_files.sources import fetch
from mgllava.model_files.tensor_files import open_safetensors, tensors_of
from mgllava.model_files.torch_files import open_torch_file

# Prefix of its weights in the model.
HIGH_RES_TOWER = "model.high_res_vision_tower."
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

OPEN_CLIP_TO_MODEL: Rules = (
    ("visual.trunk.stem.", "model.high_res_vision_tower.stem."),
    ("visual.trunk.stages.", "model.high_res_vision_tower.stages."),
)

OPEN_CLIP_DROPS: Rules = (
    (r"visual\.trunk\.(head|norm_pre|norm)\.|visual\.head\.", "head of the ConvNeXt"),
    (
        r"(text\.)?(transformer|token_embedding|ln_final)\.|(text\.)?(positional_embedding|text_projection)$",
        "text tower of open_clip",
    ),
    (r"text\.|attn_mask$", "text tower of open_clip"),
    (r"logit_(scale|bias)$", "contrastive head of open_clip"),
)


@dataclass
class HighResTower:
    """The ConvNeXt of an open_clip repository.

    Attributes:
        architecture: Its name in timm.
        depths: Blocks in each stage, as counted in the weights.
        hidden_sizes: Channels of each stage, as found in the weights.
        source: Its tensors.
    """

    architecture: str
    depths: list[int]
    hidden_sizes: list[int]
    source: Source


def open_high_res_tower(name: str | Path, **location: Any) -> HighResTower:
    """Open the ConvNeXt trunk of an open_clip model.

    `name` is a folder, a Hub id (with or without `hf-hub:`), or a name that open_clip resolves: `architecture` or
    `architecture:tag`. `location` holds arguments of `huggingface_hub.snapshot_download`.
    """
    folder = _open_clip_folder(name, location)
    config_path = folder / _OPEN_CLIP_CONFIG
    if not config_path.is_file():
        raise UnreadableSourceError(
            f"`high_res_tower`: {name} has no {_OPEN_CLIP_CONFIG}, so it is not an open_clip repository."
        )
    architecture: Any = read_json(config_path, "high_res_tower")
    for key in ("model_cfg", "vision_cfg", "timm_model_name"):
        architecture = architecture.get(key, "") if isinstance(architecture, dict) else ""
    if not isinstance(architecture, str) or not architecture.startswith("convnext"):
        raise ConversionError(
            f"`high_res_tower` must have a ConvNeXt of timm as its trunk, but {config_path} names {architecture!r}."
        )
    path = next((folder / file for file in _OPEN_CLIP_WEIGHTS if (folder / file).is_file()), None)
    if path is None:
        raise ConversionError(f"`high_res_tower`: {folder} has neither {' nor '.join(_OPEN_CLIP_WEIGHTS)}.")
    if path.suffix == ".safetensors":
        tensors = open_safetensors(path)
    else:
        content = open_torch_file(path)
        tensors = tensors_of(content.get("state_dict", content) if isinstance(content, dict) else content, path)
    source = sort_tensors(tensors, OPEN_CLIP_TO_MODEL, OPEN_CLIP_DROPS, [path])
    # In a damaged file a kernel may be a scalar, or a block may have an absurd number.
    shapes = {key.removeprefix(HIGH_RES_TOWER): tensor.shape for key, tensor in source.tensors.items() if tensor.shape}
    depths, hidden_sizes = _trunk_sizes(shapes)
    if stages := [stage for stage, depth in enumerate(depths) if depth == 0]:
        raise ConversionError(f"`high_res_tower`: {path} has no blocks of visual.trunk.stages.{stages[0]}.")
    if sum(depths) > len(shapes):
        raise ConversionError(f"`high_res_tower`: {path} names {sum(depths)} blocks, and has {len(shapes)} tensors.")
    return HighResTower(architecture, depths, hidden_sizes, source)


def _trunk_sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the blocks and the channels of each stage of a ConvNeXt, from timm's names; 0 for a missing stage."""
    depths, widths = [0] * 4, [0] * 4
    for name, shape in shapes.items():
        if match := re.fullmatch(r"stages\.([0-3])\.blocks\.(\d+)\.conv_dw\.weight", name):
            stage = int(match[1])
            depths[stage], widths[stage] = max(depths[stage], int(match[2]) + 1), shape[0]
    return depths, widths


def _open_clip_folder(name: str | Path, location: dict[str, Any]) -> Path:
    text = str(name).removeprefix("local-dir:").removeprefix("hf-hub:")
    if not Path(text).is_dir() and "/" not in text:
        text = _resolve_open_clip_name(text)
    folder = fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[0]], **location)
    if Path(text).is_dir() or (folder / _OPEN_CLIP_WEIGHTS[0]).is_file():
        return folder
    return fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[1]], **location)


def _resolve_open_clip_name(name: str) -> str:
    import open_clip

    architecture, _, tag = name.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        raise ConversionError(
            f"`high_res_tower` must be a folder, a Hub id or a model name of open_clip, but {name} is none of these."
        )
    if tag not in tags:
        raise ConversionError(
            f"`high_res_tower`: say which weights of {architecture} are meant: "
            f"{' or '.join(f'{architecture}:{one}' for one in tags)}; got {name}."
        )
    repository = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    if not repository:
        raise ConversionError(f"`high_res_tower`: the weights of {name} are not on the Hub; give a folder.")
    return "/".join(repository.split("/")[:2])


__all__ = ["HIGH_RES_TOWER", "OPEN_CLIP_DROPS", "OPEN_CLIP_TO_MODEL", "HighResTower", "open_high_res_tower"]
