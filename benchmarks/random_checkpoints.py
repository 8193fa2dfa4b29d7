"""Checkpoints with random weights that are larger than the memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_BLOCK = 1 << 24


def save_random(path: Path, shapes: Mapping[str, Sequence[int]], scale: float = 1.0, **rest: Any) -> None:
    """Write a `.pth` file with random bfloat16 tensors of these shapes under `state_dict`, using little memory.

    Values repeat after 2**24. `rest` is saved as well; its `state_dict` is merged with the random tensors.
    """
    numels = [torch.Size(shape).numel() for shape in shapes.values()]
    raw = path.with_suffix(".raw")
    block = (scale * torch.randn(_BLOCK)).bfloat16().view(torch.uint8).numpy().data
    with raw.open("wb") as file:
        for _ in range(-(-sum(numels) // _BLOCK)):
            file.write(block)
    # The file is mapped into memory. Each tensor has its own part of the storage, so that only that part is saved.
    storage = torch.UntypedStorage.from_file(str(raw), shared=True, nbytes=raw.stat().st_size)
    state, start = {}, 0
    for (name, shape), numel in zip(shapes.items(), numels, strict=True):
        own = storage[2 * start : 2 * (start + numel)]
        state[name] = torch.empty(0, dtype=torch.bfloat16).set_(own, 0, tuple(shape))
        start += numel
    torch.save({**rest, "state_dict": {**state, **rest.get("state_dict", {})}}, path)
    raw.unlink()
