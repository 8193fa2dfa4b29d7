"""Find or download model folders, and read their configurations."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from .errors import ConversionError, UnreadableSourceError, one_line
from .json_files import read_json

_CONFIG_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]

# In front of a Hub id that is never a folder, whatever lies here.
HUB_PREFIX = "hf://"


def fetch(name: str | Path, argument: str, patterns: list[str], revision: str | None = None, **location: Any) -> Path:
    """Return a folder on disk, or download the files of a Hub repository (`owner/name`) that match the patterns.

    `location` holds further arguments of `huggingface_hub.snapshot_download`, such as `cache_dir` and `token`.
    """
    hub_id = str(name).removeprefix(HUB_PREFIX)
    if hub_id == str(name) and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) or hub_id.startswith("."):
        raise UnreadableSourceError(f"`{argument}` must be a folder or a Hub id (owner/name), but {name} is neither.")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, **location))
    except Exception as error:  # the errors of the HTTP library differ between versions of huggingface_hub
        raise UnreadableSourceError(
            f"`{argument}`: {name} is not a folder here, and it cannot be fetched from the Hub ({one_line(error)})."
        ) from error


def refuse_revision_of_folder(model: str | Path, revision: str | None) -> None:
    """Raise if a revision is given for a model that is a folder."""
    if revision is not None and Path(model).is_dir():
        raise ConversionError(f"`revision` is for models on the Hub, but {model} is a folder.")


def fetch_weights(
    name: str | Path, argument: str, texts: list[str] = _CONFIG_FILES, revision: str | None = None
) -> Path:
    """Find or download a model folder with its weights; pickled weights only if it has no safetensors."""
    folder = fetch(name, argument, [*texts, "model*.safetensors"], revision)
    if Path(name).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return fetch(name, argument, [*texts, "pytorch_model*.bin"], revision)


def _read_config(folder: Path, name: str | Path, argument: str) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConversionError(f"`{argument}`: {name} has no config.json, so it is not a model folder of transformers.")
    read_json(folder / "config.json", argument)
    try:
        # By default, transformers would ask on the terminal.
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config may be wrong in many ways
        reason = one_line(error.__cause__ or error)
        raise ConversionError(f"`{argument}`: config.json of {name} cannot be read ({reason}).") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"`{argument}`: {name} is quantized. Pass the model that it was quantized from.")
    return config


def check_sizes(config: PreTrainedConfig, names: tuple[str, ...], name: str | Path, argument: str) -> None:
    """Check the sizes that a model is built from: building one with absurd sizes would take forever."""
    for size in names:
        value = getattr(config, size, None)
        most = _MAX_LAYERS if size == "num_hidden_layers" else _MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            raise ConversionError(
                f"`{argument}`: `{size}` in config.json of {name} must be a number from 1 to {most}, got {value!r}."
            )


_MAX_LAYERS = 10_000
_MAX_SIZE = 1 << 30


def language_model_config(name: str | Path) -> tuple[PreTrainedConfig, Path]:
    """Return the config of a language model, and the folder with its config and tokenizer."""
    folder = fetch(name, "llm", _CONFIG_FILES)
    config = _read_config(folder, name, "llm")
    if not hasattr(config, "vocab_size") or not hasattr(config, "hidden_size"):
        raise ConversionError(f"`llm`: {name} has model type {config.model_type!r}, which is not a language model.")
    check_sizes(config, ("vocab_size", "hidden_size", "num_hidden_layers"), name, "llm")
    return config, folder


def clip_config(name: str | Path) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return the config of a CLIP vision tower, and the settings of its image processor, if any."""
    folder = fetch(name, "vision_tower", _CONFIG_FILES)
    config = _read_config(folder, name, "vision_tower")
    if config.model_type == "clip":
        config = config.vision_config
    if config.model_type != "clip_vision_model":
        raise ConversionError(f"`vision_tower` must be a CLIP, but {name} has model type {config.model_type!r}.")
    check_sizes(config, ("hidden_size", "num_hidden_layers", "image_size", "patch_size"), name, "vision_tower")
    path = folder / "preprocessor_config.json"
    settings = read_json(path, "vision_tower") if path.is_file() else {}
    for statistic in ("image_mean", "image_std"):
        value = settings.get(statistic, [0.5] * 3)
        is_right = isinstance(value, list) and len(value) == 3
        if not is_right or not all(isinstance(one, int | float) and -10 < one < 10 for one in value):
            raise ConversionError(f"`vision_tower`: `{statistic}` in {path} must be three numbers, got {value!r}.")
    return config, settings


__all__ = [
    "HUB_PREFIX",
    "check_sizes",
    "clip_config",
    "fetch",
    "fetch_weights",
    "language_model_config",
    "refuse_revision_of_folder",
]
