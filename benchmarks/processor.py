"""Measure data preparation: images per second and core, from file to batch, compared with the speed of training.

A run reads a `ConversationDataset` with `MGLlavaDataCollator` in worker processes: they decode JPEG files, resize and
pad images to 768 px, filter and transform boxes from Parquet, tokenize conversations and build batches. Both backends
of the image processor are measured, torchvision's and PIL's, with one worker and with one for each core.

The speed of training is read from the results of `benchmarks/training.py` at real size, if there are any. 2 in the
column `times lora` means that the workers prepare twice as many images as that training uses.
Usage: `python benchmarks/processor.py [--workers 8]`.
"""

import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import PIL.Image
import torch
import typer
from fresh_process import run_alone
from report import RESULTS, report
from torch.utils.data import DataLoader, RandomSampler
from training_data import make_parts, open_data, start_workers_as_usual, write_data

from mgllava import MGLlavaImageProcessorPil
from mgllava.training import MGLlavaDataCollator

PHOTO_SIZES, PHOTOS, SAMPLES = ((640, 480), (1920, 1080)), 12, 240
BACKENDS = ("torchvision", "pil")
# Small, because a run counts only complete batches.
BATCH_SIZE = 4


def decoding_seconds(folder: Path) -> float:
    """Return the seconds that decoding alone takes for an image, on one core."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    start = time.perf_counter()
    for content in files:
        PIL.Image.open(io.BytesIO(content)).load()
    return (time.perf_counter() - start) / len(files)


def measure(folder: Path, backend: str, workers: list[int], seconds: float) -> tuple[float, list[float]]:
    """Return the seconds of decoding an image, and the images per second with each number of workers."""
    start_workers_as_usual()
    torch.set_num_threads(1)
    _, processor = make_parts("7b", "vicuna")
    if backend == "pil":
        given = processor.image_processor
        processor.image_processor = MGLlavaImageProcessorPil(size=given.size, crop_size=given.crop_size)
    data = open_data(folder, processor)
    collator = MGLlavaDataCollator(processor)
    speeds = []
    for count in workers:
        sampler = RandomSampler(data, replacement=True, num_samples=10**9, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(data, BATCH_SIZE, sampler=sampler, collate_fn=collator, num_workers=count)
        batches = iter(loader)
        # Wait until all workers have started and used up their lead.
        for _ in range(4 * count):
            next(batches)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += len(next(batches)["num_boxes"])
        speeds.append(images / (time.perf_counter() - start))
        del batches
    return decoding_seconds(folder / "images"), speeds


def needs() -> dict[str, float]:
    """Return the images per second of each row of `benchmarks/training.py` at real size, on the fastest GPU."""
    found: dict[str, float] = {}
    for path in sorted(RESULTS.glob("training_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if not row["shape"].startswith("tiny"):
                found[row["row"]] = max(row["images/s"], found.get(row["row"], 0.0))
    return found


def main(
    workers: Annotated[list[int] | None, typer.Option(help="processes; by default 1, and one per core")] = None,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 10,
) -> None:
    """Measure both backends on photographs of both sizes, and print and store the table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = sorted(set(workers or (1, cores)))
    if workers[0] < 1:
        raise typer.BadParameter(f"`--workers` must be at least 1, got {workers[0]}.")
    needed = needs()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for size in PHOTO_SIZES:
            name = f"{size[0]}x{size[1]}"
            data = Path(folder) / name
            file_size = write_data(data, [size], PHOTOS, SAMPLES)
            for backend in BACKENDS:
                decoding, speeds = run_alone(measure, data, backend, workers, seconds)
                rows += [
                    {
                        "photographs": name,
                        "KB": file_size / 1e3,
                        "backend": backend,
                        "workers": count,
                        "images/s": speed,
                        "images/s per core": speed / min(count, cores),
                        "decoding ms": 1e3 * decoding,
                        **{f"times {row}": speed / images for row, images in needed.items()},
                    }
                    for count, speed in zip(workers, speeds, strict=True)
                ]
    title = f"Images through the processor, {cores} cores"
    if needed:
        title += "; training needs " + ", ".join(f"{images:.3g}/s ({row})" for row, images in needed.items())
    report("processor", title, rows)


if __name__ == "__main__":
    typer.run(main)
