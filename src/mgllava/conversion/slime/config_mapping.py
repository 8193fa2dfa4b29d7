"""From the `config.json` of a SliME checkpoint to a `SlimeConfig`, and back."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from mgllava.conversion.parts import stored_vision_config
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.sources import check_sizes
from mgllava.model_files.vocabulary import Vocabulary
from mgllava.modeling import SlimeConfig

ORIGINAL_TYPE = "llava_llama"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Fields of which other values need code that no published model uses: what the original takes them to be if they are
# absent, and the values that are converted.
_FIXED: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "mm_projector_type": ("linear", ("gated",)),
    "mm_vision_select_layer": (-2, (-2,)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_resampler_type": (None, ("cosine", "identity", None)),
    "mm_patch_merge_type": ("flat", ("spatial", "flat")),
    "mm_learnable_gated": (-1, (-1, 0, 1)),
    "mm_use_im_start_end": (False, (False, None)),
    "mm_use_im_patch_token": (False, (False, None)),
}
# Values of `image_aspect_ratio` for views that are not made here. Without it, or with a value that the original does
# not know either, an image is one view.
_TILED, _OTHER_VIEWS = "anyres", ("pad", "pad_then_devide", "any_res")
_NUMBERS = ("mm_resampler_topp", "mm_resampler_temp")
_MOST = 1e9
_BRANCHES = ("use_global_only", "use_local_only")
# What the original's training writes next to all else, for models that no checkpoint was converted to.
_CONSTANTS: Mapping[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": _TILED,
    "image_grid_pinpoints": [
        [672, 672],
        [336, 672],
        [672, 336],
        [336, 1008],
        [1008, 336],
        [336, 1344],
        [1344, 336],
    ],
    "mm_projector_type": "gated",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": ORIGINAL_TYPE,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
}
# Fields that are read elsewhere.
_OTHERS = (
    *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("mm_vision_tower", "mm_hidden_size", "mm_resampler_dim", "seperator", "image_aspect_ratio"),
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_TEXT = tuple(
    sorted(
        {field.name for field in dataclasses.fields(LlamaConfig)}
        - {field.name for field in dataclasses.fields(PreTrainedConfig)}
        - set(_ROPE)
    )
)


def is_slime(original: Mapping[str, Any]) -> bool:
    """Tell the configuration of SliME from that of LLaVA, which has the same model type."""
    if original.get("model_type") != ORIGINAL_TYPE:
        return False
    is_gated = original.get("mm_projector_type") == "gated"
    return is_gated or "mm_resampler_type" in original or "mm_learnable_gated" in original


def check_original(original: Mapping[str, Any]) -> None:
    """Raise for values that are not converted."""
    if original.get("quantization_config") is not None:
        raise ConversionError("`checkpoint` is quantized. Pass the model that it was quantized from.")
    for name, (default, accepted) in _FIXED.items():
        value = original.get(name, default)
        if not any(value is one or (type(value) is type(one) and value == one) for one in accepted):
            raise _refusal(name, " or ".join(map(repr, accepted)), value)
    if (ratio := original.get("image_aspect_ratio")) in _OTHER_VIEWS:
        raise _refusal("image_aspect_ratio", "'anyres', or absent for one view", ratio)
    for name in _NUMBERS:
        if type(value := original.get(name, 1.0)) not in (int, float) or not -_MOST < value < _MOST:
            raise _refusal(name, "a number", value)
    for name in _BRANCHES:
        if type(value := original.get(name, False)) is not bool and value is not None:
            raise _refusal(name, "true or false", value)
    for name in ("mm_resampler_dim", "mm_hidden_size", "seperator", "pad_token_id"):
        if type(value := original.get(name, 0)) is not int and value is not None:
            raise _refusal(name, "a whole number", value)
    if all(original.get(name) for name in _BRANCHES):
        raise ConversionError("`checkpoint`: its config.json sets both `use_global_only` and `use_local_only`.")
    if original.get("mm_resampler_type") == "cosine" and original.get("mm_resampler_dim") is None:
        raise _refusal("mm_resampler_dim", "the number of queries where `mm_resampler_type` is 'cosine'", None)


def _refusal(name: str, expected: str, value: Any) -> ConversionError:
    return ConversionError(
        f"`checkpoint`: `{name}` in its config.json must be {expected}, got {value!r}. No published SliME has another "
        "value, and the code for it was not converted."
    )


def read_text_config(original: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """Read the configuration of the language model, whose fields are next to the others."""
    values = {name: original[name] for name in _TEXT if name in original}
    values |= {name: original[name] for name in _ROPE if original.get(name) is not None}
    try:
        config = LlamaConfig(**values)
    except Exception as error:  # a config may be wrong in many ways
        reason = one_line(error.__cause__ or error)
        raise ConversionError(f"`checkpoint`: its config.json cannot be read ({reason}).") from error
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in sizes:
        if name not in original:
            raise ConversionError(f"`checkpoint`: its config.json has no `{name}`.")
    check_sizes(config, sizes, folder, "checkpoint")
    return config


def unused_fields(original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have no effect on the model."""
    used = {*_TEXT, *_ROPE, *_FIXED, *_NUMBERS, *_BRANCHES, *_OTHERS}
    return {name: value for name, value in original.items() if name not in used}


