"""Weight shards: safetensors files that are planned first and written one tensor at a time."""

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from mgllava.atomic_files import replacing

from .errors import ConversionError
from .lazy_tensor import LazyTensor

# Called with the name of a stage, the bytes just done and the bytes of the whole stage.
Progress = Callable[[str, int, int], None]

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_UNITS = {"K": 3, "M": 6, "G": 9, "T": 12}


@dataclass(frozen=True)
class Shard:
    """A weight shard that is to be written: its name, its tensors in order, and the bytes before their values."""

    filename: str
    tensors: dict[str, LazyTensor]
    header: bytes

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def digest(self, source_digests: Mapping[str, str]) -> str:
        """Identify the contents before they exist: layout, origin of every value, digests of the sources."""
        origins = {name: tensor.origin for name, tensor in self.tensors.items()}
        plan = json.dumps([self.header.decode("latin-1"), origins, sorted(source_digests.items())])
        return hashlib.sha256(plan.encode()).hexdigest()


@dataclass(frozen=True)
class ShardPlan:
    """The weight shards of a model, and the contents of their index; `None` if one file holds all tensors."""

    shards: list[Shard]
    index: dict[str, Any] | None


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_size: str | int) -> ShardPlan:
    """Distribute tensors over files, as transformers does."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ConversionError(f"{name} has dtype {tensor.dtype}, expected one of {list(_DTYPE_NAMES)}.")
    size = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?) ?([KMGT])B", str(max_shard_size).strip(), re.IGNORECASE)
    is_number = type(max_shard_size) is int and max_shard_size > 0
    if not is_number and (size is None or float(size[1]) * 10 ** _UNITS[size[2].upper()] < 1):
        raise ConversionError(f"`max_shard_size` must be like 5GB or 500MB, got {max_shard_size}.")
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    shards = []
    for filename, names in split.filename_to_tensors.items():
        # Widest dtype first, so that every tensor is aligned to its item size.
        names = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
        chosen = {name: tensors[name] for name in names}
        shards.append(Shard(filename, chosen, _header(chosen)))
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return ShardPlan(shards, index)


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Build the start of a safetensors file: the header's length in 8 bytes, then the header in JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(shard: Shard, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Write one file, which gets its name when it is complete."""
    path = folder / shard.filename
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(shard.header)
        on_bytes(len(shard.header))
        for name, planned in shard.tensors.items():
            values = planned.load()
            if tuple(values.shape) != planned.shape or values.dtype != planned.dtype:
                raise ConversionError(
                    f"{name}: expected {planned.shape} {planned.dtype} from {planned.origin}, "
                    f"got {tuple(values.shape)} {values.dtype}."
                )
            data: Any = values.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(data))
            on_bytes(planned.nbytes)
            del values, data


def check_disk_space(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has enough space, in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"Not enough disk space in {folder}: {needed / 1e9:.1f} GB are to be written, "
            f"{free / 1e9:.1f} GB are free."
        )


__all__ = [
    "Progress",
    "Shard",
    "ShardPlan",
    "check_disk_space",
    "plan_shards",
    "write_shard",
]
