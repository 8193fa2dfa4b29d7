"""Tensors that stay in their files until they are wanted."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .restricted_pickle import load_without_code, refusal


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read by `load`.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its dtype.
        origin (`str`): Where the values come from and what is done to them, for reports and digests.
        load (`Callable[[], torch.Tensor]`): Gives the values. They may lie in a memory-mapped file: read only.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """Cast floating-point values to another dtype.

        Args:
            dtype (`torch.dtype`): The dtype wanted.

        Returns:
            `LazyTensor`: Itself if there is nothing to cast.
        """
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, f"{self.origin} as {dtype}", lambda: self.load().to(dtype))


def from_tensor(tensor: torch.Tensor, origin: str) -> LazyTensor:
    """Wrap a tensor, usually a memory-mapped one.

    Args:
        tensor (`torch.Tensor`): The tensor.
        origin (`str`): Where it comes from.

    Returns:
        `LazyTensor`: The wrapped tensor.
    """
    return LazyTensor(tuple(tensor.shape), tensor.dtype, origin, lambda: tensor.detach())


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open a safetensors file.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, LazyTensor]`: Its tensors.

    Raises:
        ConversionError: If the file is truncated or no safetensors file.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        # `safe_open` maps the file; its tensors cost address space, not memory.
        return {name: from_tensor(file.get_tensor(name), f"{path.name}:{name}") for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} cannot be read as a safetensors file ({error}). Is it truncated? Fetch it again."
        ) from error


def open_torch_file(path: Path, trust_pickle: bool = False, inert_modules: tuple[str, ...] = ()) -> Any:
    """Open a file of `torch.save` with its tensors left on disk.

    Args:
        path (`Path`): The file.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read a file that names foreign classes. Their objects
            become placeholders even then.
        inert_modules (`tuple[str, ...]`, *optional*): Packages whose objects become placeholders without being asked.

    Returns:
        `Any`: What was saved.

    Raises:
        ConversionError: If the file is truncated, no torch file, or holds pickled objects and is not trusted.
    """
    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    with path.open("rb") as file:
        mmap = file.read(2) == b"PK"
    try:
        if trust_pickle or inert_modules:
            return load_without_code(path, lambda name: trust_pickle or name.split(".")[0] in inert_modules, mmap=mmap)
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except UnpicklingError as error:
        names = _foreign_globals(path)
        if names:
            raise ConversionError(refusal(path, names)) from error
        raise ConversionError(f"{path} cannot be read as a torch file ({error}).") from error
    except ConversionError:
        raise
    except Exception as error:  # torch reports damaged files with a dozen types
        raise ConversionError(
            f"{path} cannot be read as a torch file ({error}). Is it truncated? Fetch it again."
        ) from error


def _foreign_globals(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return ["objects that `torch.load(weights_only=True)` does not allow"]
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def tensors_of(state: Any, path: Path) -> dict[str, LazyTensor]:
    """Wrap a state dict.

    Args:
        state (`Any`): What a torch file holds.
        path (`Path`): That file.

    Returns:
        `dict[str, LazyTensor]`: Its tensors.

    Raises:
        ConversionError: If it is no mapping from names to tensors.
    """
    if not isinstance(state, dict) or not state:
        raise ConversionError(f"{path} must hold a state dict (names and tensors), got {type(state).__name__}.")
    others = {name: type(value).__name__ for name, value in state.items() if not isinstance(value, torch.Tensor)}
    if others:
        raise ConversionError(f"{path} must hold a state dict (names and tensors), got also {_some(others.items())}.")
    return {name: from_tensor(value, f"{path.name}:{name}") for name, value in state.items()}


def open_weights(folder: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Open the weights of a transformers repository, in one file or in shards, safetensors first.

    Args:
        folder (`Path`): The repository on disk.

    Returns:
        `tuple[dict[str, LazyTensor], list[Path]]`: All tensors, and the files they come from.

    Raises:
        ConversionError: If there are no weights, or a shard or a tensor that the index names is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index_path = folder / f"{name}.index.json"
        if index_path.is_file():
            return _open_shards(index_path)
        if (folder / name).is_file():
            return _open_weight_file(folder / name), [folder / name]
    raise ConversionError(
        f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or their shards with an index; "
        f"it holds {_some(sorted(path.name for path in folder.iterdir()))}."
    )


def _open_shards(index_path: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    files = [index_path.parent / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise ConversionError(f"{index_path} names shards that are not there: {_some(absent)}. Fetch them again.")
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        tensors.update(_open_weight_file(path))
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise ConversionError(f"{index_path} names {len(lost)} tensors that its shards lack: {_some(lost)}.")
    return tensors, files


def _open_weight_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return tensors_of(open_torch_file(path), path)


def sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path (`Path`): The file.
        on_bytes (`Callable[[int], None]`): Told how many bytes were read, again and again.

    Returns:
        `str`: The digest in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def _some(items: Iterable[Any], limit: int = 10) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


__all__ = ["LazyTensor", "from_tensor", "open_safetensors", "open_torch_file", "open_weights", "sha256", "tensors_of"]
