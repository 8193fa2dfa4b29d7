"""Pictures of a data set as tensors, prepared once, with everything that is known about their objects.

This is what the parts are trained on. The small model itself is trained on the files of the data set, as on real ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mgllava import MGLlavaImageProcessor
from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes

from .questions import describe
from .scenes import COLORS, DIGITS, LETTERS, MAX_OBJECTS, SHAPES, TEXTURES, make_scene

CHARACTERS = LETTERS + DIGITS
# What can be told of an object, and how many possibilities there are. Index 0 of the characters is "none".
ATTRIBUTES = {
    "shape": len(SHAPES),
    "color": len(COLORS),
    "texture": len(TEXTURES),
    "character": 1 + len(CHARACTERS),
}


class Pictures(Dataset):
    """Pictures and objects of one data set.

    Items have `pixel_values` (uint8, `(3, size, size)`), `boxes` (`(MAX_OBJECTS, 4)`: x1, y1, x2, y2 in pixels of that
    square, zero-padded), `attributes` (`(MAX_OBJECTS, 4)`: indices in the order of `ATTRIBUTES`, -1 for padding) and,
    with a tokenizer, `caption_ids`.

    Args:
        folder (`Path`): A data set of `small_world.dataset`. The prepared pixels are kept in it.
        image_size (`int`): Side of the square that the model sees, in pixels.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Encodes the captions.
    """

    def __init__(self, folder: Path, image_size: int, tokenizer: PreTrainedTokenizerBase | None = None):
        self.tokenizer = tokenizer
        records = read_boxes(folder / "boxes.json")
        self.scenes = [_scene_of(str(key)) for key in records]
        processor = MGLlavaImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            do_rescale=False,
            do_normalize=False,
        )
        cache = folder / f"pixels-{image_size}.npy"
        shape = (len(self.scenes), 3, image_size, image_size)
        if not cache.exists() or np.load(cache, mmap_mode="r").shape != shape:
            with replacing(cache) as partial:
                pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                for index, scene in enumerate(track(self.scenes, f"Preparing {folder}")):
                    path = folder / "images" / f"{scene.id.split('/')[1]:0>6}.jpg"
                    pixels[index] = processor(str(path), return_tensors="np")["pixel_values"][0]
                pixels.flush()
        self.pixels = np.load(cache, mmap_mode="r")
        self.boxes = np.zeros((len(self.scenes), MAX_OBJECTS, 4), dtype=np.float32)
        self.attributes = np.full((len(self.scenes), MAX_OBJECTS, len(ATTRIBUTES)), -1, dtype=np.int64)
        for index, (scene, record) in enumerate(zip(self.scenes, records.values(), strict=True)):
            scale = image_size / max(scene.width, scene.height)
            shift = [(max(scene.height - scene.width, 0)) // 2, (max(scene.width - scene.height, 0)) // 2] * 2
            count = len(scene.objects)
            self.boxes[index, :count] = (np.array(record["boxes"]) + shift) * scale
            self.attributes[index, :count] = [
                [
                    SHAPES.index(item.shape),
                    list(COLORS).index(item.color),
                    TEXTURES.index(item.texture),
                    CHARACTERS.index(item.character) + 1 if item.character else 0,
                ]
                for item in scene.objects
            ]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {
            "pixel_values": torch.from_numpy(self.pixels[index].copy()),
            "boxes": torch.from_numpy(self.boxes[index]),
            "attributes": torch.from_numpy(self.attributes[index]),
        }
        if self.tokenizer is not None:
            text = describe(self.scenes[index]) + self.tokenizer.eos_token
            item["caption_ids"] = torch.tensor(self.tokenizer(text, truncation=True, max_length=256)["input_ids"])
        return item


def _scene_of(scene_id: str) -> Any:
    split, number = scene_id.split("/")
    return make_scene(split, int(number))
