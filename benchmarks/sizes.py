"""Compute the disk space and memory of the published models from their configurations, without running them.

    python benchmarks/sizes.py

The figures are for weights only; a prompt also needs memory for its KV cache, and generation for activations.
"""

from math import ceil
from typing import Any

import torch
from report import report
from torch import nn
from transformers import Owlv2Config, Owlv2ForObjectDetection

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration
from mgllava.modeling import RamPlusConfig, RamPlusForImageTagging

_GB = 1e9
# NF4 with double quantization: 4 bits, an 8-bit scale for each 64 weights, a float32 one for each 256 of these.
_BYTES = {16: 2, 8: 1, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
_PROMPT = 2048
# From the `config.json` of each language model; `vocab_size` without the placeholder that the conversion adds.
_LLAMA: dict[str, Any] = {"model_type": "llama"}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "phi3-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    },
    "vicuna-7b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama3-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "vicuna-13b": {
        **_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    },
    "yi-34b": {
        **_LLAMA, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
        "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64000,
    },
}  # fmt: skip
_OWLV2_LARGE: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 1008, "patch_size": 14,
    },
}  # fmt: skip


def model_row(name: str, text_config: dict[str, Any]) -> dict[str, Any]:
    """Compute the sizes of one MG-LLaVA in bfloat16, and with a quantized language model."""
    rows = 64 * ceil((text_config["vocab_size"] + 1) / 64)
    config = MGLlavaConfig(text_config=text_config | {"vocab_size": rows, "pad_token_id": 0}, image_token_id=rows - 1)
    with torch.device("meta"):
        model = MGLlavaForConditionalGeneration(config)
    total = model.num_parameters()
    layers = model.model.language_model.modules()
    quantized = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    memory = {bits: (_BYTES[16] * (total - quantized) + size * quantized) / _GB for bits, size in _BYTES.items()}
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * _BYTES[16] * _PROMPT
    return {
        "model": name,
        "parameters (10^9)": total / 1e9,
        "disk GB": memory[16],
        **{f"{bits} bits GB": size for bits, size in memory.items()},
        f"cache of {_PROMPT} tokens GB": cache / _GB,
    }


def detector_row() -> dict[str, Any]:
    """Compute the size of the box detector, in float32 as on a CPU: RAM++ and OWLv2-L."""
    with torch.device("meta"):
        models = [RamPlusForImageTagging(RamPlusConfig()), Owlv2ForObjectDetection(Owlv2Config(**_OWLV2_LARGE))]
    total = sum(model.num_parameters() for model in models)
    return {"model": "box detector", "parameters (10^9)": total / 1e9, "disk GB": 4 * total / _GB}


def main() -> None:
    rows = [model_row(name, text_config) for name, text_config in LANGUAGE_MODELS.items()]
    blank = dict.fromkeys(rows[0], "")
    report("sizes", "Sizes of the weights, computed from configurations", [*rows, blank | detector_row()])


if __name__ == "__main__":
    main()
