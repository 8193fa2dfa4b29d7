"""A box file in memory: a mapping from ids to the records of images and videos."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from mgllava.errors import shorten

from .errors import BoxFileError, MissingBoxesError

# An image: "boxes", "labels", "scores" in parallel. A video: "frames", a list of such records.
Record = dict[str, Any]
Missing = Literal["error", "empty"]

_SAMPLES = 5
_ABSENT = "(absent)"


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Identify the settings of a detector.

    Args:
        settings (`Mapping`): Values that JSON can hold; the order of the keys does not matter.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class BoxFile(Mapping[Any, Record]):
    """Records of boxes by id.

    An id is looked up as it is; if the file does not have it, as text (`1` for `"1"` and vice versa). So a file works
    for training, where the original turns all ids into text, and for evaluation, where ids are those of the benchmark.
    If an id occurs several times, the last record is used, as in the original.

    Args:
        ids (`Iterable`): The id of each record.
        records (`Sequence[dict]`): For each id `{"boxes", "labels", "scores"}`, with boxes as xyxy in pixels of the
            original image (upright); or `{"frames": [...]}` for a video, with one such dictionary per frame.
        settings (`dict`, *optional*): Settings of the detector that made the boxes; `None` if unknown.
        inputs_digest (`str`, *optional*): Digest of the list of images that the file was made from.
        missing (`str`): What an unknown id returns: `"error"`, or `"empty"` for a record without boxes.
        name (`str`): Name of the file in error messages.

    Attributes:
        duplicates (`dict`): Number of occurrences of each id that occurs more than once.

    Raises:
        BoxFileError: If `missing` has another value.
    """

    def __init__(
        self,
        ids: Iterable[Any],
        records: Sequence[Record],
        settings: dict[str, Any] | None = None,
        inputs_digest: str | None = None,
        missing: Missing = "error",
        name: str = "the box file",
    ):
        if missing not in get_args(Missing):
            raise BoxFileError(f"`missing` must be 'error' or 'empty', got {missing!r}.")
        self.settings = settings
        self.inputs_digest = inputs_digest
        self.missing = missing
        self.name = name
        self.duplicates: dict[Any, int] = {}
        self._records = records
        self._rows: dict[Any, int] = {}
        self._rows_by_text: dict[str, int] | None = None
        for row, key in enumerate(ids):
            if key in self._rows:
                self.duplicates[key] = self.duplicates.get(key, 1) + 1
            self._rows[key] = row

    def _row(self, key: Any) -> int | None:
        row = self._rows.get(key)
        if row is None:
            if self._rows_by_text is None:
                self._rows_by_text = {str(known): row for known, row in self._rows.items()}
            row = self._rows_by_text.get(str(key))
        return row

    def __getitem__(self, key: Any) -> Record:
        row = self._row(key)
        if row is not None:
            return self._records[row]
        if self.missing == "empty":
            return {"boxes": [], "labels": [], "scores": []}
        known = ", ".join(repr(known) for known, _ in zip(self._rows, range(3), strict=False))
        raise MissingBoxesError(
            f"{self.name} has no boxes for id {key!r}; it holds {len(self)} ids, such as {known or 'none'}. An image "
            "without objects needs a record with empty lists. Run the detector on this image, or pass "
            '`missing="empty"` to continue without boxes.'
        )

    def holds_frames(self, key: Any) -> bool:
        """Tell whether an id is that of a video, whose frames have boxes.

        Args:
            key: The id.

        Returns:
            `bool`: `False` also if there is no such id.
        """
        row = self._row(key)
        if row is None:
            return False
        # Records of Parquet are created when they are read, which takes longer than asking for one column.
        of_row = getattr(self._records, "holds_frames", None)
        return "frames" in self._records[row] if of_row is None else bool(of_row(row))

    def __contains__(self, key: object) -> bool:
        return self._row(key) is not None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str | None:
        """Digest of the settings; `None` if they are unknown."""
        return None if self.settings is None else settings_digest(self.settings)

    def check_settings(self, expected: Mapping[str, Any], allow_other: bool = False) -> None:
        """Refuse boxes of another detector or of other settings.

        Args:
            expected (`Mapping`): Settings that the boxes must have, see [`detection_settings`].
            allow_other (`bool`): Whether to accept other or unknown settings.

        Raises:
            BoxFileError: If the settings differ or are unknown, and `allow_other` is not set. The message lists the
                differences.
        """
        if allow_other:
            return
        advice = "Make the boxes again with `mgllava detect`, or pass `allow_other=True` if you want these."
        if self.settings is None:
            raise BoxFileError(
                f"The settings that {self.name} was made with are unknown, but `expected` asks for "
                f"{settings_digest(expected)[:12]}. {advice}"
            )
        found, wanted = _with_known_revisions(self.settings, expected)
        if settings_digest(found) != settings_digest(wanted):
            differences = describe_differences(found, wanted)
            raise BoxFileError(f"{self.name} was made with other settings than expected: {differences}. {advice}")


def _with_known_revisions(*settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Remove revisions of the detector's parts that are not in both settings."""
    copies = [dict(values) for values in settings]
    parts = [dict(values["detector"]) if isinstance(values.get("detector"), Mapping) else {} for values in copies]
    for key in ("tagger_revision", "detector_revision"):
        if not all(values.get(key) for values in parts):
            for values in parts:
                values.pop(key, None)
    for values, of_detector in zip(copies, parts, strict=True):
        if isinstance(values.get("detector"), Mapping):
            values["detector"] = of_detector
    return copies


def describe_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Name the settings that differ, at most a few: `threshold is 0.3, expected 0.2`."""
    left, right = _flatten(found), _flatten(expected)
    names = sorted(left.keys() | right.keys())
    different = [name for name in names if left.get(name, _ABSENT) != right.get(name, _ABSENT)]
    said = [
        f"{name} is {shorten(left.get(name, _ABSENT))}, expected {shorten(right.get(name, _ABSENT))}"
        for name in different[:_SAMPLES]
    ]
    if len(different) > _SAMPLES:
        said.append(f"and {len(different) - _SAMPLES} more")
    return "; ".join(said)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            # JSON does not distinguish lists from tuples.
            flat[prefix + key] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return flat


__all__ = ["BoxFile", "Missing", "Record", "describe_differences", "settings_digest"]
