"""The progress of a job over many inputs, in a folder that stays consistent if the job is killed."""

import errno
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from mgllava.atomic_files import is_partial, replacing
from mgllava.model_files.json_files import try_read_json

from .box_file import describe_differences
from .errors import BoxFileError

_MANIFEST = "manifest.json"
_MANIFEST_KEYS = {"settings", "inputs_digest", "images", "shard_size"}
_OWN_FILES = re.compile(r"manifest\.json|shard-\d+\.jsonl(\.partial)?")
_Item = TypeVar("_Item")

# Processes wait for the slowest one. The default timeout of minutes would end a long job.
_TIMEOUT = timedelta(days=365)


def processes() -> Any:
    """Return the state of the processes that `accelerate launch` or `torchrun` started, also on CPUs."""
    # Imported here, because it is slow.
    from accelerate import PartialState

    # Without `cpu`, accelerate takes each of several processes on CPUs for the only one.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_TIMEOUT)


def read_ahead(items: Iterable[_Item], number: int) -> Iterator[_Item]:
    """Yield items after the next `number` of them have been read."""
    waiting: deque[_Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class Batch:
    """Results for consecutive images.

    Attributes:
        start: Index of the first image in the input.
        stop: Index after the last image.
        records: Records of the box file, in order.
        unreadable: For each image that could not be read: `ids`, `image`, `reason`.
    """

    start: int
    stop: int
    records: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)


