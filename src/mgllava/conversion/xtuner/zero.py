"""DeepSpeed ZeRO folders, consolidated with deepspeed's reader."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mgllava.extras import install_hint
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.shard_writer import check_disk_space
from mgllava.model_files.tensor_files import tensors_of
from mgllava.model_files.torch_files import materialize, open_torch_file

# Every file has pickled objects of deepspeed (loss scalers, address tables), which are skipped.
_INERT_MODULES = ("deepspeed",)


def find_zero_folder(path: Path) -> Path:
    """Find the folder with deepspeed's files: the folder given, or the one that its `latest` file names."""
    if any(path.glob("*_model_states.pt")):
        return path
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:1000].decode("utf-8", "replace").strip()
        # The file comes with the checkpoint: it must not lead out of it.
        if not tag or Path(tag).name != tag or tag == ".." or not tag.isprintable():
            raise ConversionError(f"{latest} must name a folder next to it, got {tag[:100]!r}.")
        if any((path / tag).glob("*_model_states.pt")):
            return path / tag
        raise ConversionError(f"{latest} names {path / tag}, which holds no *_model_states.pt.")
    raise ConversionError(
        f"{path} is not a DeepSpeed checkpoint: expected *_model_states.pt in it, or a file `latest` that names the "
        f"folder with them. It holds {sorted(entry.name for entry in path.iterdir())[:10]}."
    )


def open_zero_folder(
    path: Path, trust_pickle: bool, scratch: Path | None
) -> tuple[dict[str, LazyTensor], dict[str, Any], list[Path]]:
    """Return the tensors (float32 if they were trained), `meta` and files of a checkpoint of any ZeRO stage."""
    folder = find_zero_folder(path)
    model_files = sorted(folder.glob("*_model_states.pt"))
    optimizer_files = sorted(folder.glob("*_optim_states.pt"))
    first = open_torch_file(model_files[0], trust_pickle, _INERT_MODULES)
    if not isinstance(first, dict):
        raise ConversionError(f"{model_files[0]} must hold a dict, as DeepSpeed writes, got {type(first).__name__}.")
    meta = meta_of(first, model_files[0])
    if not optimizer_files:
        # Without optimizer states the model file holds all weights, unless stage 3 partitioned them.
        if model_files[0].name != "mp_rank_00_model_states.pt":
            raise ConversionError(
                f"{folder} is a ZeRO stage 3 checkpoint without its *_optim_states.pt, which hold the weights."
            )
        return tensors_of(first.get("module"), model_files[0]), meta, model_files[:1]
    archives: list[Any] = []
    state = _consolidate(folder, trust_pickle, scratch, archives)
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(getattr(value, "dtype", None), torch.dtype):
            raise ConversionError(f"{folder} must hold names and tensors, got {name!r} ({type(value).__name__}).")
        load = partial(_load, value, archives)
        tensors[name] = LazyTensor(tuple(value.shape), value.dtype, f"{folder.name}:{name}", load)
    return tensors, meta, model_files + optimizer_files


def _load(value: Any, archives: Sequence[Any]) -> torch.Tensor:
    """Read a tensor, after all files are verified: its parts may be in any of them."""
    for archive in archives:
        archive.verify()
    tensor: torch.Tensor = value.contiguous()
    return tensor


def meta_of(content: dict[Any, Any], path: Path) -> dict[str, Any]:
    """Return the `meta` that XTuner's runner stored; empty if there is none."""
    meta = content.get("meta")
    if meta is None:
        return {}
    if not isinstance(meta, dict) or not all(isinstance(key, str) for key in meta):
        found = type(meta).__name__ + (" with other keys" if isinstance(meta, dict) else "")
        raise ConversionError(f"`meta` of {path} must be a dict with text for keys, got a {found}.")
    return dict(meta)


def _consolidate(folder: Path, trust_pickle: bool, scratch: Path | None, archives: list[Any]) -> dict[str, Any]:
    try:
        from deepspeed.utils import zero_to_fp32
    except ImportError as error:
        raise ConversionError(
            f"{folder} is a DeepSpeed ZeRO checkpoint; reading it needs deepspeed. {install_hint('zero')}"
        ) from error
    try:
        # The reader prints messages and progress bars.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _frugal_torch(zero_to_fp32, trust_pickle, scratch, archives),
        ):
            state: dict[str, Any] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name, lazy_mode=True
            )
    except ConversionError:
        raise
    except Exception as error:  # damaged files cause errors of any type
        raise ConversionError(f"deepspeed cannot read the checkpoint in {folder}: {one_line(error)}") from error
    return state


@contextlib.contextmanager
def _frugal_torch(reader: Any, trust_pickle: bool, scratch: Path | None, archives: list[Any]) -> Iterator[None]:
    """Replace `torch` in deepspeed's reader, so that it runs no pickled code and joins partitions on disk.

    The reader calls `torch.load(weights_only=False)`, and for stages 1 and 2 it joins the partitions of all weights in
    memory (136 GB for 34B parameters).
    """

    class FrugalTorch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def load(self, path: str, **kwargs: Any) -> Any:
            return materialize(open_torch_file(Path(path), trust_pickle, _INERT_MODULES), archives)

        def cat(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
            return tensors[0] if len(tensors) == 1 else _join_on_disk(tensors, scratch)

    original = reader.torch
    reader.torch = FrugalTorch()
    try:
        yield
    finally:
        reader.torch = original


def _join_on_disk(tensors: Sequence[torch.Tensor], scratch: Path | None) -> torch.Tensor:
    """Concatenate flat tensors into a tensor that is mapped from an unnamed temporary file."""
    total = sum(tensor.numel() for tensor in tensors)
    dtype = tensors[0].dtype
    if not total:
        return torch.empty(0, dtype=dtype)
    # Writing to a mapped file on a full disk kills the process without a message.
    check_disk_space(scratch or Path(tempfile.gettempdir()), total * dtype.itemsize)
    handle, name = tempfile.mkstemp(prefix="mgllava-zero-", dir=scratch)
    os.close(handle)
    try:
        joined = torch.from_file(name, shared=True, size=total, dtype=dtype)
    finally:
        # The mapping keeps the contents until the tensor is freed; even a crash leaves no file.
        os.unlink(name)
    return torch.cat([tensor.flatten() for tensor in tensors], out=joined)


__all__ = ["find_zero_folder", "meta_of", "open_zero_folder"]
