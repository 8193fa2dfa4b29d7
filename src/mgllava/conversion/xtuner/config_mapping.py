"""Derive an `MGLlavaConfig` from the tensors of a checkpoint and the configs of its towers."""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

from mgllava.conversion.parts import stored_vision_config
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.vocabulary import Vocabulary
from mgllava.modeling import MGLlavaConfig

from .open_clip import HighResTower

# Side of the high-resolution input of every published checkpoint, used if the config text does not say it.
_PUBLISHED_IMAGE_SIZE = 768

_MAX_DIGITS = 5

_FUSION = "fuse_module."
_PROJECTOR = "projector.model.0.weight"
_BOX_PROJECTOR = "bbox_projector.model.0.weight"
_FIRST_LEVEL = "multi_level_linear.0.weight"
_GATE = "fuse_module.gate.0.weight"
_HIGH_RES_CONV = "fuse_module.slow_conv.weight"
_LOW_RES_CONV = "fuse_module.fast_conv.weight"


def detect_fusion_type(tensors: dict[str, LazyTensor], vision_size: int, high_res_size: int) -> str:
    """Detect from names and shapes how a checkpoint fuses the two resolutions."""
    convolved = any(name.startswith(_FUSION) for name in tensors)
    if convolved:
        _check_width(tensors, _LOW_RES_CONV, 0, vision_size, "vision_tower")
        _check_width(tensors, _HIGH_RES_CONV, 0, high_res_size, "high_res_tower")
    width = _input_width(tensors, _PROJECTOR)
    # In the original, the first four are `fuse_model` 0 to 3.
    variants = {
        (True, True, vision_size): "conv_gate",
        (True, True, 2 * vision_size): "conv_gate_concat",
        (True, False, 2 * vision_size): "channel_concat",
        (False, False, vision_size + high_res_size): "plain_channel_concat",
        (False, False, vision_size): "none",
    }
    fusion_type = variants.get((convolved, _GATE in tensors, width))
    if fusion_type is None:
        raise ConversionError(
            f"The checkpoint's fusion is unknown: {_PROJECTOR} reads {width} channels, expected "
            f"{vision_size} (width of `vision_tower`), {2 * vision_size}, or {vision_size + high_res_size} "
            f"(with {high_res_size} of `high_res_tower`) and matching fuse_module.* tensors. "
            f"Are the towers those that it was trained with? It has: {_shapes(tensors)}."
        )
    return fusion_type


def detect_box_feature_type(tensors: dict[str, LazyTensor], hidden_sizes: list[int]) -> str:
    """Detect from names and shapes which feature maps a checkpoint's boxes are pooled from."""
    width = _input_width(tensors, _BOX_PROJECTOR)
    if _FIRST_LEVEL in tensors:
        if tensors[_FIRST_LEVEL].shape[:1] == (width,):
            return "multi_level"
    elif width == hidden_sizes[-1]:
        return "last_stage"
    elif width == sum(hidden_sizes):
        return "pyramid"
    raise ConversionError(
        f"The checkpoint's box features are unknown: {_BOX_PROJECTOR} reads {width} channels, expected "
        f"{sum(hidden_sizes)} (all stages of `high_res_tower`, {hidden_sizes}), {hidden_sizes[-1]} (the last), or the "
        f"width of multi_level_linear.*. Is `high_res_tower` the one that it was trained with? "
        f"The checkpoint has: {_shapes(tensors)}."
    )


def read_image_size(config_text: str) -> int:
    """Read the side of the high-resolution input from the text of a training config."""
    match = re.search(r"\bimage_size_aux\s*=\s*(\d+)", config_text)
    if match is None:
        return _PUBLISHED_IMAGE_SIZE
    if len(match[1]) > _MAX_DIGITS or not int(match[1]):
        raise ConversionError(f"The checkpoint's config text has an impossible `image_size_aux`: {match[1][:30]}.")
    return int(match[1])


def build_config(
    tensors: dict[str, LazyTensor],
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    high_res_tower: HighResTower,
    vocabulary: Vocabulary,
    image_size: int,
) -> MGLlavaConfig:
    """Build the config that a checkpoint's tensors imply."""
    text_config = copy.deepcopy(text_config)
    # A path of the machine that converts.
    text_config.name_or_path = ""
    text_config.vocab_size = vocabulary.padded_rows
    hidden_sizes = high_res_tower.hidden_sizes
    fusion_type = detect_fusion_type(tensors, vision_config.hidden_size, hidden_sizes[-1])
    box_feature_type = detect_box_feature_type(tensors, hidden_sizes)
    _check_width(tensors, _PROJECTOR, 0, text_config.hidden_size, "llm")
    variant: dict[str, Any] = {"fusion_type": fusion_type, "box_feature_type": box_feature_type}
    if _FIRST_LEVEL in tensors:
        variant["box_multi_level_size"] = tensors[_FIRST_LEVEL].shape[0]
    try:
        return MGLlavaConfig(
            text_config=text_config,
            vision_config=stored_vision_config(vision_config),
            high_res_vision_config={
                "architecture": high_res_tower.architecture,
                "depths": high_res_tower.depths,
                "hidden_sizes": hidden_sizes,
                "image_size": image_size,
            },
            image_token_id=vocabulary.image_token_id,
            video_token_id=vocabulary.video_token_id,
            unpadded_vocab_size=vocabulary.original_rows,
            tie_word_embeddings=getattr(text_config, "tie_word_embeddings", False),
            architectures=["MGLlavaForConditionalGeneration"],
            **variant,
        )
    except Exception as error:  # a config may be wrong in many ways
        # huggingface_hub wraps the errors of a config's validation.
        reason = error.__cause__ or error
        raise ConversionError(f"Checkpoint and towers do not fit together: {reason}") from error


def _check_width(tensors: dict[str, LazyTensor], name: str, axis: int, width: int, argument: str) -> None:
    found = _shape(tensors, name)[axis]
    if found != width:
        raise ConversionError(
            f"`{argument}` is not the one of the training: it is {width} channels wide, but {name} of the "
            f"checkpoint, with shape {_shape(tensors, name)}, needs {found}."
        )


def _input_width(tensors: dict[str, LazyTensor], name: str) -> int:
    return _shape(tensors, name)[1]


def _shape(tensors: dict[str, LazyTensor], name: str) -> tuple[int, ...]:
    # A damaged tensor may have fewer axes; callers index the first two.
    if name not in tensors or len(tensors[name].shape) < 2:
        raise ConversionError(
            f"The checkpoint has no matrix {name}: it is not an MG-LLaVA checkpoint, or it is incomplete. "
            f"It has {len(tensors)} tensors: {_shapes(tensors)}."
        )
    return tensors[name].shape


def _shapes(tensors: dict[str, LazyTensor], limit: int = 30) -> str:
    own = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(("llm.", "visual_encoder"))}
    listed = [f"{name} {shape}" for name, shape in own.items()]
    language = len(tensors) - len(own)
    rest = [f"{len(listed) - limit} more"] if len(listed) > limit else []
    return ", ".join(listed[:limit] + rest + ([f"{language} of language model and towers"] if language else []))


__all__ = [
    "build_config",
    "detect_box_feature_type",
    "detect_fusion_type",
    "read_image_size",
]
