"""Box files on disk: the original's JSON, and Parquet."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mgllava.atomic_files import replacing
from mgllava.errors import shorten
from mgllava.extras import import_extra

from .box_file import BoxFile, Missing, Record, settings_digest
from .errors import BoxFileError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

FORMATS = (".json", ".parquet")
_BOX_KEYS = ("boxes", "scores", "labels")
_FRAMES = "frames"
_METADATA_KEY = b"mgllava"
# Rows of a row group: they are converted to Arrow together, which limits memory.
_ROWS_AT_A_TIME = 10_000
# Number of damaged records that an error lists.
_PROBLEMS = 5


def read_boxes(path: str | Path, missing: Missing = "error") -> BoxFile:
    """Read a box file: JSON in any of the original's forms, or Parquet.

    The JSON forms are a list of records with an `id`; a dictionary from ids to records; either with `frames` instead
    of boxes; and the list of the evaluation on videos, with `video` (a file name); its ids are these names without
    the extension.

    Args:
        path (`str` or `Path`): A `.json` or `.parquet` file.
        missing (`str`): What an unknown id returns: `"error"`, or `"empty"` for a record without boxes.

    Returns:
        `BoxFile`: The records by id, and the settings of the detector, if the file has them (for JSON,
        `NAME.settings.json` next to it).

    Raises:
        BoxFileError: If the file has another format, a record is damaged, or the settings belong to another file.
        ImportError: If the file is Parquet and pyarrow is not installed.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    extension = check_extension(path)
    file = _read_json(path, missing) if extension == ".json" else _read_parquet(path, missing)
    if file.duplicates:
        samples = ", ".join(f"{key!r} ({count} times)" for key, count in islice(file.duplicates.items(), 3))
        logger.warning(
            "%s: %d ids occur more than once, such as %s. The last record of each is used.",
            path,
            len(file.duplicates),
            samples,
        )
    return file


