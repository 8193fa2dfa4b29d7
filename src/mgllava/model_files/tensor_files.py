"""Open weight files, with their tensors left on disk, and compute their digests."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .json_files import read_json
from .lazy_tensor import LazyTensor, from_tensor
from .torch_files import StoredTensor, open_torch_file, range_check


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open a safetensors file."""
    try:
        file: Any = safe_open(path, framework="pt")
        # The file is mapped: tensors take address space, not memory.
        return {name: from_tensor(file.get_tensor(name), f"{path.name}:{name}") for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} cannot be read as a safetensors file ({error}). Is it truncated? Fetch it again."
        ) from error


def tensors_of(state: Any, path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a state dict that was read from a torch file."""
    if not isinstance(state, dict) or not state:
        raise ConversionError(f"{path} must hold a state dict (names and tensors), got {type(state).__name__}.")
    others = {name: type(value).__name__ for name, value in state.items() if not isinstance(value, StoredTensor)}
    if others:
        raise ConversionError(f"{path} must hold a state dict (names and tensors), got also {_some(others.items())}.")
    keys = [name for name in state if not isinstance(name, str)]
    if keys:
        raise ConversionError(f"{path} must hold a state dict, whose names are text, got also {_some(keys)}.")
    return {name: value.lazy(f"{path.name}:{name}") for name, value in state.items()}


def open_weights(folder: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Return the tensors of a model folder and their files: safetensors if there are any, else pickled weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        # In the order of transformers.
        if (folder / name).is_file():
            return _open_weight_file(folder / name), [folder / name]
        index_path = folder / f"{name}.index.json"
        if index_path.is_file():
            return _open_shards(index_path)
    raise ConversionError(
        f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or their shards with an index; "
        f"it holds {_some(sorted(path.name for path in folder.iterdir()))}."
    )


def _open_shards(index_path: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index_path} must have a `weight_map` from names of tensors to files.")
    # The index may come from a stranger: it must not lead out of its folder.
    strange = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise ConversionError(f"{index_path} must name files next to it, got {_some(map(repr, strange))}.")
    files = [index_path.parent / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise ConversionError(f"{index_path} names shards that do not exist: {_some(absent)}. Fetch them again.")
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        opened = _open_weight_file(path)
        twice = sorted(opened.keys() & tensors.keys())
        if twice:
            raise ConversionError(f"{path} holds tensors that another shard also has: {_some(twice)}.")
        tensors.update(opened)
    lost = sorted(name for name in weight_map if name not in tensors)
    if lost:
        raise ConversionError(f"{index_path} names {len(lost)} tensors that its shards lack: {_some(lost)}.")
    return tensors, files


def _open_weight_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return tensors_of(open_torch_file(path), path)


def sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    """Compute the SHA-256 of a file; the checksums in an open torch file are verified along the way."""
    digest = hashlib.sha256()
    check = range_check(path)
    with path.open("rb") as file:
        position = 0
        while block := file.read(1 << 22):
            digest.update(block)
            if check is not None:
                check.update(block, position)
            position += len(block)
            on_bytes(len(block))
    if check is not None:
        check.finish()
    return digest.hexdigest()


def _some(items: Iterable[Any], limit: int = 10) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


__all__ = ["LazyTensor", "from_tensor", "open_safetensors", "open_torch_file", "open_weights", "sha256", "tensors_of"]
