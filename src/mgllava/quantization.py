"""Quantization configurations for 4 and 8 bits."""

import torch
from transformers import BitsAndBytesConfig

from mgllava.modeling import MGLlavaPreTrainedModel


def quantization_config(bits: int) -> BitsAndBytesConfig:
    """Make a `quantization_config` for `from_pretrained` that quantizes only the language model of MG-LLaVA.

    Args:
        bits (`int`):
            4: NF4 with double quantization, computed in bfloat16 (float16 on a GPU without bfloat16). Weights are
            stored in the same dtype, so that FSDP can shard them together with adapters (QLoRA).
            8: LLM.int8.

    Returns:
        `BitsAndBytesConfig`: A configuration with `llm_int8_skip_modules`.

    Raises:
        ValueError: If `bits` is neither 4 nor 8.
    """
    config = quantization_of(bits)
    config.llm_int8_skip_modules = MGLlavaPreTrainedModel.skipped_modules()
    return config


def quantization_of(bits: int) -> BitsAndBytesConfig:
    """Make the same for any family; `from_pretrained` of its model class fills in `llm_int8_skip_modules`."""
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8, got {bits!r}. Load without `quantization_config` for 16 bits.")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


__all__ = ["quantization_config", "quantization_of"]
