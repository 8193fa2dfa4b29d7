"""Data of the training benchmarks: generated photographs as JPEG, conversations as LLaVA's JSON, boxes as Parquet.

The photographs are noise of about equal strength in every octave but the finest, like those of a camera: their files
have about the same size and decoding time. The size is reported. The small tokenizer in `tests/golden` makes more
tokens of a word than the tokenizer of a real language model.
"""

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_models import make_config

from mgllava import MGLlavaConfig, MGLlavaProcessor
from mgllava.box_files import write_boxes
from mgllava.conversion.xtuner.processor import make_processor
from mgllava.model_files.vocabulary import load_tokenizer
from mgllava.processing.text_chunks_common import IMAGE_TOKEN
from mgllava.training import ConversationDataset, open_source

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "llm"
QUALITY = 90
MAX_TURNS, QUESTION_WORDS, ANSWER_WORDS, MAX_BOXES = 4, (5, 15), (3, 40), 25
WORDS = ["cup", "spoon", "table", "window", "person", "dog", "street", "the", "a", "three"]
WORDS += ["red", "green", "small", "is", "are", "lies", "beside", "behind", "under", "left"]
LABELS = ("person", "cup", "table", "dog", "bicycle", "tree", "sign", "window", "chair", "bottle", "car", "book")
# Standard deviations, in 8-bit levels.
_CONTRAST, _COLOR, _FINEST = 22, 10, 6


def draw_photo(size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """Draw noise of all octaves; the finer ones have no color, as in photographs."""
    width, height = size
    pixels = np.full((height, width, 3), 118, dtype=np.float32)

    def add(cell: int, strength: float, channels: slice | int) -> None:
        noise = generator.normal(scale=strength, size=(height // cell + 2, width // cell + 2)).astype(np.float32)
        layer = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
        pixels[..., channels] += layer if isinstance(channels, int) else layer[..., None]

    cell = 1
    while cell < max(size):
        add(cell, _FINEST if cell == 1 else _CONTRAST, slice(None))
        if cell >= 8:
            for channel in range(3):
                add(cell, _COLOR, channel)
        cell *= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_data(folder: Path, sizes: Sequence[tuple[int, int]], num_photos: int, num_samples: int) -> float:
    """Write `samples.json`, `images/` and `boxes.parquet`, and return the mean size of an image file in bytes.

    Photographs have the `sizes` (width, height) in turn. Samples share photographs, but each has its own boxes.
    """
    generator = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(num_photos):
        draw_photo(sizes[number % len(sizes)], generator).save(images / f"{number}.jpg", quality=QUALITY)
    samples: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for number in range(num_samples):
        photo = number % num_photos
        width, height = sizes[photo % len(sizes)]
        turns = []
        for turn in range(generator.integers(1, MAX_TURNS + 1)):
            question = " ".join(generator.choice(WORDS, generator.integers(*QUESTION_WORDS)))
            answer = " ".join(generator.choice(WORDS, generator.integers(*ANSWER_WORDS)))
            turns += [
                {"from": "human", "value": question if turn else f"{IMAGE_TOKEN}\n{question}"},
                {"from": "gpt", "value": answer},
            ]
        samples.append({"id": f"sample-{number}", "image": f"{photo}.jpg", "conversations": turns})
        count = int(generator.integers(MAX_BOXES + 1))
        corners = np.sort(generator.integers(0, (width, height), size=(count, 2, 2)), axis=1).reshape(count, 4)
        records.append(
            {
                "id": f"sample-{number}",
                "image": f"{photo}.jpg",
                "width": width,
                "height": height,
                "boxes": corners.tolist(),
                "labels": [str(label) for label in generator.choice(LABELS, count)],
                "scores": generator.uniform(0.2, 1, count).tolist(),
            }
        )
    (folder / "samples.json").write_text(json.dumps(samples))
    write_boxes(folder / "boxes.parquet", records)
    return sum(path.stat().st_size for path in images.iterdir()) / num_photos


def start_workers_as_usual() -> None:
    """Reset the start method in a spawned process, so that it starts DataLoader workers like `mgllava train` does.

    On Linux they are forked (Python up to 3.13); spawned ones would import everything again.
    """
    multiprocessing.set_start_method(None, force=True)


def open_data(folder: Path, processor: MGLlavaProcessor) -> ConversationDataset:
    """Open the data of [`write_data`] like `mgllava train` does."""
    source = open_source(folder / "samples.json", folder / "images", folder / "boxes.parquet")
    return ConversationDataset([source], processor)


def make_parts(preset: str, prompt_template: str) -> tuple[MGLlavaConfig, MGLlavaProcessor]:
    """Return the configuration and the processor of a model."""
    tokenizer = load_tokenizer(TOKENIZER)
    config = make_config(preset, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return config, make_processor(config, tokenizer, {}, prompt_template)
