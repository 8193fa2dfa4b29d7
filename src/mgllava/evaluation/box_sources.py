"""The boxes of questions: from a box file, a detector, or the truth; dropped, shifted or of another image."""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mgllava.box_files import BoxFile, BoxFileError, MissingBoxesError
from mgllava.box_files.formats import check_record

from .errors import BadRowError, EvaluationError
from .questions import Question
from .tables import VIDEO_ENDINGS

Record = Mapping[str, Any]


class BoxSource(str, Enum):
    """Where the boxes of images come from."""

    NONE = "none"
    FILE = "file"
    DETECTOR = "detector"
    ORACLE = "oracle"


@dataclass(frozen=True)
class BoxChanges:
    """Changes to boxes, which show how much a model needs them.

    The changes of an image depend on the seed and its key only, not on batches or processes.

    Attributes:
        drop: Probability with which each box is dropped.
        shift: Distance in pixels of the image by which each box is moved, in a random direction. Boxes stop at the
            border of the image, with their size unchanged.
        shuffle: Whether an image gets the boxes of another image, scaled to its size.
        seed: Random seed.
    """

    drop: float = 0.0
    shift: float = 0.0
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise EvaluationError(f"`drop_boxes` must be from 0 to 1, got {self.drop}.")
        if not (math.isfinite(self.shift) and self.shift >= 0):
            raise EvaluationError(f"`shift_boxes` must be a distance of at least 0 pixels, got {self.shift}.")

    def __bool__(self) -> bool:
        return bool(self.drop or self.shift or self.shuffle)

    @property
    def settings(self) -> dict[str, Any]:
        """The changes as plain values; the seed only if something is random."""
        return asdict(self) if self else {}

    def apply(self, record: Record, key: Any, size: tuple[int, int]) -> dict[str, Any]:
        """Drop and shift the boxes of an image.

        Args:
            record (`Mapping`): `boxes` (xyxy in pixels of the image), and perhaps `labels` and `scores`.
            key: The key of the image, from which its random numbers are derived.
            size (`tuple[int, int]`): Width and height of the image in pixels.

        Returns:
            `dict`: The changed record.
        """
        # The same numbers are drawn for every probability and distance. So a larger probability drops the same boxes
        # and more, and boxes move in the same direction.
        digest = hashlib.sha256(json.dumps([self.seed, str(key)]).encode()).digest()
        numbers = random.Random(int.from_bytes(digest[:8], "big"))
        draws = [(numbers.random(), numbers.random()) for _ in record["boxes"]]
        kept = [row for row, (chance, _) in enumerate(draws) if chance >= self.drop]
        changed = {name: [values[row] for row in kept] for name, values in record.items() if name in _LISTS}
        if self.shift:
            changed["boxes"] = [
                shifted(box, self.shift, 2 * math.pi * draws[row][1], size)
                for row, box in zip(kept, changed["boxes"], strict=True)
            ]
        return changed


_LISTS = ("boxes", "labels", "scores")


def shifted(box: Sequence[float], distance: float, angle: float, size: tuple[int, int]) -> list[float]:
    """Move a box by whole pixels.

    Args:
        box (`Sequence[float]`): xyxy in pixels of the image.
        distance (`float`): In pixels.
        angle (`float`): Direction in radians.
        size (`tuple[int, int]`): Width and height of the image.

    Returns:
        `list[float]`: The box; it does not leave the image farther than before.
    """
    moved = list(box)
    for axis, step in enumerate((math.cos(angle), math.sin(angle))):
        low, high = min(0, -box[axis]), max(0, size[axis] - box[axis + 2])
        offset = min(max(round(distance * step), low), high)
        moved[axis], moved[axis + 2] = box[axis] + offset, box[axis + 2] + offset
    return moved


def scaled(record: Record, old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    """Scale boxes from one image size (width, height) to another."""
    if old == new:
        return {name: list(values) for name, values in record.items() if name in _LISTS}
    factors = (new[0] / old[0], new[1] / old[1]) * 2
    boxes = [[value * factor for value, factor in zip(box, factors, strict=True)] for box in record["boxes"]]
    return {**{name: list(values) for name, values in record.items() if name in _LISTS}, "boxes": boxes}


def partners(keys: Sequence[Any], seed: int) -> dict[Any, Any]:
    """Give every key another one, which no other key gets.

    Args:
        keys (`Sequence`): Keys of images; equal ones count once.
        seed (`int`): Random seed.

    Returns:
        `dict`: The partner of each key.

    Raises:
        EvaluationError: If there are not two keys.
    """
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise EvaluationError("`shuffle_boxes` needs the boxes of at least two images.")
    random.Random(seed).shuffle(distinct)
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))


def boxes_of(
    question: Question, source: BoxSource, file: BoxFile | None, num_frames: int | None = None
) -> list[Record] | None:
    """Return the boxes of a question: of its image, or with `num_frames` of each frame of its video.

    `None` if the detector finds them. The truth has no scores.
    """
    if source is BoxSource.DETECTOR:
        return None
    if source is BoxSource.NONE:
        return [{"boxes": []}] * (num_frames or 1)
    try:
        if file is not None:
            records = boxes_in_file(file, question.box_key, num_frames)
        else:
            given = question.row.values.get("boxes")
            if given is None:
                raise BadRowError("it has no true boxes in the column `boxes`")
            given = json.loads(given) if isinstance(given, str) else given
            records = [_true_boxes(entry) for entry in ([given] if num_frames is None else given)]
            _check_frames(records, num_frames)
    except (BoxFileError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadRowError):
            raise
        raise BadRowError(f"its boxes cannot be read: {error}") from error
    return [{"boxes": record["boxes"]} for record in records] if source is BoxSource.ORACLE else records


def boxes_in_file(file: BoxFile, key: Any, num_frames: int | None = None) -> list[Record]:
    """Return the boxes of an image in a box file, or with `num_frames` those of each frame of a video.

    Args:
        file ([`BoxFile`]): The box file.
        key: The id; that of a video may lack the extension of its file.
        num_frames (`int`, *optional*): Number of frames.

    Returns:
        `list[Mapping]`: Of an image one record.

    Raises:
        BadRowError: If the file has no boxes for the id, or those of something else.
        BoxFileError: If the record cannot be read.
    """
    name = key
    if num_frames is not None and key not in file:  # `mgllava detect` names videos with their extension
        name = next((other for end in VIDEO_ENDINGS if (other := f"{key}{end}") in file), key)
    try:
        record = file[name]
    except MissingBoxesError as error:
        raise BadRowError(f"the box file has no boxes for the id {key!r}") from error
    if ("frames" in record) != (num_frames is not None):
        kind = "frames of a video" if num_frames is None else "an image"
        raise BadRowError(f"the box file has boxes of {kind} for the id {key!r}")
    if num_frames is None:
        return [record]
    records = list(record["frames"])
    _check_frames(records, num_frames)
    return records


def _check_frames(records: Sequence[Record], num_frames: int | None) -> None:
    if num_frames is not None and len(records) != num_frames:
        raise BadRowError(f"it has boxes of {len(records)} frames, but {num_frames} are sampled (`num_frames`)")


def _true_boxes(given: Any) -> Record:
    """Check the boxes of an image or frame in the column `boxes`."""
    boxes = given["boxes"] if isinstance(given, Mapping) else given
    empty = {"labels": [""] * len(boxes), "scores": [1.0] * len(boxes)}
    return check_record({"boxes": [list(box) for box in boxes], **empty}, "its `boxes`")


__all__ = ["BoxChanges", "BoxSource", "Record", "boxes_in_file", "boxes_of", "partners", "scaled", "shifted"]