def tiles_images(original: Mapping[str, Any]) -> bool:
    """Whether images are cut into tiles; also if there is no configuration, in the folder of a stage file."""
    return not original or original.get("image_aspect_ratio") == _TILED


def slime_arguments(original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SlimeConfig` that a configuration gives; none without one, which are the defaults."""
    if not original:
        return {}
    is_compressed = original.get("mm_resampler_type") == "cosine"
    arguments: dict[str, Any] = {
        "num_local_queries": original["mm_resampler_dim"] if is_compressed else None,
        "local_order": original.get("mm_patch_merge_type", "flat"),
        "branch": next((name[4:-5] for name in _BRANCHES if original.get(name)), "both"),
        "forced_expert": None if original.get("mm_learnable_gated", -1) == -1 else original["mm_learnable_gated"],
    }
    for ours, theirs in (("router_top_p", "mm_resampler_topp"), ("router_temperature", "mm_resampler_temp")):
        if theirs in original:
            arguments[ours] = float(original[theirs])
    return arguments


def build_config(
    text_config: PreTrainedConfig,
    published_vision_config: PreTrainedConfig,
    vocabulary: Vocabulary,
    **arguments: Any,
) -> SlimeConfig:
    """Build the configuration of the model."""
    text_config.vocab_size = vocabulary.padded_rows
    text_config.name_or_path = ""
    try:
        return SlimeConfig(
            text_config=text_config,
            vision_config=stored_vision_config(published_vision_config),
            image_token_id=vocabulary.image_token_id,
            architectures=["SlimeForConditionalGeneration"],
            **arguments,
        )
    except Exception as error:  # a config may be wrong in many ways
        # huggingface_hub wraps what a config's own validation says.
        reason = one_line(error.__cause__ or error)
        raise ConversionError(f"`checkpoint`: its config.json does not describe a SliME model ({reason}).") from error


def _text_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a language model by the original's names."""
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type", "default")
    values = {name: getattr(config, name) for name in _TEXT}
    return values | {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}


def _slime_fields(config: Any, converted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the other fields by the original's names, from a configuration or from what it is converted to."""
    queries = config.num_local_queries
    separator = config.separator_token_id if converted is None else converted.get("seperator")
    return {
        "mm_resampler_type": "identity" if queries is None else "cosine",
        **({} if queries is None else {"mm_resampler_dim": queries}),
        "mm_resampler_topp": getattr(config, "router_top_p", SlimeConfig.router_top_p),
        "mm_resampler_temp": getattr(config, "router_temperature", SlimeConfig.router_temperature),
        "mm_patch_merge_type": config.local_order,
        "mm_learnable_gated": -1 if config.forced_expert is None else config.forced_expert,
        **{name: name == f"use_{config.branch}_only" for name in _BRANCHES},
        "seperator": separator,
    }


def original_config(
    config: SlimeConfig, converted: Mapping[str, Any], rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the original's configuration of a model: the converted one, with what is different by now."""
    text, slime = _text_fields(config.text_config), _slime_fields(config)
    old: dict[str, Any] = {}
    if converted:
        check_original(converted)
        old_text = read_text_config(converted, Path("the report of the conversion"))
        old = _text_fields(old_text) | _slime_fields(SimpleNamespace(**slime_arguments(converted)), converted)
    new = {**text, **slime, "vocab_size": rows, "mm_hidden_size": config.vision_config.hidden_size}
    changed = {name: value for name, value in new.items() if name not in old or old[name] != value}
    dtype_name = str(dtype).removeprefix("torch.")
    return {**(converted or _CONSTANTS), **changed, "torch_dtype": dtype_name}


__all__ = [
    "HUB_ID",
    "ORIGINAL_TYPE",
    "build_config",
    "check_original",
    "is_slime",
    "original_config",
    "read_text_config",
    "slime_arguments",
    "tiles_images",
    "unused_fields",
]
