"""Measure speed, hardware utilization and memory of training at real size: stage 2 of the recipes on random weights.

Rows: LoRA and QLoRA of the 7B model, and full training of the 3.8B model (Phi-3-mini) except its towers. Each row uses
the package's recipe: batches, optimizer, gradient checkpointing and workers are those of `mgllava train`, and can be
changed in the same way. Only the weights and the photographs are random. The first step is not counted.

- tokens/s: tokens of text, image and boxes, without padding.
- MFU, model FLOP utilization: FLOP of the counted samples / seconds / dense bf16 rate of the data sheet. FLOP are
  those of matrix products and convolutions in one forward pass and in the backward pass to all trained parameters,
  counted by `torch.utils.flop_counter` on meta tensors, 2 per multiply-add. The forward pass of the frozen towers
  counts, and so do gradients that pass through frozen layers. Gradients of frozen weights, recomputation (gradient
  checkpointing), padding, dequantization and the optimizer do not. Attention counts as if no position were masked.
- waiting for data: share of the time in which the device is idle because a batch is not ready or is being copied.

Usage: `python benchmarks/training.py` on a GPU, or `--row lora` for one row; without a GPU it runs small shapes.
"""

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import typer
from fresh_process import run_alone
from generation import DEVICES
from random_models import random_weights
from report import report
from torch.utils.flop_counter import FlopCounterMode
from training_data import make_parts, open_data, start_workers_as_usual, write_data
from transformers import TrainerCallback

from mgllava import MGLlavaConfig
from mgllava.families import FAMILIES
from mgllava.training import MGLlavaDataCollator, MGLlavaTrainer, Recipe, load_recipe
from mgllava.training.arguments import training_arguments
from mgllava.training.recipe_model import load_model
from mgllava.training.trainable import trained_parameters

PHOTO_SIZES, PHOTOS = ((640, 480), (480, 640), (1920, 1080)), 48
# Recipes, template, and shapes: real and tiny.
ROWS: dict[str, tuple[list[str], str, dict[str, str]]] = {
    "lora": (["stage_2_vicuna_7b.yaml", "lora.yaml"], "vicuna", {"real": "7b", "tiny": "tiny"}),
    "qlora": (["stage_2_vicuna_7b.yaml", "qlora.yaml"], "vicuna", {"real": "7b", "tiny": "tiny"}),
    "full": (["stage_2_phi3_mini.yaml"], "phi3", {"real": "3.8b", "tiny": "tiny phi3"}),
}
TINY_CHANGES = ["global_batch_size=4", "training.per_device_train_batch_size=2", "training.dataloader_num_workers=1"]
CHANGES = ["training.save_strategy=no", "training.disable_tqdm=true", "training.num_train_epochs=1"]


class Stopwatch(TrainerCallback):
    """Measures all optimizer steps after the first, records their contents, and stops training at the time limit."""

    def __init__(self, seconds: float, is_cuda: bool):
        self.limit, self.is_cuda = seconds, is_cuda
        self.steps, self.seconds, self.waited, self.padded = 0, 0.0, 0.0, 0
        self.lengths: list[int] = []
        self.boxes: list[int] = []
        self._started: float | None = None

    def now(self) -> float:
        """Return the time when the device has finished its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Reset the peak memory, which loading has raised."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def record(self, batches: list[dict[str, Any]], waited: float) -> None:
        """Record the batches of the next step."""
        if self._started is not None:
            self.waited += waited
            for batch in batches:
                self.padded += batch["attention_mask"].numel()
                self.lengths += batch["attention_mask"].sum(1).tolist()
                self.boxes += batch["num_boxes"].tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock after the first step, and count all later steps."""
        now = self.now()
        if self._started is None:
            self._started = now
            return
        self.steps, self.seconds = self.steps + 1, now - self._started
        control.should_training_stop |= self.seconds >= self.limit


