"""Measure memory, time to the first token and tokens per second at real size, with random weights.

A prompt has one image with 10 boxes and 100 text tokens; boxes are given, so no detector runs. Each type of weights is
measured in a process of its own, without compilation ("eager") and compiled as in `docs/running.md` ("compiled").
Usage: `python benchmarks/generation.py` on a GPU; `--preset tiny --device cpu` tries the script out.
"""

import gc
import json
import os
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import typer
from fresh_process import run_alone
from random_models import make_config, make_model
from report import report
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration

TEXT_TOKENS, BOXES = 100, 10
WEIGHTS = ("bf16", "bitsandbytes-8", "bitsandbytes-4", "torchao-8")
# Memory bandwidth in TB/s and dense bf16 rate in TFLOP/s, from the data sheets.
DEVICES = {"H200": (4.8, 989), "H100": (3.35, 989), "A100": (2.0, 312)}
# A measured speed above this share of the hardware's limit counts as limited by the hardware.
NEAR_ROOFLINE = 0.6


def make_inputs(config: MGLlavaConfig, batch_size: int, device: str) -> dict[str, torch.Tensor]:
    """Draw prompts with one image each."""
    generator = torch.Generator().manual_seed(0)
    size = config.high_res_vision_config.image_size
    text = torch.randint(3, 500, (batch_size, TEXT_TOKENS), generator=generator)
    image = torch.full((batch_size, config.image_seq_length + BOXES), config.image_token_id)
    corners = torch.randint(0, size + 1, (batch_size, BOXES, 2, 2), generator=generator).float()
    input_ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch_size, 3, size, size, generator=generator).to(torch.bfloat16),
        "boxes": torch.cat([corners.amin(2), corners.amax(2)], dim=-1),
        "num_boxes": torch.full((batch_size,), BOXES),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def weight_bytes(model: MGLlavaForConditionalGeneration) -> int:
    """Return the bytes of weights that every new token reads: the language model and the head, not the embeddings."""
    embeddings = model.get_input_embeddings()
    modules = [model.lm_head, *(child for child in model.model.language_model.children() if child is not embeddings)]
    parameters = {id(p): p for module in modules for p in module.parameters()}
    # Tensor subclasses of torchao report the unquantized dtype, so the sizes of their inner tensors are added up.
    return sum(_stored_bytes(parameter) for parameter in parameters.values())


def _stored_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def count_flops(config: MGLlavaConfig) -> tuple[float, float]:
    """Return the TFLOP of the vision towers and of the prefill for one prompt, counted on meta tensors."""
    with torch.device("meta"), torch.inference_mode():
        model = MGLlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
        inputs = make_inputs(config, 1, "meta")
        with FlopCounterMode(display=False) as vision:
            model.model.encode_images(inputs["pixel_values"], inputs["boxes"], inputs["num_boxes"])
        # The check for placeholders would read values, which meta tensors do not have.
        unchecked = mock.patch.object(model.model, "_check_no_placeholders")
        with unchecked, FlopCounterMode(display=False) as prefill:
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), logits_to_keep=1)
    return vision.get_total_flops() / 1e12, prefill.get_total_flops() / 1e12


