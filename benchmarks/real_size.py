"""Measure MG-LLaVA-Vicuna-7B at real size on a CPU, with random weights: conversion, loading and prefill.

    python benchmarks/real_size.py [--layers 32] [--directory DIR]

The prefill is compared with that of transformers' LLaVA; both share the weights of the language model. Needs disk
space for two to three checkpoints (freed at the end), and memory for one bfloat16 model and its CLIP. Every step runs
in a process of its own. `--layers 2` tries the script out.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from fresh_process import run_alone
from golden_model import GOLDEN
from memory_watch import MemoryWatch
from random_checkpoints import save_random
from random_models import make_config
from report import report
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from mgllava import MGLlavaForConditionalGeneration
from mgllava.conversion import convert_checkpoint
from mgllava.conversion.xtuner.key_mapping import to_xtuner

ROWS, TEXT_TOKENS, BOXES, SCALE, REPEATS = 32001, 100, 10, 0.02, 2


def write_sources(directory: Path, layers: int) -> None:
    """Write a checkpoint of the published shapes, and the folders of the models that it was trained from."""
    text_config = {"model_type": "llama", "vocab_size": ROWS, "num_hidden_layers": layers, "dtype": "bfloat16"}
    config = make_config("7b", text_config=text_config, image_token_id=ROWS - 1)
    with torch.device("meta"):
        model: Any = MGLlavaForConditionalGeneration(config)
    names = {to_xtuner(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shape for name, shape in names.items() if name is not None}
    meta = torch.load(GOLDEN / "xtuner" / "iter_10.pth", weights_only=True)["meta"]
    save_random(directory / "iter.pth", shapes, SCALE, meta=meta)

    shutil.copytree(GOLDEN / "llm", directory / "llm", ignore=shutil.ignore_patterns("model.safetensors"))
    sizes = config.text_config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (directory / "llm" / "config.json").write_text(json.dumps(sizes))

    published = config.vision_config
    published.num_hidden_layers += 1  # the converter drops the last layer
    CLIPVisionModel._from_config(published, dtype=torch.bfloat16).save_pretrained(directory / "clip")
    shutil.copy(GOLDEN / "clip" / "preprocessor_config.json", directory / "clip")

    (directory / "convnext").mkdir()
    vision = {"timm_model_name": config.high_res_vision_config.architecture, "image_size": 320}
    (directory / "convnext" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    trunk = timm.create_model(vision["timm_model_name"], num_classes=0).bfloat16().state_dict()
    weights = {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    save_file(weights, directory / "convnext" / "open_clip_model.safetensors")


def convert(directory: Path) -> dict[str, Any]:
    """Convert the checkpoint."""
    with MemoryWatch() as watch:
        convert_checkpoint(
            directory / "iter.pth",
            directory / "llm",
            directory / "clip",
            directory / "convnext",
            "vicuna",
            directory / "out",
        )
    size = (directory / "iter.pth").stat().st_size / 1e9
    written = sum(path.stat().st_size for path in (directory / "out").glob("*.safetensors")) / 1e9
    return {
        "checkpoint GB": size,
        "written GB": written,
        "conversion seconds": watch.seconds,
        "conversion extra GB": watch.extra_gb,
    }


def prefill(directory: Path) -> dict[str, Any]:
    """Load the model and run a prompt with one image, in it and in transformers' LLaVA."""
    with MemoryWatch() as watch:
        model = AutoModelForImageTextToText.from_pretrained(directory / "out", dtype=torch.bfloat16).eval()
    config = model.config
    other_config = LlavaConfig(
        text_config=config.text_config,
        vision_config=config.vision_config,
        image_token_id=config.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=config.image_seq_length,
    )
    with torch.device("meta"):
        other: Any = LlavaForConditionalGeneration(other_config)
    other.model.language_model, other.lm_head = model.model.language_model, model.lm_head
    other.model.vision_tower = model.model.vision_tower
    other.model.multi_modal_projector = other.model.multi_modal_projector.to_empty(device="cpu").bfloat16()
    other.eval()

    text = torch.randint(3, 500, (1, TEXT_TOKENS))

    def prompt(tokens: int) -> dict[str, torch.Tensor]:
        image = torch.full((1, tokens), config.image_token_id)
        ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    size, low_res_size = config.high_res_vision_config.image_size, config.vision_config.image_size
    corners = torch.randint(0, size, (1, BOXES, 2, 2))
    ours = prompt(config.image_seq_length + BOXES) | {
        "pixel_values": torch.randn(1, 3, size, size, dtype=torch.bfloat16),
        "boxes": torch.cat([corners.amin(2), corners.amax(2) + 1], dim=-1),
        "num_boxes": torch.tensor([BOXES]),
    }
    theirs = prompt(config.image_seq_length) | {
        "pixel_values": torch.randn(1, 3, low_res_size, low_res_size, dtype=torch.bfloat16)
    }
    # In turns, so that changes of the machine's load affect both. The first run reads the weights from the disk.
    times = []
    for _ in range(REPEATS):
        with MemoryWatch() as running:
            mine = seconds(lambda: model(**ours, logits_to_keep=1))
        times.append((mine, seconds(lambda: other(**theirs, logits_to_keep=1)), running.peak_gb))
    mine, llava, _ = (min(of_model) for of_model in zip(*times, strict=True))
    return {
        "loading seconds": watch.seconds,
        "prefill peak GB": max(peak for _, _, peak in times),
        "prefill seconds": mine,
        "LLaVA's prefill seconds": llava,
        "ratio": mine / llava,
    }


@torch.inference_mode()
def seconds(run: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(
    layers: Annotated[int, typer.Option(help="layers of the language model; 32 is the real size")] = 32,
    directory: Annotated[Path | None, typer.Option(help="folder for about 45 GB; by default a temporary one")] = None,
) -> None:
    """Run both steps, and print and store the table."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="mgllava-real-size-") as name:
        folder = Path(name)
        write_sources(folder, layers)
        row = {"layers": layers, **run_alone(convert, folder), **run_alone(prefill, folder)}
    report("real_size", "A 7B model at real size on this CPU", [row])


if __name__ == "__main__":
    typer.run(main)
