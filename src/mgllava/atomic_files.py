"""Files that are there completely or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<name>.*)\.[0-9a-f]{8}\.partial", re.DOTALL)
# File systems allow 255 bytes for a name.
_MAX_NAME_BYTES = 200


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under another name, and rename it when it is complete and on the disk.

    The other name is hidden and random, so that neither a file of the user nor another run is in the way. A link is
    followed: the file that it leads to is replaced.
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
    """Return a new, hidden name in the folder of a file, for its content until it is complete."""
    return path.with_name(f".{_start(path.name)}.{uuid.uuid4().hex[:8]}.partial")


def is_partial(name: str) -> bool:
    """Tell whether a name is one that [`replacing`] writes to."""
    return _PARTIAL.fullmatch(name) is not None


def remove_partial(path: Path) -> None:
    """Remove what runs that were killed left of a file. Only the holder of a lock on the file may call this."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        match = _PARTIAL.fullmatch(entry.name)
        if match is not None and match["name"] == _start(path.name) and entry.is_file():
            entry.unlink(missing_ok=True)


def _start(name: str) -> str:
    """Shorten a name so that an ending fits."""
    return os.fsencode(name)[:_MAX_NAME_BYTES].decode(errors="ignore")


__all__ = ["is_partial", "partial_name", "remove_partial", "replacing"]
