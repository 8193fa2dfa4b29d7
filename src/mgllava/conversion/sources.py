"""The repositories that a checkpoint is completed from: language model, CLIP and open_clip, folders or Hub ids."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from mgllava.modeling.high_res_vision_mgllava import trunk_sizes

from .errors import ConversionError
from .key_mapping import CLIP_DROPS, CLIP_TO_MODEL, OPEN_CLIP_DROPS, OPEN_CLIP_TO_MODEL, drop_reason, rename
from .tensor_files import LazyTensor, open_safetensors, open_weights, tensors_of
from .torch_files import open_torch_file

_CONFIG_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
_SAFETENSORS_FILES = ["model*.safetensors"]
_PICKLED_FILES = ["pytorch_model*.bin"]
_TOWER = "model.high_res_vision_tower."
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass
class Source:
    """Tensors of one repository under the model's names.

    Args:
        tensors (`dict[str, LazyTensor]`): Tensors by the model's names.
        dropped (`dict[str, str]`): Names in the repository that have no use, and why.
        unexpected (`list[str]`): Names in the repository that no rule covers.
        files (`list[Path]`): The files read.
    """

    tensors: dict[str, LazyTensor]
    dropped: dict[str, str]
    unexpected: list[str]
    files: list[Path]


def fetch(name: str | Path, argument: str, patterns: list[str], revision: str | None = None) -> Path:
    """Find a repository on disk, or download parts of it from the Hub.

    Args:
        name (`str` or `Path`): A folder or a Hub id.
        argument (`str`): The user's argument, for the error.
        patterns (`list[str]`): Files to download.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        `Path`: The folder.

    Raises:
        ConversionError: If there is no such folder and no such repository.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise ConversionError(f"`{argument}` must be a folder or a Hub id (owner/name), but {name} is neither.")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"`{argument}`: {name} is no folder here, and it cannot be fetched from the Hub ({error})."
        ) from error


def _fetch_weights(name: str | Path, argument: str) -> Path:
    folder = fetch(name, argument, _CONFIG_FILES + _SAFETENSORS_FILES)
    if Path(name).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return fetch(name, argument, _CONFIG_FILES + _PICKLED_FILES)


