"""Compare box pooling at real size: the separable form of `mgllava` with upsampling, RoI-align and mean.

Both get the same maps and boxes, each in a process of its own.
Usage: `python benchmarks/pooling.py [--device cuda]`.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from fresh_process import run_alone
from memory_watch import process_memory
from report import report
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import roi_align

from mgllava.modeling.vision_mgllava import pool_boxes

WIDTHS, SIDES, IMAGE_SIZE, POOLED_SIZE = (192, 384, 768, 1536), (192, 96, 48, 24), 768, 56
# The kernel updates its page counts with a delay, so smaller differences are reported as this.
CPU_RESOLUTION = 1_000_000


def reference(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Pool boxes the way the original does."""
    upsampled = [F.interpolate(level, size=SIDES[0], mode="bilinear", align_corners=False) for level in maps]
    grids = roi_align(torch.cat(upsampled, dim=1), list(boxes), POOLED_SIZE, SIDES[0] / IMAGE_SIZE)
    return grids.mean((2, 3))


def separable(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Pool boxes the way the model does."""
    return torch.cat(pool_boxes(maps, boxes, IMAGE_SIZE, POOLED_SIZE), dim=-1).flatten(0, 1)


def make_inputs(num_boxes: int, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw the same maps and boxes in every process."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, width, side, side, generator=generator).to(device)
        for width, side in zip(WIDTHS, SIDES, strict=True)
    ]
    corners = torch.randint(0, IMAGE_SIZE + 1, (num_boxes, 2, 2), generator=generator).float()
    return maps, torch.cat([corners.amin(1), corners.amax(1)], dim=-1).unsqueeze(0).to(device)


@torch.inference_mode()
def measure_seconds(method, num_boxes: int, device: str) -> tuple[float, np.ndarray]:
    """Return the seconds of the fastest of several runs, and the pooled features."""
    maps, boxes = make_inputs(num_boxes, device)
    result = method(maps, boxes)
    seconds = []
    for _ in range(3 if method is reference else 20):
        start = time.perf_counter()
        method(maps, boxes)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result.cpu().numpy()


@torch.inference_mode()
def measure_bytes(method, num_boxes: int, device: str) -> int:
    """Return the additional peak memory of one run."""
    maps, boxes = make_inputs(num_boxes, device)
    method([level[:, :8] for level in maps], boxes[:, :1])  # loads libraries and starts threads
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(maps, boxes)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_memory("VmRSS")
    method(maps, boxes)
    return max(process_memory("VmHWM") - before, CPU_RESOLUTION)


def run_without_heap_reuse(measure, *args):
    """Run a measurement in a process that gets every block from the system, so that the peak includes it."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    try:
        return run_alone(measure, *args)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"], os.environ["MALLOC_TRIM_THRESHOLD_"]


def main(device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu") -> None:
    """Compare time and extra peak memory at 1, 10 and 100 boxes."""
    rows = []
    for num_boxes in (1, 10, 100):
        slow, expected = run_alone(measure_seconds, reference, num_boxes, device)
        fast, pooled = run_alone(measure_seconds, separable, num_boxes, device)
        slow_bytes = run_without_heap_reuse(measure_bytes, reference, num_boxes, device)
        fast_bytes = run_without_heap_reuse(measure_bytes, separable, num_boxes, device)
        rows.append(
            {
                "boxes": num_boxes,
                "reference s": slow,
                "separable s": fast,
                "times faster": slow / fast,
                "reference MB": slow_bytes / 1e6,
                "separable MB": fast_bytes / 1e6,
                "times less memory": slow_bytes / fast_bytes,
                "max difference": float(abs(pooled - expected).max()),
            }
        )
    report(f"pooling_{device}", f"Box pooling at real size on {device}", rows)


if __name__ == "__main__":
    typer.run(main)
