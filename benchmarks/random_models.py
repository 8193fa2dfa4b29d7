"""Models with random weights at real size, created on the device without a copy in the memory of the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, quantization_config

_TINY_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_TOWERS = {
    "vision_config": {"model_type": "clip_vision_model", "image_size": 42, "patch_size": 14, **_TINY_SIZES},
    "high_res_vision_config": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 96},
    "image_token_id": 500,
}
# The defaults of `MGLlavaConfig` are the published 7B model, and those of Phi-3 in transformers its 3.8B one.
PRESETS: dict[str, dict[str, Any]] = {
    "7b": {},
    "3.8b": {"text_config": {"model_type": "phi3"}},
    "tiny": {"text_config": {"model_type": "llama", "vocab_size": 512, **_TINY_SIZES}, **_TINY_TOWERS},
    "tiny phi3": {
        "text_config": {"model_type": "phi3", "vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2, **_TINY_SIZES},
        **_TINY_TOWERS,
    },
}


def make_config(preset: str, **options: Any) -> MGLlavaConfig:
    """Build the configuration of a published model, or a tiny one of the same kind."""
    return MGLlavaConfig(**{**PRESETS[preset], **options})


def make_model(config: MGLlavaConfig, weights: str, device: str) -> MGLlavaForConditionalGeneration:
    """Create bfloat16 weights on the device; if they are to be quantized, load them with `from_pretrained`."""
    if weights == "bf16":
        return _draw(config, device, torch.bfloat16)
    method, bits = weights.split("-")
    quantization: Any = quantization_config(int(bits)) if method == "bitsandbytes" else None
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    load = MGLlavaForConditionalGeneration.from_pretrained
    return _load(load, config, device, torch.bfloat16, quantization_config=quantization)


@contextmanager
def random_weights(config: MGLlavaConfig, device: str) -> Iterator[None]:
    """Make `from_pretrained` create random weights for a configuration on a device, instead of reading a folder."""
    original = MGLlavaForConditionalGeneration.from_pretrained

    def load(name: str, *, dtype: torch.dtype, **options: Any) -> MGLlavaForConditionalGeneration:
        if "quantization_config" in options:
            return _load(original, config, device, dtype, **options)
        return _draw(config, device, dtype, **options)

    with mock.patch.object(MGLlavaForConditionalGeneration, "from_pretrained", load):
        yield


def _draw(config: MGLlavaConfig, device: str, dtype: torch.dtype, **options: Any) -> MGLlavaForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        return MGLlavaForConditionalGeneration._from_config(config, dtype=dtype, **options).eval()


def _load(
    from_pretrained: Callable[..., Any], config: MGLlavaConfig, device: str, dtype: torch.dtype, **options: Any
) -> MGLlavaForConditionalGeneration:
    model = _draw(config, device, dtype)
    weights = {"config": model.config, "state_dict": model.state_dict(), "dtype": dtype}
    return from_pretrained(None, **weights, device_map={"": device}, **options)
