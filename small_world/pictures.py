"""Pictures of a data set as tensors, with the attributes of their objects, to train the parts.

The small model itself is trained on the files of the data set, like on real data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes

from .frames import Frame
from .questions import describe
from .scenes import COLORS, DIGITS, LETTERS, SHAPES, TEXTURES, SceneObject, make_scene

# Captions are truncated to this number of tokens.
CAPTION_LENGTH = 256
CHARACTERS = LETTERS + DIGITS
# The attributes of an object, with the number of their values. Value 0 of "character" means that there is none.
ATTRIBUTES = {"shape": len(SHAPES), "color": len(COLORS), "texture": len(TEXTURES), "character": 1 + len(CHARACTERS)}


class Pictures(Dataset):
    """Pictures and objects of a data set in the frame of the model that is trained; pixels are cached in the folder.

    Items have `pixel_values` (uint8, `(3, size, size)`), `boxes` (`(num_objects, 4)`: xyxy in pixels of the frame),
    `attributes` (see [`object_attributes`]) and, with a tokenizer, `caption_ids`.
    """

    def __init__(self, folder: Path, frame: Frame, tokenizer: PreTrainedTokenizerBase | None = None):
        self.tokenizer = tokenizer
        records = read_boxes(folder / "boxes.json")
        self.scenes = [_scene_of(str(key)) for key in records]
        cache = folder / f"pixels-{frame.name}-{frame.size}.npy"
        shape = (len(self.scenes), 3, frame.size, frame.size)
        if not cache.exists() or np.load(cache, mmap_mode="r").shape != shape:
            with replacing(cache) as partial:
                pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                for index, scene in enumerate(track(self.scenes, f"Preparing {folder}")):
                    with Image.open(folder / "images" / f"{scene.id.split('/')[1]:0>6}.jpg") as picture:
                        pixels[index] = frame.pixels(picture.convert("RGB"))
                pixels.flush()
        self.pixels = np.load(cache, mmap_mode="r")
        self.boxes, self.attributes = [], []
        for scene, record in zip(self.scenes, records.values(), strict=True):
            boxes = frame.boxes(np.array(record["boxes"]), scene.width, scene.height)
            self.boxes.append(torch.tensor(boxes, dtype=torch.float32))
            self.attributes.append(object_attributes(scene.objects))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.from_numpy(self.pixels[index].copy())
        item = {"pixel_values": pixels, "boxes": self.boxes[index], "attributes": self.attributes[index]}
        if self.tokenizer is not None:
            text = describe(self.scenes[index]) + self.tokenizer.eos_token
            encoded = self.tokenizer(text, truncation=True, max_length=CAPTION_LENGTH)
            item["caption_ids"] = torch.tensor(encoded["input_ids"])
        return item


def object_attributes(objects: Sequence[SceneObject]) -> torch.Tensor:
    """Return the values of the `ATTRIBUTES` of objects, of shape `(num_objects, 4)`."""
    return torch.tensor(
        [
            [
                SHAPES.index(item.shape),
                list(COLORS).index(item.color),
                TEXTURES.index(item.texture),
                CHARACTERS.index(item.character) + 1 if item.character else 0,
            ]
            for item in objects
        ]
    )


def _scene_of(scene_id: str) -> Any:
    split, number = scene_id.split("/")
    return make_scene(split, int(number))
