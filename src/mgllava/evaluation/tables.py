"""Rows of benchmark files: TSV, CSV, JSON, JSON lines, Parquet, and the folders of MME."""

import base64
import binascii
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgllava.extras import import_extra

from .errors import BadRowError, EvaluationError

EXTENSIONS = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
_IMAGE_COLUMNS = ("image", "image_path", "img", "decoded_image")
# Shorter texts in the column of images are the index of the row that has the image, as in VLMEvalKit's files.
_SHORTEST_BASE64 = 16
# How writers of TSV say that a cell is empty. Words such as "None" and "NA" are text: they occur as options.
_EMPTY = ("", "nan", "NaN")
# Without leading zeros, and not longer than any id.
_WHOLE = re.compile("0|[1-9][0-9]{0,17}")
_VIDEO_COLUMNS = ("video_name", "video", "video_path")
# Benchmarks name videos without an extension.
VIDEO_ENDINGS = ("", ".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif")
_MME_QUESTIONS = "questions_answers_YN"
_MME_IMAGES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Row:
    """A row of a benchmark.

    Attributes:
        values: The columns without images; absent cells are left out.
        place: File and number of the row, for messages.
        stem: Name of the file without its extension.
        image: Returns what the columns of images hold, by column; decoded images would fill the memory.
        table: Rows of the same file by the text of `index`, where a row may take its image from.
        box_id: Id of the image in a box file, if no column has it.
    """

    values: Mapping[str, Any]
    place: str
    stem: str
    image: Callable[[], Mapping[str, Any]]
    table: Mapping[str, "Row"]
    box_id: Any = None


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """Read the rows of one or several files, in their order.

    Args:
        paths (`Sequence[str | Path]`): Files (.tsv, .csv, .json, .jsonl, .parquet), folders with Parquet files, or the
            folder of MME as it is distributed.

    Returns:
        `list[Row]`: The rows.

    Raises:
        EvaluationError: If a file has another format or no rows.
        ImportError: If a file is Parquet and pyarrow is not installed.
        OSError: If a file cannot be read.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        found = list(_read(path))
        if not found:
            raise EvaluationError(f"`data`: {path} has no rows.")
        rows += found
    return rows


def _read(path: Path) -> Iterator[Row]:
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            yield from _mme_folder(path)
        for file in files:
            yield from _parquet(file)
        return
    extension = path.suffix.lower()
    if extension == ".parquet":
        yield from _parquet(path)
    elif extension in (".tsv", ".csv"):
        yield from _rows(path, _separated(path, "\t" if extension == ".tsv" else ","))
    elif extension in (".json", ".jsonl"):
        yield from _rows(path, _json(path))
    else:
        raise EvaluationError(f"`data` must be a folder or end in {', '.join(EXTENSIONS)}, got {path}.")


def _rows(path: Path, records: Iterator[dict[str, Any]]) -> Iterator[Row]:
    table: dict[str, Row] = {}
    for number, record in enumerate(records, start=1):
        images = {name: record.pop(name) for name in _IMAGE_COLUMNS if name in record}
        if isinstance(images.get("image_path"), str):
            # Scores of MME and names in messages need it, and it is short.
            record["image_path"] = images["image_path"]
        row = Row(record, f"{path}, row {number}", path.stem, lambda images=images: images, table)  # type: ignore[misc]
        if "index" in record:
            table.setdefault(str(record["index"]), row)
        yield row


def _text_of(path: Path) -> str:
    try:
        # The mark at the beginning that some editors write is left out.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"`data`: {path} is not UTF-8 ({error}). Convert it, for example with iconv.") from error


def _separated(path: Path, separator: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # images are in the cells
    # Strict: otherwise a quotation mark that is not closed takes all following rows into its cell.
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise EvaluationError(
            f"`data`: {path}, line {reader.line_num} cannot be read ({error}). Are its cells with quotation marks "
            "quoted, and the marks in them doubled?"
        ) from error
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise EvaluationError(f"`data`: {path} has several columns with the name {', '.join(map(repr, twice))}.")
    # As with pandas, a column of whole numbers holds numbers.
    whole = {
        column
        for column in range(len(header))
        if (cells := [line[column] for line in lines if column < len(line) and line[column] not in _EMPTY])
        and all(map(_WHOLE.fullmatch, cells))
    }
    for line in lines:
        if len(line) > len(header):
            raise EvaluationError(
                f"`data`: {path} has {len(line)} cells in row {lines.index(line) + 1}, but {len(header)} columns. Are "
                "quotation marks in its cells doubled?"
            )
        yield {
            name: int(cell) if column in whole and name not in _IMAGE_COLUMNS else cell
            for column, (name, cell) in enumerate(zip(header, line, strict=False))
            if cell not in _EMPTY
        }


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON lines (also in files that end in .json), a list of rows, or a dictionary from ids to rows."""
    text = _text_of(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        # Not `splitlines`, which also splits at separators that JSON may hold.
        content = [_json_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and content and all(isinstance(row, dict) for row in content.values()):
        content = [{"pid": key, **row} for key, row in content.items()]
    elif isinstance(content, dict):
        content = [content]  # JSON lines with one line
    if not isinstance(content, list):
        raise EvaluationError(f"`data`: {path} must hold a list of rows, got {type(content).__name__}.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(f"`data`: {path}, row {number} must be a dictionary, got {type(row).__name__}.")
        yield _present(row)


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out empty cells; pandas writes those of Parquet and JSON as NaN."""
    return {
        name: value
        for name, value in row.items()
        if value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))
    }


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"`data`: {path}, line {number} is not JSON ({error}).") from error


def _parquet(path: Path) -> Iterator[Row]:
    import_extra("pyarrow", "eval", "Parquet")
    import pyarrow as pa
    from pyarrow.parquet import read_table

    try:
        content = read_table(path)
    except pa.ArrowInvalid as error:
        raise EvaluationError(f"`data`: {path} is not a Parquet file ({error}).") from error
    images = [name for name in _IMAGE_COLUMNS if name in content.column_names]
    plain = content.drop_columns(images)
    table: dict[str, Row] = {}
    for number, record in enumerate(plain.to_pylist()):

        def image(number: int = number) -> Mapping[str, Any]:
            return {name: content[name][number].as_py() for name in images}

        values = _present(record)
        row = Row(values, f"{path}, row {number + 1}", path.stem, image, table)
        if "index" in values:
            table.setdefault(str(values["index"]), row)
        yield row


def _mme_folder(path: Path) -> Iterator[Row]:
    """Read MME as it is distributed: a folder per category, with images and lines of question, tab and answer."""
    texts = sorted(file for file in path.glob("*/*.txt")) + sorted(path.glob(f"*/{_MME_QUESTIONS}/*.txt"))
    if not texts:
        raise EvaluationError(
            f"`data`: the folder {path} has no Parquet files, and no questions of MME (CATEGORY/NAME.txt next to "
            "CATEGORY/NAME.jpg). Give the file of the questions, and the folder of their images as `image_folder`."
        )
    for file in texts:
        category = file.parent.parent if file.parent.name == _MME_QUESTIONS else file.parent
        folder = category / "images" if file.parent.name == _MME_QUESTIONS else category
        picture = next(
            (folder / (file.stem + end) for end in _MME_IMAGES if (folder / (file.stem + end)).is_file()),
            folder / f"{file.stem}.jpg",
        )
        name = picture.relative_to(path).as_posix()
        for number, line in enumerate(filter(str.strip, _text_of(file).splitlines()), start=1):
            question, _, answer = line.rpartition("\t")
            values = {"index": f"{name}#{number}", "question": question, "answer": answer.strip()}
            stored = {"image_path": name}
            yield Row(
                {**values, "category": category.name, **stored},
                f"{file}, line {number}",
                path.stem,
                lambda stored=stored: stored,  # type: ignore[misc]
                {},
                # `mgllava detect` on this folder names images by their path in it.
                name,
            )


def find_image(row: Row, folder: Path, default: str | None = None, prefers_files: bool = False) -> Any:
    """Return the image of a row in a form that can be opened: a path or bytes.

    Args:
        row ([`Row`]): The row.
        folder (`Path`): Where paths start.
        default (`str`, *optional*): Path of the image of rows that do not name one.
        prefers_files (`bool`): Whether to take the file if a row has a path and pixels.

    Returns:
        `Path` or `bytes`: The image; a path is that of an existing file.

    Raises:
        BadRowError: If the row has no image, or the image is not there.
    """
    for _ in range(len(row.table) + 1):
        stored = row.image()
        paths = [stored[name] for name in ("image_path", "image") if _is_path(stored.get(name))]
        if paths and (prefers_files or len(paths) == sum(value is not None for value in stored.values())):
            return _inside(folder, paths[0])
        image = next(
            (stored[name] for name in ("decoded_image", "image", "img") if stored.get(name) is not None), None
        )
        if isinstance(image, list):
            if len(image) != 1:
                raise BadRowError(f"it has {len(image)} images, and the original's questions have one")
            image = image[0]
        if isinstance(image, Mapping):
            if image.get("bytes"):
                return image["bytes"]
            image = image.get("path") or None
            if image is not None:
                return _inside(folder, image)
        if isinstance(image, bytes | bytearray) and image:
            return bytes(image)
        if (image is None or image == "") and default is not None:
            return _inside(folder, default)
        if image is None or image == "":
            raise BadRowError("it has no image")
        if isinstance(image, int) or (isinstance(image, str) and len(image) < _SHORTEST_BASE64):
            other = row.table.get(str(image))
            if other is None:
                raise BadRowError(f"its image is that of the row with index {image}, which is absent")
            row = other
            continue
        return _decode(str(image))
    raise BadRowError("its image is that of another row, in a circle")


def name_of_video(row: Row) -> str:
    """Return the name of a row's video, as its column has it; raise `BadRowError` if there is none."""
    name = next((row.values[column] for column in _VIDEO_COLUMNS if row.values.get(column) not in (None, "")), None)
    if not isinstance(name, str | int):
        raise BadRowError(f"it has no {' or '.join(_VIDEO_COLUMNS)}")
    return str(name)


def find_video(row: Row, folder: Path) -> Path:
    """Return the file of a row's video, whose name may lack its extension.

    Args:
        row ([`Row`]): The row.
        folder (`Path`): Where paths start.

    Returns:
        `Path`: The file.

    Raises:
        BadRowError: If the row names no video, or the file is not there.
    """
    name = name_of_video(row)
    ending = next((ending for ending in VIDEO_ENDINGS if (folder / (name + ending)).is_file()), "")
    return _inside(folder, name + ending, "video")


def _is_path(value: Any) -> bool:
    """Tell whether the cell of an image is a path: base64 has no point."""
    return isinstance(value, str) and not value.startswith(("data:", "[")) and "." in value[-6:]


def _inside(folder: Path, name: str, kind: str = "image") -> Path:
    """Return the path of an image or video; files of benchmarks are downloaded, so it must be inside the folder."""
    relative = os.path.normpath(os.path.relpath(name, folder.absolute()) if os.path.isabs(name) else name)
    if relative == ".." or relative.startswith(".." + os.sep) or os.path.isabs(relative):
        raise BadRowError(f"its {kind} {name!r} is outside the folder {folder}")
    path = folder / relative
    if not path.is_file():
        raise BadRowError(f"its {kind} {path} does not exist")
    return path


def _decode(text: str) -> bytes:
    if text.startswith("["):
        try:
            several = json.loads(text.replace("'", '"'))
        except ValueError:
            several = [text]
        if len(several) != 1:
            raise BadRowError(f"it has {len(several)} images, and the original's questions have one")
        text = str(several[0])
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRowError(f"its image is not base64 ({error}), which begins with {text[:20]!r}") from error
    if not content:
        raise BadRowError("its image is empty")
    return content


__all__ = ["EXTENSIONS", "VIDEO_ENDINGS", "Row", "find_image", "find_video", "name_of_video", "read_rows"]