class SliceFolder:
    """The folder `OUTPUT.shards` of a job: a manifest, and one file for each slice of the input.

    The file of a slice has one line per batch, which is written as soon as the batch is computed. A line that is
    incomplete, because of a kill or a full disk, is removed when the slice is resumed. A file without `.partial` in
    its name was complete when it got its name.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(output.name + ".shards")
        self.manifest: dict[str, Any] | None = None
        self._finished = self.path.with_name(self.path.name + ".finished")

    def read_manifest(self) -> dict[str, Any] | None:
        """Read the manifest (`settings`, `inputs_digest`, `images` and `shard_size`); `None` if there is none."""
        self.manifest = _read_manifest(self.path)
        return self.manifest

    def has_begun(self) -> bool:
        """Tell whether at least one batch is done."""
        shards = self.path.glob("shard-*") if self.read_manifest() is not None else ()
        return any(path.stat().st_size > 0 for path in shards)

    def begin(self, manifest: dict[str, Any], is_shared: bool = False) -> None:
        """Start or resume a job; `is_shared` says that other array tasks are using the folder."""
        earlier = self.read_manifest()
        # JSON turns tuples into lists.
        if earlier == json.loads(json.dumps(manifest)):
            return
        if earlier is not None and (is_shared or self.has_begun()):
            raise BoxFileError(
                f"{self.path} belongs to another job: {describe_differences(earlier, manifest)}. Choose another "
                "output, or pass `overwrite=True` to start again."
            )
        if earlier is None and os.path.lexists(self.path):
            # Not removed, because another array task may have started since the manifest was read.
            self._check_own()
        self.path.mkdir(exist_ok=True)
        # Several array tasks may write the manifest at the same time; each renames a file of its own.
        with replacing(self.path / _MANIFEST) as partial:
            partial.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        self.read_manifest()

    def remove(self) -> None:
        """Remove the folder. A kill leaves it complete or removed, never with some slices."""
        self.clean()
        if os.path.lexists(self.path):
            self._check_own()
            self.path.rename(self._finished)
            self.clean()

    def _check_own(self) -> None:
        """Raise if the folder is not that of a job; slices without a manifest could be of any images."""
        _check_own(self.path, needs_manifest=any(self.path.glob("shard-*")))

    def clean(self) -> None:
        """Finish a removal that a kill interrupted."""
        if os.path.lexists(self._finished):
            _check_own(self._finished, needs_manifest=False)
            shutil.rmtree(self._finished)

    @property
    def num_slices(self) -> int:
        """Number of slices of the job."""
        assert self.manifest is not None
        return -(-self.manifest["images"] // self.manifest["shard_size"])

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the index of the first image of a slice, and the index after its last image."""
        assert self.manifest is not None
        start = number * self.manifest["shard_size"]
        return start, min(start + self.manifest["shard_size"], self.manifest["images"])

    def _complete(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.jsonl"

    def _partial(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.jsonl.partial"

    def next_image(self, number: int) -> int:
        """Return the index of the first image of a slice that is not done, and remove an incomplete line after it."""
        start, stop = self.bounds(number)
        complete, partial = self._complete(number), self._partial(number)
        if complete.is_file():
            if _check_lines(complete, start, stop)[1] == stop:
                return stop
            # Damaged after it was complete, for example by a disk that lost a write. Its first lines are kept.
            complete.rename(partial)
        if not partial.is_file():
            return start
        size, position = _check_lines(partial, start, stop)
        os.truncate(partial, size)
        if position == stop:
            # The job was killed between the last batch and the renaming.
            self._finish(number)
        return position

    def append(self, number: int, batch: Batch) -> None:
        """Append a batch to a slice; the last batch completes it. Call [`next_image`] once before the first batch."""
        partial = self._partial(number)
        line = json.dumps(vars(batch)).encode() + b"\n"
        # Unbuffered, so that a batch is not lost if the process is killed.
        with partial.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                written = file.write(line)
                if written != len(line):
                    # A nearly full disk accepts a part of the line without an error.
                    raise OSError(
                        errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {written} of {len(line)} bytes", partial
                    )
                if batch.stop == self.bounds(number)[1]:
                    os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        if batch.stop == self.bounds(number)[1]:
            self._finish(number)

    def _finish(self, number: int) -> None:
        """Check that a slice is complete, and rename its file."""
        partial, (start, stop) = self._partial(number), self.bounds(number)
        position = _check_lines(partial, start, stop)[1]
        if position != stop:
            raise BoxFileError(
                f"{partial} is damaged after input {position} of {start} to {stop}. Run the same command with "
                "`resume=True`: it starts there."
            )
        partial.rename(self._complete(number))

    def batches(self) -> Iterator[Batch]:
        """Read all slices in order."""
        for number in range(self.num_slices):
            start, stop = self.bounds(number)
            path, position = self._complete(number), start
            if path.is_file():
                with path.open("rb") as file:
                    for line in file:
                        batch = _parse(line)
                        if batch is None or batch.start != position:
                            break
                        position = batch.stop
                        yield batch
            if position != stop:
                raise BoxFileError(
                    f"{path} is absent or damaged (inputs {start} to {stop}, complete up to {position}). Run the same "
                    "command with `resume=True`: it computes what is missing."
                )


def _check_lines(path: Path, start: int, stop: int) -> tuple[int, int]:
    """Return the number of bytes of the intact lines of a slice file, and the index after their last image."""
    size, position = 0, start
    with path.open("rb") as file:
        for line in file:
            batch = _parse(line)
            if batch is None or batch.start != position or not position < batch.stop <= stop:
                break
            size, position = size + len(line), batch.stop
    return size, position


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a job; `None` if there is none, or the file is something else."""
    manifest = try_read_json(folder / _MANIFEST)
    return manifest if manifest is not None and manifest.keys() == _MANIFEST_KEYS else None


def _check_own(folder: Path, needs_manifest: bool) -> None:
    """Raise if a folder holds anything that no job wrote."""
    if folder.is_dir() and not folder.is_symlink():
        names = sorted(entry.name for entry in os.scandir(folder))
        others = [name for name in names if not _OWN_FILES.fullmatch(name) and not is_partial(name)]
        if (needs_manifest or (folder / _MANIFEST).exists()) and _read_manifest(folder) is None:
            others.append(f"no {_MANIFEST} of a job")
        if not others:
            return
    else:
        others = ["a link" if folder.is_symlink() else "a file"]
    raise BoxFileError(
        f"{folder} is in the way: it is not the folder of an interrupted job ({', '.join(others[:3])}). Move it, or "
        "choose another output."
    )


def _parse(line: bytes) -> Batch | None:
    """Read a line; `None` if it is incomplete or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return Batch(**json.loads(line))
    except (ValueError, TypeError):
        return None


__all__ = ["Batch", "SliceFolder", "processes", "read_ahead"]