def write_boxes(
    path: str | Path,
    records: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    *,
    inputs_digest: str | None = None,
    layout: Literal["list", "dictionary"] = "list",
    integer_boxes: bool | None = None,
    has_frames: bool | None = None,
) -> Path:
    """Write a box file, which gets its name when it is complete.

    JSON has exactly the original's keys, and the settings go to `NAME.settings.json`. Parquet has the columns `id`,
    `image`, `width`, `height`, `boxes`, `labels` and `scores`, and the settings in its metadata. If there are videos,
    there is the column `frames`, too: a list of `boxes`, `labels` and `scores` for a video, and null for an image.

    Args:
        path (`str` or `Path`): The file, `.json` or `.parquet`.
        records (`Iterable[Mapping]`): The records, which are read once and in order. Each has `id` (text or integer)
            and the lists `boxes` (xyxy in pixels of the original image), `labels` and `scores` of one length, or, for
            a video, `frames`: a list of such lists for each frame. JSON also takes `video` (a file name) instead of
            `id`; Parquet also takes `image`, `width` and `height` (pixels).
        settings (`Mapping`, *optional*): Settings of the detector, see [`detection_settings`].
        inputs_digest (`str`, *optional*): Digest of the list of images.
        layout (`str`): JSON only: `"list"` for training and evaluation, `"dictionary"` for training alone.
        integer_boxes (`bool`, *optional*): Parquet only: whether all coordinates are integers. By default all records
            are loaded into memory to find out.
        has_frames (`bool`, *optional*): Parquet only: whether some records are those of videos. By default all records
            are loaded into memory to find out.

    Returns:
        `Path`: The file.

    Raises:
        BoxFileError: If the extension is unknown or a record cannot be written.
        ImportError: If the file is Parquet and pyarrow is not installed.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    extension = check_extension(path)
    metadata: dict[str, Any] = {}
    if settings is not None:
        metadata = {"settings_digest": settings_digest(settings), "settings": dict(settings)}
    if inputs_digest is not None:
        metadata["inputs_digest"] = inputs_digest
    checked = (check_record(record, f"record {number}") for number, record in enumerate(records))
    with replacing(path) as partial:
        if extension == ".json":
            _write_json(partial, checked, layout)
            side_file = settings_path(path)
            if metadata:
                # The settings are written first, so that a kill in between never leaves boxes without settings.
                with replacing(side_file) as partial_side_file:
                    metadata["bytes"] = partial.stat().st_size
                    text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
                    partial_side_file.write_text(text, encoding="utf-8")
            else:
                side_file.unlink(missing_ok=True)
        else:
            _write_parquet(partial, checked, metadata, integer_boxes, has_frames)
    return path


def check_extension(path: Path) -> str:
    """Return the format of a box file, one of `FORMATS`; refuse other extensions."""
    extension = path.suffix.lower()
    if extension not in FORMATS:
        raise BoxFileError(f"A box file must end in {' or '.join(FORMATS)}, got {path}.")
    return extension


def settings_path(path: Path) -> Path:
    """Return the path of the settings of a JSON box file."""
    return path.with_suffix(".settings.json")


def check_record(record: Any, where: str) -> Record:
    """Check a record, which is named by `where` in errors, and return it as a dictionary.

    It has the lists `boxes` (xyxy in pixels of the original image, also outside it), `labels` and `scores` of one
    length, or `frames`, a list of such dictionaries.
    """
    if not isinstance(record, Mapping):
        raise BoxFileError(f"{where} must be a dictionary, got {_kind(record)}.")
    if "frames" in record:
        if not isinstance(record["frames"], list | tuple):
            raise BoxFileError(f"{where}: `frames` must be a list of records, got {_kind(record['frames'])}.")
        for number, frame in enumerate(record["frames"]):
            if isinstance(frame, Mapping) and "frames" in frame:
                raise BoxFileError(f"{where}, frame {number} must have boxes, got `frames` again.")
            check_record(frame, f"{where}, frame {number}")
        return dict(record)
    absent = [key for key in _BOX_KEYS if key not in record]
    if absent:
        raise BoxFileError(f"{where} must have {', '.join(_BOX_KEYS)} (or frames), but {', '.join(absent)} is absent.")
    for key in _BOX_KEYS:
        if not isinstance(record[key], list | tuple):
            raise BoxFileError(f"{where}: `{key}` must be a list, got {_kind(record[key])}.")
    lengths = {key: len(record[key]) for key in _BOX_KEYS}
    if len(set(lengths.values())) > 1:
        raise BoxFileError(f"{where}: boxes, scores and labels must have the same length, got {lengths}.")
    for box in record["boxes"]:
        if not isinstance(box, list | tuple) or len(box) != 4 or not _are_finite(box):
            raise BoxFileError(
                f"{where}: every box must be [x1, y1, x2, y2] with finite numbers, got {shorten(repr(box))}."
            )
        if box[2] < box[0] or box[3] < box[1]:
            raise BoxFileError(
                f"{where}: a box must have x1 <= x2 and y1 <= y2, got {shorten(repr(box))}. Is it x, y, width, height?"
            )
    if not _are_finite(record["scores"]):
        raise BoxFileError(f"{where}: `scores` must be finite numbers, got {shorten(repr(record['scores']))}.")
    if not all(isinstance(label, str) for label in record["labels"]):
        raise BoxFileError(f"{where}: `labels` must be text, got {shorten(repr(record['labels']))}.")
    return dict(record)


def _are_finite(values: Sequence[Any]) -> bool:
    # Exact types exclude bool, and `map` is fast for millions of boxes.
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:
        return False


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _check_all(records: Iterable[Any], names: Iterable[str], path: Path) -> list[Record]:
    """Check the records of a file, and report all damaged ones in one error."""
    checked, problems = [], []
    for record, name in zip(records, names, strict=True):
        try:
            checked.append(check_record(record, name))
        except BoxFileError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - _PROBLEMS} more)" if len(problems) > _PROBLEMS else ""
        raise BoxFileError(f"{path} has {len(problems)} damaged records: {' '.join(problems[:_PROBLEMS])}{more}")
    return checked


def _identified(record: Record, where: str) -> Any:
    """Find the id of a record."""
    if "id" in record:
        key = record["id"]
    elif isinstance(record.get("video"), str):
        key = Path(record["video"]).stem
    else:
        raise BoxFileError(f"{where} must have an `id` (or, for evaluation on videos, the file name `video`).")
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise BoxFileError(f"{where}: `id` must be text or an integer, got {key!r}.")
    return key


def _write_json(path: Path, records: Iterable[Record], layout: str) -> None:
    if layout not in ("list", "dictionary"):
        raise BoxFileError(f"`layout` must be 'list' or 'dictionary', got {layout!r}.")
    start, end = ("[", "]") if layout == "list" else ("{", "}")
    with path.open("w", encoding="utf-8") as file:
        file.write(start)
        keys: set[str] = set()
        for number, record in enumerate(records):
            key = _identified(record, f"record {number}")
            file.write("\n" if number == 0 else ",\n")
            if layout == "dictionary":
                if str(key) in keys:
                    raise BoxFileError(f"Id {key!r} occurs twice, which a dictionary cannot hold. Write a list.")
                keys.add(str(key))
                file.write(json.dumps(str(key), ensure_ascii=False) + ": ")
                names: tuple[str, ...] = ()
            else:
                names = ("id",) if "id" in record else ("video",)
            names += ("frames",) if "frames" in record else _BOX_KEYS
            file.write(json.dumps({name: record[name] for name in names}, ensure_ascii=False))
        file.write(f"\n{end}\n")


def _read_json(path: Path, missing: Missing) -> BoxFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BoxFileError(f"{path} is not valid JSON ({error}). Is it truncated?") from error
    ids: list[Any]
    if isinstance(content, dict):
        ids = list(content)
        records = _check_all(content.values(), (f"record {key!r}" for key in content), path)
    elif isinstance(content, list):
        records = _check_all(content, (f"record {number}" for number in range(len(content))), path)
        ids = [_identified(record, f"{path}: record {number}") for number, record in enumerate(records)]
    else:
        raise BoxFileError(f"{path} must hold a list or a dictionary of records, got {type(content).__name__}.")
    return BoxFile(ids, records, **read_metadata(path), missing=missing, name=str(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """Read `settings` and `inputs_digest` of a box file without its boxes; `None` where unknown."""
    metadata: dict[str, Any] = {}
    side_file = settings_path(path)
    if check_extension(path) == ".parquet":
        require_pyarrow()
        from pyarrow.parquet import read_schema

        metadata = _parse_metadata((read_schema(path).metadata or {}).get(_METADATA_KEY, b"{}"), path)
    elif side_file.is_file():
        metadata = _parse_metadata(side_file.read_bytes(), side_file)
        if metadata.get("bytes") != path.stat().st_size:
            raise BoxFileError(
                f"{side_file.name} does not belong to {path}, which was changed later. Delete it if the settings of "
                "these boxes are unknown."
            )
    settings = metadata.get("settings")
    if settings is not None and settings_digest(settings) != metadata.get("settings_digest"):
        raise BoxFileError(f"The settings of {path} were changed after it was made: they do not have their digest.")
    return {"settings": settings, "inputs_digest": metadata.get("inputs_digest")}


def _parse_metadata(content: bytes, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("settings", {}), dict):
        raise BoxFileError(f"{path} is damaged: it must hold the settings of the boxes as JSON. Make the boxes again.")
    return metadata


def require_pyarrow() -> None:
    """Raise an `ImportError` if pyarrow is missing."""
    import_extra("pyarrow.parquet", "datasets", "Parquet")


def _schema(integer_ids: bool, integer_boxes: bool, has_frames: bool, metadata: Mapping[str, Any]) -> "pyarrow.Schema":
    import pyarrow as pa

    coordinate = pa.int32() if integer_boxes else pa.float64()
    of_image = [
        ("boxes", pa.list_(pa.list_(coordinate, 4))),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
    ]
    fields = [
        ("id", pa.int64() if integer_ids else pa.string()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        *of_image,
        *([(_FRAMES, pa.list_(pa.struct(of_image)))] if has_frames else []),
    ]
    return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})


def _write_parquet(
    path: Path,
    records: Iterator[Record],
    metadata: Mapping[str, Any],
    integer_boxes: bool | None,
    has_frames: bool | None,
) -> None:
    require_pyarrow()
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    if integer_boxes is None or has_frames is None:
        in_memory = list(records)
        integer_boxes = all(map(has_integer_boxes, in_memory)) if integer_boxes is None else integer_boxes
        has_frames = any(_FRAMES in record for record in in_memory) if has_frames is None else has_frames
        records = iter(in_memory)
    first = next(records, None)
    integer_ids = first is not None and isinstance(_identified(first, "record 0"), int)
    schema = _schema(integer_ids, integer_boxes, has_frames, metadata)
    remaining = chain([] if first is None else [first], records)
    with ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := list(islice(remaining, _ROWS_AT_A_TIME)):
            for record in rows:
                if _FRAMES in record and not has_frames:
                    raise BoxFileError("`has_frames` must be true for records of videos, got false.")
                if isinstance(_identified(record, "a record"), int) != integer_ids:
                    raise BoxFileError(
                        "Parquet needs ids of one type, got both text and integers "
                        f"({_identified(record, 'a record')!r}). Write JSON, "
                        "or turn all ids into text."
                    )
            rows = [{"id": _identified(record, "a record"), **record} for record in rows]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def has_integer_boxes(record: Mapping[str, Any]) -> bool:
    """Tell whether all coordinates of a record are integers."""
    images = record.get(_FRAMES) or [record]
    return all(isinstance(value, int) for image in images for box in image.get("boxes") or () for value in box)


class _ArrowRecords(Sequence[Record]):
    """Rows of an Arrow table as dictionaries, which are created on access to save memory."""

    def __init__(self, table: "pyarrow.Table"):
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: Any) -> Any:
        record: Record = self._table.slice(row, 1).to_pylist()[0]
        # A column holds null where it does not apply.
        if record.get(_FRAMES) is None:
            record.pop(_FRAMES, None)
        elif all(record.get(name) is None for name in _BOX_KEYS):
            for name in _BOX_KEYS:
                record.pop(name, None)
        return record

    def holds_frames(self, row: int) -> bool:
        """Tell whether a row is that of a video."""
        return _FRAMES in self._table.column_names and self._table[_FRAMES][row].is_valid


def _is_clean(table: "pyarrow.Table") -> bool:
    """Check all rows at once; if `False`, [`check_record`] finds the damaged ones."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if _FRAMES in table.column_names:
        return False  # each row has boxes or frames
    boxes, labels, scores = (table[name].combine_chunks() for name in ("boxes", "labels", "scores"))
    try:
        lengths = [pc.list_value_length(column) for column in (boxes, labels, scores)]
        corners = pc.list_flatten(boxes)
        values, texts, numbers = pc.list_flatten(corners), pc.list_flatten(labels), pc.list_flatten(scores)
        columns = (boxes, labels, scores, corners, values, texts, numbers)
        if any(column.null_count for column in columns) or not (lengths[0] == lengths[1] == lengths[2]):
            return False
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            return False
        if len(corners) and pc.min_max(pc.list_value_length(corners)).as_py() != {"min": 4, "max": 4}:
            return False
        xyxy = values.to_numpy(zero_copy_only=False).reshape(-1, 4)
        rest = numbers.to_numpy(zero_copy_only=False)
        is_numeric = xyxy.dtype.kind in "iuf" and rest.dtype.kind in "iuf"
        return bool(
            is_numeric and np.isfinite(xyxy).all() and np.isfinite(rest).all() and (xyxy[:, :2] <= xyxy[:, 2:]).all()
        )
    except (pa.ArrowException, TypeError, ValueError):
        return False


def _read_parquet(path: Path, missing: Missing) -> BoxFile:
    require_pyarrow()
    import pyarrow as pa
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except pa.ArrowInvalid as error:
        raise BoxFileError(f"{path} is not a Parquet file ({error}). Is it truncated?") from error
    wanted = ("id",) if _FRAMES in table.column_names else ("id", *_BOX_KEYS)
    absent = [name for name in wanted if name not in table.column_names]
    if absent:
        raise BoxFileError(f"{path} has no column {', '.join(absent)}, so it is not a box file.")
    records = _ArrowRecords(table)
    if not _is_clean(table):
        _check_all(records, (f"record {number}" for number in range(len(records))), path)
    ids = [_identified({"id": key}, f"{path}: record {number}") for number, key in enumerate(table["id"].to_pylist())]
    return BoxFile(ids, records, **read_metadata(path), missing=missing, name=str(path))


__all__ = [
    "FORMATS",
    "check_extension",
    "check_record",
    "has_integer_boxes",
    "read_boxes",
    "read_metadata",
    "require_pyarrow",
    "settings_path",
    "write_boxes",
]
