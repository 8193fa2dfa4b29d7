"""What quantization leaves in half precision, and configurations that suit the model."""

import copy
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

# They are small beside the language model, run once per image, and every token of the answer depends on them.
_UNQUANTIZED = (
    "vision_tower",
    "high_res_vision_tower",
    "fusion",
    "multi_modal_projector",
    "box_projector",
    "object_attention",
)
# Patterns match from the start of a module's full name: with `model.` in the model that generates, without it in
# `MGLlavaModel`. The list is saved with the model and may be read by the other one, so it names both.
UNQUANTIZED_MODULES = [*(f"model.{name}" for name in _UNQUANTIZED), *_UNQUANTIZED, "lm_head"]
_HIGH_RES_TOWER = ["model.high_res_vision_tower", "high_res_vision_tower"]
# How the configurations of transformers call the list: bitsandbytes, and everything else that replaces layers.
_SKIP_ARGUMENTS = ("llm_int8_skip_modules", "modules_to_not_convert")

# Outputs that bitsandbytes packs together for processors with AVX512-BF16.
_PACKED_OUTPUTS = 32


def quantization_config(bits: int) -> BitsAndBytesConfig:
    """Make the `quantization_config` of `from_pretrained` that suits MG-LLaVA: only the language model is quantized.

    Args:
        bits (`int`):
            4: NF4 with double quantization, which computes in bf16 (fp16 on a GPU without bf16). Weights are stored
            as that type too, so that FSDP can shard them together with adapters (QLoRA).
            8: LLM.int8.

    Returns:
        `BitsAndBytesConfig`: A configuration with `llm_int8_skip_modules`.

    Raises:
        ValueError: If `bits` is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8, got {bits!r}. Load without `quantization_config` for 16 bits.")
    skipped = list(UNQUANTIZED_MODULES)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=skipped,
    )


def with_skipped_modules(config: QuantizationConfigMixin | dict[str, Any]) -> QuantizationConfigMixin:
    """Complete a quantization configuration that does not say which modules to leave alone.

    A list of the user's is kept, with one addition: LLM.int8 cannot run the high-resolution tower, whose linear layers
    work on maps.

    Args:
        config (`QuantizationConfigMixin` or `dict`): What the user passed. It is not changed.

    Returns:
        `QuantizationConfigMixin`: A copy with the list, or without one if the method knows none.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for name in _SKIP_ARGUMENTS:
        if hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(UNQUANTIZED_MODULES))
    if getattr(config, "load_in_8bit", False):
        missing = [name for name in _HIGH_RES_TOWER if name not in config.llm_int8_skip_modules]
        if missing:
            logger.warning_once(
                "`llm_int8_skip_modules` does not name `model.high_res_vision_tower`: it stays unquantized all the "
                "same, because LLM.int8 takes no inputs of four dimensions."
            )
            config.llm_int8_skip_modules = [*config.llm_int8_skip_modules, *missing]
    return config


def leave_unpackable_layers(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit layers for a processor with AVX512-BF16 that it cannot pack.

    It packs blocks of 32 outputs, with a scale for each block of inputs, and fails at the first layer of another size
    (bitsandbytes 0.50). Such layers are computed as on other processors. Those of the published sizes are packed.

    Args:
        model (`torch.nn.Module`): A model that was just loaded.
    """
    for module in model.modules():
        # The name says what it is about, so that nothing has to be imported for models that are not quantized.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = module.weight.quant_state
            is_whole = state is None or module.in_features % state.blocksize == 0
            module.support_avx512bf16_for_cpu = is_whole and module.out_features % _PACKED_OUTPUTS == 0


__all__ = ["UNQUANTIZED_MODULES", "leave_unpackable_layers", "quantization_config", "with_skipped_modules"]
