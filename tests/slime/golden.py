"""Access to the original's numbers under `tests/golden_slime` (see the README there)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden_slime"

# The original's placeholder, and the number of words of its tokenizer.
REFERENCE_IMAGE_ID, VOCAB_SIZE = -200, 300
NUM_GLOBAL, NUM_LOCAL = 576, 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@cache
def load_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def cases():
    """All cases by name; the further ones have their files under `more`."""
    found = {case["name"]: {**case, "folder": GOLDEN} for case in load_json("cases")["cases"]}
    more = {case["name"]: {**case, "folder": GOLDEN / "more"} for case in load_json("more/cases")["cases"]}
    return found | more


def tensors(case):
    return load_file(case["folder"] / case["tensors"])


def image_path(case, name=None):
    path = case["folder"] / (name or case["image"])
    return path if path.is_file() else GOLDEN / (name or case["image"])


def normalized_views(path):
    """The stored views of an image, which are one above the other, as `pixel_values`."""
    views = torch.from_numpy(np.array(Image.open(path))).unflatten(0, (-1, 336)).permute(0, 3, 1, 2)
    return (views.float() / 255 - MEAN) / STD


def num_placeholders(rows, columns):
    return NUM_GLOBAL + (1 + rows * columns * NUM_LOCAL if rows else 0)


def expand(ids, lengths, image_id):
    """Replace the original's placeholder by those of each image."""
    lengths, expanded = iter(lengths), []
    for token in ids:
        expanded += [image_id] * next(lengths) if token == REFERENCE_IMAGE_ID else [token]
    return expanded
