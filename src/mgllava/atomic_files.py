"""Atomic file writes."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<name>.*)\.[0-9a-f]{8}\.partial", re.DOTALL)
# File systems allow 255 bytes for a name; the rest is for the ending.
_MAX_NAME_BYTES = 200


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` once its content is on the disk.

    The temporary name is hidden and random, so that it is neither that of a user's file nor that of another run. If
    `path` is a symbolic link, its target is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """Return a new hidden path in the folder of a file, for incomplete content."""
    return path.with_name(f".{_start(path.name)}.{uuid.uuid4().hex[:8]}.partial")


def is_partial(name: str) -> bool:
    """Tell whether a name is that of an incomplete file of `partial_name`."""
    return _PARTIAL.fullmatch(name) is not None


def remove_partial(path: Path) -> None:
    """Remove the incomplete files that killed runs left for a path. Only the holder of its lock may call this."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        match = _PARTIAL.fullmatch(entry.name)
        if match is not None and match["name"] == _start(path.name) and entry.is_file():
            entry.unlink(missing_ok=True)


def _start(name: str) -> str:
    """Shorten a name, so that the name with the ending of `partial_name` is not too long."""
    return os.fsencode(name)[:_MAX_NAME_BYTES].decode(errors="ignore")


__all__ = ["is_partial", "partial_name", "remove_partial", "replacing"]
