"""Box pooling at real size: the separable form of `mgllava` against upsampling, RoI-align and mean.

Both run in this one command, on the same maps and boxes, each in a process of its own so that peaks do not mix.
Usage: `python benchmarks/pooling.py [--device cuda]`.
"""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import report
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import roi_align

from mgllava.modeling.vision_mgllava import pool_boxes

WIDTHS, SIDES, IMAGE_SIZE, POOLED_SIZE = (192, 384, 768, 1536), (192, 96, 48, 24), 768, 56
# The kernel counts pages per thread and adds them up now and then: what is less than this counts as this much.
CPU_RESOLUTION = 1_000_000


def reference(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Pool boxes the way the original does."""
    upsampled = [F.interpolate(level, size=SIDES[0], mode="bilinear", align_corners=False) for level in maps]
    grids = roi_align(torch.cat(upsampled, dim=1), list(boxes), POOLED_SIZE, SIDES[0] / IMAGE_SIZE)
    return grids.mean((2, 3))


def separable(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Pool boxes the way the model does."""
    return torch.cat(pool_boxes(maps, boxes, IMAGE_SIZE, POOLED_SIZE), dim=-1).flatten(0, 1)


def _memory(key: str) -> int:
    """Read a line of the process status (`VmRSS`, `VmHWM`), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


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
def measure_seconds(method, num_boxes: int, device: str, connection) -> None:
    """Send the seconds of the best of several runs, and the result."""
    maps, boxes = make_inputs(num_boxes, device)
    result = method(maps, boxes)
    seconds = []
    for _ in range(3 if method is reference else 20):
        start = time.perf_counter()
        method(maps, boxes)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    connection.send((min(seconds), result.cpu().numpy()))


@torch.inference_mode()
def measure_bytes(method, num_boxes: int, device: str, connection) -> None:
    """Send the extra peak memory of one run."""
    maps, boxes = make_inputs(num_boxes, device)
    method([level[:, :8] for level in maps], boxes[:, :1])  # libraries loaded, threads started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(maps, boxes)
        connection.send(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = _memory("VmRSS")
        method(maps, boxes)
        connection.send(max(_memory("VmHWM") - before, CPU_RESOLUTION))


def run_alone(measure, *args):
    """Run a measurement in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(*args, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def run_without_heap_reuse(measure, *args):
    """Run a measurement in a fresh process whose blocks all come from the system, so that the peak counts them."""
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
