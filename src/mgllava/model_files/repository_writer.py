"""What both converters do once they know where every tensor comes from: check, write, report."""

import datetime
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .json_files import write_json
from .shard_writer import ShardPlan, write_shard
from .staging import StagingFolder
from .tensor_files import LazyTensor, sha256

REPORT_NAME = "conversion_report.json"
# Small enough to convert, resume and load on modest machines; transformers' own 50 GB suits only large ones.
DEFAULT_SHARD_SIZE = "5GB"

# Told the name of a stage, the bytes that were just done and the bytes of the whole stage.
Progress = Callable[[str, int, int], None]

_SAMPLES = 10

# Weights of a model. Whole numbers and 8-bit floats are packed weights of a quantizer, and no values by themselves.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Check the dtype that a user asks for.

    Args:
        dtype (`str` or `torch.dtype`): The dtype, or `"auto"`.

    Returns:
        `torch.dtype`, *optional*: The dtype; `None` for `"auto"`.

    Raises:
        ConversionError: If it is not one of float32, float16 and bfloat16.
    """
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ConversionError(f"`dtype` must be auto, {', '.join(_DTYPES)}, got {dtype}.")
    return found


def match_tensors(
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, tuple[int, ...]],
    unexpected: Sequence[str],
    problem: str,
) -> dict[str, LazyTensor]:
    """Check that sources and model match name by name and shape by shape.

    Args:
        tensors (`Mapping[str, LazyTensor]`): What the sources have, by the model's names.
        expected (`Mapping[str, tuple[int, ...]]`): Shapes of the model's tensors.
        unexpected (`Sequence[str]`): What the sources have that could not be named.
        problem (`str`): Start of the error message.

    Returns:
        `dict[str, LazyTensor]`: The tensors in the model's order.

    Raises:
        ConversionError: If anything is missing, left over, of another shape, or not of a dtype of weights; with
            counts and samples.
    """
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected = [
        *unexpected,
        *(f"{name} {tensor.shape} from {tensor.origin}" for name, tensor in tensors.items() if name not in expected),
    ]
    wrong = [
        f"{name}: expected {shape}, got {tensors[name].shape} from {tensors[name].origin}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    packed = [
        f"{name}: expected {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOAT_DTYPES)}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} from {tensor.origin}"
        for name, tensor in tensors.items()
        if name in expected and tensor.dtype not in FLOAT_DTYPES
    ]
    if missing or unexpected or wrong or packed:
        lists = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong, "wrong dtype": packed}
        raise ConversionError(problem + "".join(_listed(title, items) for title, items in lists.items()))
    return {name: tensors[name] for name in expected}


def _listed(title: str, items: Sequence[str]) -> str:
    more = f"\n  and {len(items) - _SAMPLES} more" if len(items) > _SAMPLES else ""
    if not items and title == "wrong dtype":
        return ""
    return f"\n{title}: {len(items)}" + "".join(f"\n  {item}" for item in items[:_SAMPLES]) + more


def digest_sources(
    sources: Mapping[str, Sequence[Path]], staging: StagingFolder, progress: Progress
) -> dict[str, str]:
    """Compute the SHA-256 of every source file, and compare the checksums in it, if it has any.

    Args:
        sources (`Mapping[str, Sequence[Path]]`): Files of each source.
        staging (`StagingFolder`): What is to be written.
        progress (`Progress`): Told how far it is.

    Returns:
        `dict[str, str]`: Digests in hexadecimal, by path.

    Raises:
        ConversionError: If a source lies in the output, which may be replaced, or is damaged.
    """
    files = list(dict.fromkeys(path for paths in sources.values() for path in paths))
    for path in files:
        for folder in (staging.output, staging.path):
            if path.resolve().is_relative_to(folder):
                raise ConversionError(f"{path} lies in {folder}, which would be replaced. Choose another --output.")
    total = sum(path.stat().st_size for path in files)
    return {str(path): sha256(path, lambda done: progress("reading sources", done, total)) for path in files}


def write_weights(
    staging: StagingFolder, plan: ShardPlan, source_digests: Mapping[str, str], progress: Progress
) -> None:
    """Write all shards but those that an interrupted run finished, and the index.

    Args:
        staging (`StagingFolder`): Where.
        plan (`ShardPlan`): What.
        source_digests (`Mapping[str, str]`): Digests of the sources; with others, nothing of an earlier run is kept.
        progress (`Progress`): Told how far it is.

    Raises:
        ConversionError: If the disk has too little room, or a tensor is not as planned.
    """
    # Digests by content, so that sources may have moved between two runs.
    contents = {f"{number}": digest for number, digest in enumerate(sorted(source_digests.values()))}
    done = staging.keep_finished({shard.filename: shard.digest(contents) for shard in plan.shards}, plan.shards)
    total = sum(shard.size for shard in plan.shards)
    staging.check_space(sum(shard.size for shard in plan.shards if shard.filename not in done))
    for shard in plan.shards:
        if shard.filename in done:
            progress("writing weights", shard.size, total)
        else:
            write_shard(shard, staging.path, lambda count: progress("writing weights", count, total))
    if plan.index is not None:
        write_json(staging.path / "model.safetensors.index.json", plan.index)


def describe_run(
    given: Mapping[str, Any],
    packages: Iterable[str],
    sources: Mapping[str, Sequence[Path]],
    digests: Mapping[str, str],
    tensors: Mapping[str, LazyTensor],
    plan: ShardPlan,
) -> dict[str, Any]:
    """Start a report with what came from where.

    Args:
        given (`Mapping[str, Any]`): The user's arguments.
        packages (`Iterable[str]`): Packages whose versions matter.
        sources (`Mapping[str, Sequence[Path]]`): Files of each source.
        digests (`Mapping[str, str]`): Their digests, by path.
        tensors (`Mapping[str, LazyTensor]`): What was written.
        plan (`ShardPlan`): The files written.

    Returns:
        `dict[str, Any]`: Plain values.
    """
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: value if value is None else str(value) for name, value in given.items()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "sources": {
            source: [{"file": str(path), "bytes": path.stat().st_size, "sha256": digests[str(path)]} for path in files]
            for source, files in sources.items()
        },
        "files": {shard.filename: shard.size for shard in plan.shards},
        "tensors": {
            name: {"from": tensor.origin, "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in tensors.items()
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__all__ = [
    "DEFAULT_SHARD_SIZE",
    "FLOAT_DTYPES",
    "REPORT_NAME",
    "Progress",
    "check_dtype",
    "describe_run",
    "digest_sources",
    "match_tensors",
    "write_weights",
]
