"""What a detection job has done so far: a folder that survives a kill at any moment."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .box_file import describe_differences
from .errors import BoxFileError

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Batch:
    """What came of a run of consecutive images.

    Args:
        start (`int`): Number of the first image in the input.
        stop (`int`): Number behind the last one.
        records (`list[dict]`): Records of the box file, in order.
        unreadable (`list[dict]`): For each image that could not be read: `ids`, `image`, `reason`.
    """

    start: int
    stop: int
    records: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)


class ShardFolder:
    """The folder `OUTPUT.shards`: a manifest, and one file per shard, a slice of the input of fixed size.

    A shard file has one line per batch. A batch is in it as soon as it is computed, so a kill loses none; a line that
    the kill cut short is removed when the shard is continued. A file without `.partial` in its name is complete.

    Args:
        output (`Path`): The file that the job makes.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(output.name + ".shards")
        self.manifest: dict[str, Any] | None = None
        self._finished = self.path.with_name(self.path.name + ".finished")

    def read_manifest(self) -> dict[str, Any] | None:
        """Read what the job is, if there is one.

        Returns:
            `dict`, *optional*: `settings`, `inputs_digest`, `images` and `shard_size`.
        """
        path = self.path / _MANIFEST
        self.manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return self.manifest

    def has_begun(self) -> bool:
        """Tell whether there is a job in the folder with at least one batch done.

        Returns:
            `bool`: Whether there is something to lose.
        """
        shards = self.path.glob("shard-*") if self.read_manifest() is not None else ()
        return any(path.stat().st_size > 0 for path in shards)

    def begin(self, manifest: dict[str, Any]) -> None:
        """Start a job, or go on with it.

        Args:
            manifest (`dict`): What the job is.

        Raises:
            BoxFileError: If the folder holds another job.
        """
        earlier = self.read_manifest()
        # As JSON has them: tuples come back as lists.
        if earlier == json.loads(json.dumps(manifest)):
            return
        if not self.has_begun():
            self.path.mkdir(parents=True, exist_ok=True)
            # Tasks of an array may all get here first, so each writes a file of its own.
            descriptor, partial = tempfile.mkstemp(dir=self.path)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=2, ensure_ascii=False)
            os.replace(partial, self.path / _MANIFEST)
            self.read_manifest()
        elif earlier is not None:
            raise BoxFileError(
                f"{self.path} belongs to another job: {describe_differences(earlier, manifest)}. Choose another "
                "--output, or pass --overwrite to start again."
            )

    def remove(self) -> None:
        """Remove the folder. Killed meanwhile, it is either whole or gone, but never a job with shards missing."""
        self.clean()
        if self.path.exists():
            self.path.rename(self._finished)
            self.clean()

    def clean(self) -> None:
        """Remove what a kill left of a folder that was to go."""
        if self._finished.exists():
            shutil.rmtree(self._finished)

    @property
    def num_shards(self) -> int:
        """Number of shards of the job."""
        assert self.manifest is not None
        return -(-self.manifest["images"] // self.manifest["shard_size"])

    def bounds(self, shard: int) -> tuple[int, int]:
        """Tell which images a shard has.

        Args:
            shard (`int`): Number of the shard.

        Returns:
            `tuple[int, int]`: Number of its first image, and of the one behind its last.
        """
        assert self.manifest is not None
        start = shard * self.manifest["shard_size"]
        return start, min(start + self.manifest["shard_size"], self.manifest["images"])

    def _complete(self, shard: int) -> Path:
        return self.path / f"shard-{shard:06d}.jsonl"

    def _partial(self, shard: int) -> Path:
        return self.path / f"shard-{shard:06d}.jsonl.partial"

    def next_image(self, shard: int) -> int:
        """Find where a shard is to be continued, and cut off what a kill left unfinished.

        Args:
            shard (`int`): Number of the shard.

        Returns:
            `int`: Number of the first image that is not done; the end of the shard if all are.
        """
        start, stop = self.bounds(shard)
        if self._complete(shard).is_file():
            return stop
        partial = self._partial(shard)
        if not partial.is_file():
            return start
        size, position = 0, start
        with partial.open("rb") as file:
            for line in file:
                batch = _parse(line)
                if batch is None or batch.start != position or batch.stop > stop:
                    break
                size, position = size + len(line), batch.stop
        os.truncate(partial, size)
        if position == stop:
            # Killed between the last batch and the new name.
            partial.rename(self._complete(shard))
        return position

    def append(self, shard: int, batch: Batch) -> None:
        """Note a batch; the last one completes the shard. Call [`next_image`] once before.

        Args:
            shard (`int`): Number of the shard.
            batch (`Batch`): What came of its next images.
        """
        partial = self._partial(shard)
        # Unbuffered: a batch is handed to the system by one call, and survives the death of this process.
        with partial.open("ab", buffering=0) as file:
            file.write(json.dumps(vars(batch), ensure_ascii=False).encode() + b"\n")
            if batch.stop == self.bounds(shard)[1]:
                os.fsync(file.fileno())
                partial.rename(self._complete(shard))

    def batches(self) -> Iterator[Batch]:
        """Read all shards in order.

        Yields:
            `Batch`: What came of the images.

        Raises:
            BoxFileError: If a shard is not complete.
        """
        for shard in range(self.num_shards):
            start, stop = self.bounds(shard)
            path, position = self._complete(shard), start
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
                    f"{path} is absent or damaged (images {start} to {stop}, complete up to {position}). Delete it if "
                    "it is there, and run the same command with --resume."
                )


def _parse(line: bytes) -> Batch | None:
    """Read a line; `None` if a kill cut it short."""
    if not line.endswith(b"\n"):
        return None
    try:
        return Batch(**json.loads(line))
    except (ValueError, TypeError):
        return None


__all__ = ["Batch", "ShardFolder"]