class Clock:
    """Measures the time of calls, and the time of decoding steps that is spent in the model."""

    def __init__(self, model: MGLlavaForConditionalGeneration, device: str):
        self.is_cuda = device.startswith("cuda")
        self.seconds_in_model = 0.0
        self._started = 0.0
        # `generate` calls these immediately before and after the model in every step, compiled or not.
        prepare, update = model.prepare_inputs_for_generation, model._update_model_kwargs_for_generation
        self.is_on = False

        def prepare_and_start(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            if self.is_on:
                self._started = self.now()
            return prepared

        def stop_and_update(*args: Any, **kwargs: Any) -> Any:
            if self.is_on:
                self.seconds_in_model += self.now() - self._started
            return update(*args, **kwargs)

        model.prepare_inputs_for_generation = prepare_and_start
        model._update_model_kwargs_for_generation = stop_and_update

    def now(self) -> float:
        """Return the time when the device has finished its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def median(self, function: Callable[[], Any], repetitions: int) -> float:
        """Return the median time of a call, after a first one that is not counted."""
        seconds = []
        for _ in range(repetitions + 1):
            start = self.now()
            function()
            seconds.append(self.now() - start)
        return sorted(seconds[1:])[repetitions // 2]

    def in_model(self, answer: Callable[[int], Any], tokens: int) -> float:
        """Return the time in the model over one answer, in which every step waits for the device."""
        self.seconds_in_model, self.is_on = 0.0, True
        answer(tokens)
        self.is_on = False
        return self.seconds_in_model


@torch.inference_mode()
def measure(preset: str, weights: str, batches: list[int], modes: list[str], steps: int, device: str) -> list[dict]:
    """Return one row of measured values for each mode and batch size."""
    logging.set_verbosity_error()
    config = make_config(preset)
    model = make_model(config, weights, device)
    gc.collect()
    clock = Clock(model, device)
    repetitions = 5 if clock.is_cuda else 2
    eager_vision = model.model.encode_images
    rows = []
    for mode in modes:
        for batch_size in batches:
            is_compiled = mode == "compiled"
            torch.compiler.reset()
            # Compiling the vision towers takes minutes, so it is done only for the smallest batch.
            compiles_vision = is_compiled and batch_size == min(batches)
            # transformers compiles decoding on accelerators, unless the quantization method rules it out.
            quantizer = getattr(model, "hf_quantizer", None)
            compiles_decoding = is_compiled and clock.is_cuda and (quantizer is None or quantizer.is_compileable)
            parts = [("vision", compiles_vision), ("decoding", compiles_decoding)]
            model.model.encode_images = eager_vision
            if compiles_vision:
                model.model.encode_images = torch.compile(eager_vision, fullgraph=True)
            inputs = make_inputs(config, batch_size, device)
            images = [inputs[name] for name in ("pixel_values", "boxes", "num_boxes")]
            prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            if is_compiled:
                length = inputs["input_ids"].shape[1] + steps + 1
                options |= {"cache_implementation": "static", "max_cache_len": -(-length // 128) * 128}

            def answer(tokens, inputs=inputs, options=options):
                return model.generate(**inputs, **options, max_new_tokens=tokens)

            def prefill(features, prompt=prompt):
                return model(**prompt, mm_encoder_outputs={"image": features}, logits_to_keep=1).logits.argmax(-1)

            gc.collect()
            if clock.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            answer(4)  # compiles
            features = model.get_image_features(*images, return_dict=True)
            first_token = clock.median(lambda answer=answer: answer(1), repetitions)
            whole = clock.median(lambda answer=answer: answer(1 + steps), 2)
            rows.append(
                {
                    "weights": weights,
                    "compiled": ", ".join(name for name, is_on in parts if is_on) or "nothing",
                    "batch": batch_size,
                    "weights GB": sum(_stored_bytes(p) for p in model.parameters()) / 1e9,
                    "peak GB": torch.cuda.max_memory_allocated() / 1e9 if clock.is_cuda else None,
                    "vision ms": 1e3 * clock.median(lambda i=images: model.get_image_features(*i), repetitions),
                    "prefill ms": 1e3 * clock.median(lambda p=prefill, f=features: p(f), repetitions),
                    "first token ms": 1e3 * first_token,
                    "step ms": 1e3 * (whole - first_token) / steps,
                    "model ms": 1e3 * (clock.in_model(answer, 1 + steps) - clock.in_model(answer, 1)) / steps,
                    "GB per step": weight_bytes(model) / 1e9,
                }
            )
            # If the time limit ends this process, the rows so far are in its output.
            print(json.dumps(rows[-1]), flush=True)
    return rows


def judge(row: dict, bandwidth: float | None, rate: float | None, flops: tuple[float, float]) -> dict:
    """Add the values that follow from the measured ones: tokens per second, the roofline, and the limiting factor."""
    vision, prefill, step = row["vision ms"] / 1e3, row["prefill ms"] / 1e3, row["step ms"] / 1e3
    row = {**row, "tokens/s": row["batch"] / step}
    if bandwidth is None or rate is None:
        return row
    vision_flops, prefill_flops = (row["batch"] * each for each in flops)
    roofline = row["batch"] * bandwidth * 1e3 / row["GB per step"]
    vision_share, prefill_share = vision_flops / vision / rate, prefill_flops / prefill / rate
    slower = "vision" if vision > prefill else "prefill"
    is_busy = (vision_share if slower == "vision" else prefill_share) >= NEAR_ROOFLINE
    if row["tokens/s"] >= NEAR_ROOFLINE * roofline:
        limit = "reading weights"
    elif row["model ms"] < NEAR_ROOFLINE * row["step ms"]:
        limit = "the loop of generate"
    else:
        limit = "kernels and their launches"
    return {
        **row,
        "roofline tokens/s": roofline,
        "of roofline": row["tokens/s"] / roofline,
        "vision of peak": vision_share,
        "prefill of peak": prefill_share,
        "first token limited by": f"{slower}, {'arithmetic' if is_busy else 'kernels and their launches'}",
        "tokens/s limited by": limit,
    }


def main(
    preset: Annotated[Literal["7b", "tiny"], typer.Option(help="shape of the model")] = "7b",
    device: Annotated[str, typer.Option(help="where to run")] = "cuda",
    weights: Annotated[list[str], typer.Option(help="how the language model is stored")] = list(WEIGHTS[:3]),  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="eager, compiled")] = ["eager", "compiled"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="prompts at a time")] = [1, 8],  # noqa: B006
    steps: Annotated[int, typer.Option(help="tokens to decode")] = 128,
    bandwidth: Annotated[float | None, typer.Option(help="TB/s; by default from the data sheet")] = None,
    rate: Annotated[float | None, typer.Option(help="dense bf16 TFLOP/s; by default from the data sheet")] = None,
) -> None:
    """Measure every combination, and print and store the table."""
    if unknown := sorted({*weights} - {*WEIGHTS}):
        raise typer.BadParameter(f"`--weights` must be among {', '.join(WEIGHTS)}, got {', '.join(unknown)}.")
    if unknown := sorted({*mode} - {"eager", "compiled"}):
        raise typer.BadParameter(f"`--mode` must be eager or compiled, got {', '.join(unknown)}.")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    known = next((key for key in DEVICES if key in name), None)
    data_sheet = DEVICES[known] if known else (None, None)
    flops = count_flops(make_config(preset))
    rows = []
    for each in weights:
        measured = run_alone(measure, preset, each, batch, mode, steps, device)
        rows += [judge(row, bandwidth or data_sheet[0], rate or data_sheet[1], flops) for row in measured]
    suffix = (known or name).lower().replace(" ", "_")
    label = suffix if preset == "7b" else f"{preset}_{suffix}"
    title = f"MG-LLaVA {preset} on {name}: 1 image, {BOXES} boxes, {TEXT_TOKENS} text tokens, {steps} tokens answered"
    os.environ.setdefault("COLUMNS", "320")  # more columns than a terminal has
    report(f"generation_{label}", title, rows)


if __name__ == "__main__":
    typer.run(main)
