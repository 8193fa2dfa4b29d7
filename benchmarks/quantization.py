"""Measure accuracy and memory of quantized small models: logits and next tokens compared with float32.

Every model is loaded from the same folder in float32 and bfloat16, and quantized in two ways: with the modules that
stay in half precision by default, and with all modules quantized. All get the answers of the float32 model as input.
Usage: `python benchmarks/quantization.py`.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from golden_model import GOLDEN, convert_golden
from report import report
from transformers import CONFIG_MAPPING, AutoModel, AutoProcessor, BitsAndBytesConfig

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, quantization_config

FAMILIES = ("llama", "phi3", "qwen2", "mistral")
ANSWER = 16
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "8-bit": {"dtype": torch.bfloat16, "quantization_config": quantization_config(8)},
    "8-bit, everything": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[]),
    },
    "4-bit": {"dtype": torch.bfloat16, "quantization_config": quantization_config(4)},
    "4-bit, everything": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(
            **{**quantization_config(4).to_diff_dict(), "llm_int8_skip_modules": []}
        ),
    },
}


def save_shipped(folder: Path) -> dict[str, torch.Tensor]:
    """Convert the small checkpoint of the tests, and return prompts about its images."""
    processor = AutoProcessor.from_pretrained(convert_golden(folder))
    images = sorted((GOLDEN / "images").glob("*.png"))[:2]
    texts = ["USER: <image>\nWhat is on the table? ASSISTANT:"] * len(images)
    boxes = [[[2 * i, i, 60 + i, 50 + 3 * i] for i in range(1, 6)]] * len(images)
    return processor(images, texts, boxes=boxes, padding=True, return_tensors="pt")


def save_random(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a random model of a family, wide enough for the block sizes of quantization, and draw prompts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text_config = CONFIG_MAPPING[family](
        **sizes, num_key_value_heads=2, vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config = MGLlavaConfig(
        text_config=text_config,
        vision_config={"model_type": "clip_vision_model", "image_size": 42, "patch_size": 14, **sizes},
        high_res_vision_config={"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 128, 256], "image_size": 96},
        image_token_id=500,
    )
    model = MGLlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # so that none is zero
    model.save_pretrained(folder)
    text = torch.randint(3, 500, (2, 24))
    input_ids = torch.cat([text[:, :4], torch.full((2, 9 + 5), 500), text[:, 4:]], dim=1)
    corners = torch.rand(2, 5, 2, 2) * 96
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(2, 3, 96, 96),
        "boxes": torch.cat([corners.amin(2), corners.amax(2)], dim=-1),
        "num_boxes": torch.full((2,), 5),
    }


@torch.inference_mode()
def compare(name: str, folder: Path, inputs: dict[str, torch.Tensor]) -> list[dict]:
    """Load every form of a model and compare it with the first."""
    rows: list[dict] = []
    expected = torch.empty(0)
    for form, options in FORMS.items():
        model = AutoModel.from_pretrained(folder, **options).eval()
        if not rows:
            answer = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
            added = torch.ones(len(answer), ANSWER, dtype=torch.long)
            inputs = {
                **inputs,
                "input_ids": answer,
                "attention_mask": torch.cat([inputs["attention_mask"], added], dim=1),
            }
        logits = model(**inputs, logits_to_keep=ANSWER + 1).logits.float()
        logits[..., model.config.unused_token_ids] = 0
        expected = expected if rows else logits
        rows.append(
            {
                "model": name,
                "form": form,
                "relative error of logits": float((logits - expected).norm() / expected.norm()),
                "same next token": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
                "kB": model.get_memory_footprint() / 1e3,
            }
        )
    return rows


def main() -> None:
    """Compare all forms of the shipped checkpoint and of one random model per family."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every cast of every layer
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        shipped = Path(temporary) / "shipped"
        rows += compare("shipped checkpoint", shipped, save_shipped(shipped))
        for family in FAMILIES:
            folder = Path(temporary) / family
            rows += compare(f"random {family}", folder, save_random(family, folder))
    report("quantization_cpu", f"Quantized models against fp32, over {ANSWER + 1} answered tokens of 2 prompts", rows)


if __name__ == "__main__":
    typer.run(main)
