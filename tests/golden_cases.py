"""Access to the original's numbers under `tests/golden` (see the README there)."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

# The original's placeholder, and the id that the converter gives it here: the first behind the 420 words.
REFERENCE_IMAGE_ID, IMAGE_ID, VOCAB_SIZE = -200, 420, 420
NUM_FUSED_TOKENS = 576


@cache
def load_json(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def cases(kind: str) -> list[dict]:
    return [case for case in load_json("cases")["cases"] if case["kind"] == kind]


def case(name: str) -> dict:
    return next(case for case in load_json("cases")["cases"] if case["name"] == name)


def load_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def expand_placeholders(ids: list[int], num_boxes: int, fill: int = IMAGE_ID) -> list[int]:
    """Replace the original's one placeholder by as many as the image has embeddings."""
    position = ids.index(REFERENCE_IMAGE_ID)
    return ids[:position] + [fill] * (NUM_FUSED_TOKENS + num_boxes) + ids[position + 1 :]
