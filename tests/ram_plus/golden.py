"""Access to the golden numbers of RAM++ under `tests/golden_ram`."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden_ram"
RAM = GOLDEN / "ram"
NUM_TAGS, NUM_DESCRIPTIONS = 20, 4

# Arguments to convert the golden checkpoint, except the output.
SOURCES = {
    "checkpoint": RAM / "ram_plus_tiny.pth",
    "tag_list": RAM / "data" / "ram_tag_list.txt",
    "thresholds": RAM / "data" / "ram_tag_list_threshold.txt",
    "swin_config": RAM / "configs" / "swin" / "config_swinL_384.json",
    "decoder_config": RAM / "configs" / "q2l_config.json",
}


@cache
def expected():
    return json.loads((GOLDEN / "expected" / "expected.json").read_text())


@cache
def arrays(name):
    with np.load(GOLDEN / "expected" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def image_path(index):
    return GOLDEN / expected()["single"][index]["image"]


def original_state():
    return torch.load(SOURCES["checkpoint"], weights_only=True)["model"]