class TimedTrainer(MGLlavaTrainer):
    """The trainer, with a clock around the loading of batches."""

    def __init__(self, *args: Any, stopwatch: Stopwatch, **kwargs: Any):
        super().__init__(*args, callbacks=[stopwatch], **kwargs)
        self.stopwatch = stopwatch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Load the batches of a step onto the device."""
        start = self.stopwatch.now()
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.stopwatch.record(batches, self.stopwatch.now() - start)
        return batches, count


def count_flops(recipe: Recipe, args: Any, config: MGLlavaConfig) -> tuple[list[float], list[float]]:
    """Count the FLOP of training on one image and on one text, as polynomials in the numbers of boxes and tokens.

    The result has the coefficients of an image (1, boxes) and of a text (tokens, tokens squared).
    """
    # A 4-bit model has the same matrix products as one in 16 bits.
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, bits=None))
    with random_weights(config, "meta"):
        trained = load_model(recipe, "random weights", args, FAMILIES["mgllava"])
    # Not in training mode, in which text alone runs the towers on a dummy image.
    trained.to(torch.bfloat16).eval()
    model = trained.get_base_model() if recipe.lora is not None else trained
    side, width = config.high_res_vision_config.image_size, config.text_config.hidden_size

    def image(num_boxes: int) -> float:
        pixels = torch.empty(1, 3, side, side, dtype=torch.bfloat16, device="meta")
        boxes, counts = torch.empty(1, num_boxes, 4, device="meta"), torch.empty(1, device="meta")
        with FlopCounterMode(display=False) as counter:
            fused, objects, _ = model.model.encode_images(pixels, boxes, counts)
            (fused.sum() + objects.sum()).backward()
        return counter.get_total_flops()

    def text(length: int) -> float:
        # With gradients, which flow on to the image tokens.
        embeds = torch.empty(1, length, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        # Creating a mask and checking for placeholders would read values, which meta tensors do not have.
        mask = torch.empty(1, 1, length, length, dtype=torch.bfloat16, device="meta")
        unchecked = mock.patch.object(model.model, "_check_no_placeholders")
        with unchecked, FlopCounterMode(display=False) as counter:
            model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.sum().backward()
        return counter.get_total_flops()

    per_box = image(2) - image(1)
    length = 256
    short, long = text(length), text(2 * length)
    squared = (long - 2 * short) / (2 * length**2)
    return [image(1) - per_box, per_box], [short / length - squared * length, squared]


def measure(
    row: str, size: str, device: str, changes: list[str], steps: int, seconds: float, folder: Path
) -> dict[str, Any]:
    """Run one training, and return its row of the table."""
    start_workers_as_usual()
    recipes, template, shapes = ROWS[row]
    shape = shapes[size]
    where = [f"training.output_dir={folder / row}", f"training.use_cpu={str(device == 'cpu').lower()}"]
    small = TINY_CHANGES if size == "tiny" else []
    recipe = load_recipe(*recipes, *small, *CHANGES, *where, *changes)
    args = training_arguments(recipe)
    config, processor = make_parts(shape, template)
    # The data is one epoch, so that all lengths occur in any order of samples.
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    data_folder = folder / f"data-{(1 + steps) * per_step}"
    if not data_folder.exists():
        write_data(data_folder, PHOTO_SIZES, PHOTOS, (1 + steps) * per_step)
    data = open_data(data_folder, processor)
    of_image, of_text = count_flops(recipe, args, config)
    with random_weights(config, device):
        model = load_model(recipe, "random weights", args, FAMILIES["mgllava"])
    stopwatch = Stopwatch(seconds, device == "cuda")
    trainer = TimedTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=MGLlavaDataCollator(processor, recipe.data.max_text_length, return_sample_ids=True),
        processing_class=processor,
        stopwatch=stopwatch,
    )
    trainer.train()
    if not stopwatch.steps:
        raise RuntimeError("No step was counted, because only the first one was run. Increase `--steps`.")
    tokens, images, took = sum(stopwatch.lengths), len(stopwatch.boxes), stopwatch.seconds
    flop = sum(of_text[0] * length + of_text[1] * length**2 for length in stopwatch.lengths)
    flop += sum(of_image[0] + of_image[1] * boxes for boxes in stopwatch.boxes)
    return {
        "row": row,
        "shape": shape,
        "trained M": sum(count for _, count, _, _ in trained_parameters(model)) / 1e6,
        "batch": f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}",
        "steps": stopwatch.steps,
        "s/step": took / stopwatch.steps,
        "tokens/sample": tokens / len(stopwatch.lengths),
        "boxes/image": sum(stopwatch.boxes) / images,
        "padding": 1 - tokens / stopwatch.padded,
        "tokens/s": tokens / took,
        "images/s": images / took,
        "TFLOP/s": flop / took / 1e12,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "waiting for data": stopwatch.waited / took,
    }


def main(
    changes: Annotated[list[str] | None, typer.Argument(help="changes to the recipes, key=value")] = None,
    row: Annotated[list[str], typer.Option(help=", ".join(ROWS))] = list(ROWS),  # noqa: B006
    device: Annotated[
        Literal["auto", "cuda", "cpu"], typer.Option(help="where to run; auto: on a GPU if there is one")
    ] = "auto",
    size: Annotated[
        Literal["auto", "real", "tiny"], typer.Option(help="shapes; auto: real on a GPU, tiny on a CPU")
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="steps of the optimizer to measure")] = 6,
    seconds: Annotated[float, typer.Option(help="stop a row after this number of seconds")] = 120,
    rate: Annotated[float | None, typer.Option(help="dense bf16 TFLOP/s; by default from the data sheet")] = None,
) -> None:
    """Train each row in a process of its own, and print and store the table."""
    if unknown := sorted({*row} - {*ROWS}):
        raise typer.BadParameter(f"`--row` must be among {', '.join(ROWS)}, got {', '.join(unknown)}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if size == "auto":
        size = "real" if device == "cuda" else "tiny"
    name = torch.cuda.get_device_name() if device == "cuda" else device
    known = next((key for key in DEVICES if key in name), None)
    rate = rate or (DEVICES[known][1] if known else None)
    os.environ.setdefault("COLUMNS", "240")  # more columns than a terminal has
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        try:
            for each in row:
                measured = run_alone(measure, each, size, device, changes or [], steps, seconds, Path(folder))
                measured["MFU"] = measured["TFLOP/s"] / rate if rate else None
                print(json.dumps(measured), flush=True)
                rows.append(measured)
        finally:
            # If a row fails, the earlier ones are still reported.
            if rows:
                label = (known or name).lower().replace(" ", "_")
                parts = ["training", *(["tiny"] if size == "tiny" else []), label]
                parts += [each["row"] for each in rows] if len(rows) < len(ROWS) else []
                title = f"Training on {name}: stage 2, random weights, {size} shapes"
                report("_".join(parts), title, rows)


if __name__ == "__main__":
    typer.run(main)
