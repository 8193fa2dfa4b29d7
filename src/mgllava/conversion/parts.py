"""Weights of the parts that complete a checkpoint: the language model and CLIP."""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.sources import fetch_weights
from mgllava.model_files.tensor_files import open_weights
from mgllava.model_files.tensor_matching import FLOAT_DTYPES

# Prefixes and their replacements. Each ends at a dot, so that a name matches at most one.
Rules = tuple[tuple[str, str], ...]

LANGUAGE_MODEL_TO_MODEL: Rules = (("model.", "model.language_model."), ("lm_head.", "lm_head."))

# transformers 5 writes CLIPVisionModel without the prefix, 4 with it.
CLIP_TO_MODEL: Rules = tuple(
    (f"{prefix}{part}.", f"model.vision_tower.{part}.")
    for prefix in ("vision_model.", "")
    for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
)
# Tensors of a CLIP repository that the model does not use: pattern of the name, and the reason.
CLIP_DROPS: Rules = (
    (r"text_model\.", "text tower of CLIP"),
    (r"(text|visual)_projection\.|logit_scale$", "contrastive head of CLIP"),
)

_BUFFERS = (
    (r"model\.vision_tower\.embeddings\.position_ids$", "buffer, computed from the config"),
    (r"model\.language_model\..*rotary_emb\.inv_freq$", "buffer, computed from the config"),
)
_POST_LAYER_NORM = (r"model\.vision_tower\.post_layernorm\.", "not used: it follows the last layer of CLIP")


@dataclass
class Source:
    """Tensors of one source under the model's names.

    Attributes:
        tensors: Tensors by the model's names.
        names: The source's names, by the model's.
        dropped: For each unused tensor, by the source's name, the reason.
        unexpected: Names in the source that no rule covers, with their shapes.
        files: The files read.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def language_model_weights(name: str | Path) -> Source:
    """Open the weights of a language model, a folder or Hub id."""
    tensors, files = open_weights(fetch_weights(name, "llm"))
    return sort_tensors(tensors, LANGUAGE_MODEL_TO_MODEL, (), files)


def clip_weights(name: str | Path) -> Source:
    """Open the weights of a CLIP vision tower: folder or Hub id of a CLIP model or of its vision tower."""
    tensors, files = open_weights(fetch_weights(name, "vision_tower"))
    return sort_tensors(tensors, CLIP_TO_MODEL, CLIP_DROPS, files)


def sort_tensors(tensors: dict[str, LazyTensor], rules: Rules, drops: Rules, files: list[Path]) -> Source:
    """Rename the tensors of a source, except for those that are dropped or that no rule covers."""
    source = Source(files=files)
    for name, tensor in tensors.items():
        if (new_name := rename(name, rules)) is not None:
            if new_name in source.names:
                raise ConversionError(
                    f"{files[0].parent} has two tensors for one parameter: {source.names[new_name]} and {name}. "
                    "Remove one of them."
                )
            source.names[new_name] = name
            source.tensors[new_name] = tensor
        elif (reason := drop_reason(name, drops)) is not None:
            source.dropped[name] = reason
        else:
            source.unexpected.append(f"{name} {tensor.shape}")
    return source


def rename(name: str, rules: Rules) -> str | None:
    """Replace the first prefix that fits; `None` if no rule does."""
    for prefix, replacement in rules:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return None


def drop_reason(name: str, drops: Rules) -> str | None:
    """Return why a tensor is not used, by its name; `None` if it is used."""
    return next((reason for pattern, reason in drops if re.match(pattern, name)), None)


def stored_vision_config(published: PreTrainedConfig) -> PreTrainedConfig:
    """Return a CLIP config without the last layer, which the model does not use."""
    stored = copy.deepcopy(published)
    stored.num_hidden_layers -= 1
    stored.name_or_path = ""  # a path of this machine
    return stored


def model_drop_reason(name: str, stored_clip_layers: int) -> str | None:
    """Return why a model with this many layers of CLIP does not use a renamed tensor; `None` if it does."""
    # The model does not use the last layer of the published tower, and does not store it.
    last_layer = rf"model\.vision_tower\.encoder\.layers\.{stored_clip_layers}\."
    reason = "not used: features are taken before the last layer of CLIP"
    return drop_reason(name, (*_BUFFERS, _POST_LAYER_NORM, (last_layer, reason)))


def dtype_of_other_tensors(text_config: PreTrainedConfig, embedding: torch.dtype, *, is_whole: bool) -> torch.dtype:
    """Choose the dtype of what a checkpoint does not hold: the language model's.

    `is_whole` says that the checkpoint holds the language model, whose embedding table has this dtype.
    """
    configured = getattr(text_config, "dtype", None)
    if is_whole or configured is None:
        return embedding if embedding in FLOAT_DTYPES else torch.float32  # others are refused with their names
    if configured not in FLOAT_DTYPES:
        raise ConversionError(f"`llm`: the dtype in its config.json must be a float, got {configured}.")
    return configured


__all__ = [
    "CLIP_DROPS",
    "CLIP_TO_MODEL",
    "LANGUAGE_MODEL_TO_MODEL",
    "Rules",
    "Source",
    "clip_weights",
    "drop_reason",
    "dtype_of_other_tensors",
    "language_model_weights",
    "model_drop_reason",
    "rename",
    "sort_tensors",
    "stored_vision_config",
]