def _read_config(folder: Path, name: str | Path, argument: str) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConversionError(f"`{argument}`: {name} has no config.json, so it is no transformers repository.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise ConversionError(f"`{argument}`: config.json of {name} cannot be read ({error}).") from error
    return config


def language_model_config(name: str | Path) -> tuple[PreTrainedConfig, Path]:
    """Read the config of a language model.

    Args:
        name (`str` or `Path`): Its folder or Hub id.

    Returns:
        `tuple[PreTrainedConfig, Path]`: The config, and the folder with config and tokenizer.

    Raises:
        ConversionError: If it is not found or no language model.
    """
    folder = fetch(name, "llm", _CONFIG_FILES)
    config = _read_config(folder, name, "llm")
    if not hasattr(config, "vocab_size") or not hasattr(config, "hidden_size"):
        raise ConversionError(f"`llm`: {name} has model type {config.model_type!r}, which is no language model.")
    return config, folder


def language_model_weights(name: str | Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Open the weights of a language model, under the names that they have in XTuner checkpoints.

    Args:
        name (`str` or `Path`): Its folder or Hub id.

    Returns:
        `tuple[dict[str, LazyTensor], list[Path]]`: The tensors, and the files they come from.
    """
    tensors, files = open_weights(_fetch_weights(name, "llm"))
    return {f"llm.{key}": tensor for key, tensor in tensors.items()}, files


def clip_config(name: str | Path) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Read the config of a CLIP vision tower.

    Args:
        name (`str` or `Path`): Folder or Hub id of a CLIP model or of its vision tower.

    Returns:
        `tuple[PreTrainedConfig, dict[str, Any]]`: The vision tower's config, and the image processor's, if any.

    Raises:
        ConversionError: If it is not found or no CLIP.
    """
    folder = fetch(name, "vision_tower", _CONFIG_FILES)
    config = _read_config(folder, name, "vision_tower")
    if config.model_type == "clip":
        config = config.vision_config
    if config.model_type != "clip_vision_model":
        raise ConversionError(f"`vision_tower` must be a CLIP, but {name} has model type {config.model_type!r}.")
    preprocessor = folder / "preprocessor_config.json"
    return config, json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor.is_file() else {}


def clip_weights(name: str | Path) -> Source:
    """Open the weights of a CLIP vision tower.

    Args:
        name (`str` or `Path`): Folder or Hub id of a CLIP model or of its vision tower.

    Returns:
        `Source`: Its tensors.
    """
    tensors, files = open_weights(_fetch_weights(name, "vision_tower"))
    return _sort_out(tensors, CLIP_TO_MODEL, CLIP_DROPS, files)


@dataclass
class HighResTower:
    """The ConvNeXt of an open_clip repository.

    Args:
        architecture (`str`): Its name in timm.
        depths (`list[int]`): Blocks in each stage, as counted in the weights.
        hidden_sizes (`list[int]`): Channels of each stage, as found in the weights.
        source (`Source`): Its tensors.
    """

    architecture: str
    depths: list[int]
    hidden_sizes: list[int]
    source: Source


def open_high_res_tower(name: str | Path) -> HighResTower:
    """Open the ConvNeXt trunk of an open_clip model.

    Args:
        name (`str` or `Path`): A folder, a Hub id (with or without `hf-hub:`), or a name that open_clip resolves:
            `architecture` or `architecture:tag`, for example `convnext_large_d_320:laion2b_s29b_b131k_ft_soup`.

    Returns:
        `HighResTower`: The trunk.

    Raises:
        ConversionError: If it is not found or its trunk is no ConvNeXt.
    """
    folder = _open_clip_folder(name)
    config_path = folder / _OPEN_CLIP_CONFIG
    if not config_path.is_file():
        raise ConversionError(
            f"`high_res_tower`: {name} has no {_OPEN_CLIP_CONFIG}, so it is no open_clip repository."
        )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    architecture = config.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "")
    if not architecture.startswith("convnext"):
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
    source = _sort_out(tensors, OPEN_CLIP_TO_MODEL, OPEN_CLIP_DROPS, [path])
    shapes = {key.removeprefix(_TOWER): tensor.shape for key, tensor in source.tensors.items()}
    depths, hidden_sizes = trunk_sizes(shapes)
    if stages := [stage for stage, depth in enumerate(depths) if depth == 0]:
        raise ConversionError(f"`high_res_tower`: {path} has no blocks of visual.trunk.stages.{stages[0]}.")
    return HighResTower(architecture, depths, hidden_sizes, source)


def _open_clip_folder(name: str | Path) -> Path:
    text = str(name).removeprefix("local-dir:").removeprefix("hf-hub:")
    if not Path(text).is_dir() and "/" not in text:
        text = _resolve_open_clip_name(text)
    folder = fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[0]])
    if Path(text).is_dir() or (folder / _OPEN_CLIP_WEIGHTS[0]).is_file():
        return folder
    return fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[1]])


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


def _sort_out(
    tensors: dict[str, LazyTensor],
    rules: tuple[tuple[str, str], ...],
    drops: tuple[tuple[str, str], ...],
    files: list[Path],
) -> Source:
    source = Source({}, {}, [], files)
    for name, tensor in tensors.items():
        if (new_name := rename(name, rules)) is not None:
            source.tensors[new_name] = tensor
        elif (reason := drop_reason(name, drops)) is not None:
            source.dropped[name] = reason
        else:
            source.unexpected.append(name)
    return source


__all__ = [
    "HighResTower",
    "Source",
    "clip_config",
    "clip_weights",
    "fetch",
    "language_model_config",
    "language_model_weights",
    "open_high_res_tower",
]
