"""A benchmark with the user's files: its questions, and the rows that cannot be asked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .answering import Visual, open_as_stored, open_video
from .benchmarks import Benchmark, find_benchmark
from .errors import BadRowError, EvaluationError
from .questions import Question, make_question, read_annotations
from .tables import VIDEO_ENDINGS, Row, find_image, find_video, name_of_video, read_rows

OnError = Literal["stop", "skip"]
_NAMED = 5


@dataclass(frozen=True)
class BadRow:
    """A row that is not scored, and the reason."""

    place: str
    key: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Task:
    """Questions of a benchmark.

    Attributes:
        benchmark: The benchmark.
        questions: The questions that can be asked, in the order of the files.
        bad_rows: The other rows.
        left_out: Number of rows without an image, which this benchmark has by design.
        image_folder: Where paths of images and videos start.
        prefers_files: Whether the user named this folder, so that a file is preferred to pixels in the row.
        num_frames: Frames that are sampled from each video; `None` for questions about images.
    """

    benchmark: Benchmark
    questions: list[Question]
    bad_rows: list[BadRow]
    left_out: int
    image_folder: Path
    prefers_files: bool
    num_frames: int | None = None

    @property
    def has_answers(self) -> bool:
        """Whether the questions have reference answers."""
        return bool(self.questions) and self.questions[0].answer is not None

    @property
    def digest(self) -> str:
        """SHA-256 of keys, prompts, images and boxes in the rows, in hexadecimal; of image files, name and size."""
        content = hashlib.sha256()
        for question in self.questions:
            image = self.find_image(question)
            parts = [
                *(question.number, question.key, question.box_key, question.prompt, question.row.place),
                hashlib.sha256(image).hexdigest()
                if isinstance(image, bytes)
                else [image.relative_to(self.image_folder).as_posix(), image.stat().st_size],
                question.row.values.get("boxes"),
            ]
            content.update(json.dumps(parts, default=str).encode())
        return content.hexdigest()

    def find_image(self, question: Question) -> Any:
        """Return the image or video of a question.

        Args:
            question ([`Question`]): The question.

        Returns:
            `Path` or `bytes`: The image or video in its file format.

        Raises:
            BadRowError: If it is not there.
        """
        if self.num_frames is not None:
            return find_video(question.row, self.image_folder)
        default = None if self.benchmark.image_of is None else self.benchmark.image_of.format(question.key)
        return find_image(question.row, self.image_folder, default, self.prefers_files)

    def open(self, stored: Any) -> Visual:
        """Open an image, or sample the frames of a video.

        Args:
            stored (`Path` or `bytes`): What [`~Task.find_image`] returns.

        Returns:
            [`Picture`] or [`Film`]: The pixels.

        Raises:
            BadRowError: If they cannot be read.
        """
        return open_as_stored(stored) if self.num_frames is None else open_video(stored, self.num_frames)


def load_task(
    benchmark: str | Benchmark,
    data: str | Path | Sequence[str | Path],
    *,
    image_folder: str | Path | None = None,
    annotations: str | Path | None = None,
    box_key: str | None = None,
    limit: int | None = None,
    num_frames: int | None = None,
) -> Task:
    """Read the questions of a benchmark.

    Args:
        benchmark (`str` or [`Benchmark`]): The benchmark, or its name in `BENCHMARKS`.
        data (`str`, `Path` or list of them): Files or folders with its rows, see [`read_rows`].
        image_folder (`str` or `Path`, *optional*): Folder that paths of images and videos start from; by default the
            folder of the data.
        annotations (`str` or `Path`, *optional*): File with the answers, if they are in another file.
        box_key (`str`, *optional*): Column with the ids of the box file; by default that of the questions' ids.
        limit (`int`, *optional*): Number of rows to read, from the first.
        num_frames (`int`, *optional*): Frames that are sampled from each video; by default that of the benchmark.

    Returns:
        [`Task`]: Questions, and rows that cannot be asked.

    Raises:
        EvaluationError: If there is no such benchmark, a file has another form, or no row can be asked.
        ImportError: If a file is Parquet and pyarrow is not installed.
        OSError: If a file cannot be read.
    """
    chosen = find_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    paths = [Path(path) for path in ([data] if isinstance(data, str | Path) else data)]
    if not paths:
        raise EvaluationError("`data` must name at least one file.")
    if limit is not None and limit < 1:
        raise EvaluationError(f"`limit` must be at least 1, got {limit}.")
    if num_frames is not None and chosen.num_frames is None:
        raise EvaluationError(f"`num_frames` must be left out: {chosen.title} has no videos.")
    if num_frames is not None and num_frames < 1:
        raise EvaluationError(f"`num_frames` must be at least 1, got {num_frames}.")
    rows = read_rows(paths)
    answers = None if annotations is None else read_annotations(annotations)
    if isinstance(answers, list):
        if len(answers) != len(rows):
            raise EvaluationError(
                f"`annotations`: {annotations} must have an answer for each of the {len(rows)} rows, got "
                f"{len(answers)}."
            )
        rows = [
            replace(row, values={**row.values, "answer": answer}) for row, answer in zip(rows, answers, strict=True)
        ]
        answers = None
    rows = rows[:limit]
    if image_folder is None:
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
    else:
        folder = Path(image_folder)
        if not folder.is_dir():
            raise EvaluationError(f"`image_folder` must be a folder, got {folder}.")
    task = Task(chosen, [], [], 0, folder, image_folder is not None, num_frames or chosen.num_frames)
    seen: set[Any] = set()
    left_out = 0
    for number, row in enumerate(rows):
        if chosen.leaves_out and not any(row.image().values()):
            left_out += 1
            continue
        try:
            if task.num_frames is not None:
                row = _with_id_of_video(row)
            question = make_question(number, row, chosen.prompt, chosen.answer, chosen.keys, box_key, answers)
            # Each category of POPE has the same ids, in a file of its own or in a column.
            part = (row.stem, question.category) if chosen.repeats_ids else None
            # Boxes and answers are found by the text of an id.
            if (part, str(question.key)) in seen:
                raise BadRowError(f"its id {question.key!r} is that of an earlier row")
            task.find_image(question)
        except BadRowError as error:
            key = next((row.values[name] for name in chosen.keys if name in row.values), number + 1)
            task.bad_rows.append(BadRow(row.place, key, str(error)))
        else:
            seen.add((part, str(question.key)))
            task.questions.append(question)
    if any(question.answer is not None for question in task.questions):
        silent = [question for question in task.questions if question.answer is None]
        task.bad_rows.extend(
            BadRow(question.row.place, question.key, "it has no answer, while other rows have one")
            for question in silent
        )
        task.questions[:] = [question for question in task.questions if question.answer is not None]
    if not task.questions:
        raise EvaluationError(f"`data`: no row of {paths[0]} can be asked. {describe(task.bad_rows)}")
    return replace(task, left_out=left_out)


def without_placeholders(task: Task, placeholders: Sequence[str]) -> Task:
    """Move questions whose text has a placeholder of images or videos to the bad rows."""
    found = {
        question.number: token for question in task.questions for token in placeholders if token in question.prompt
    }
    bad_rows = [
        BadRow(question.row.place, question.key, f"its text has {found[question.number]}, which is a placeholder")
        for question in task.questions
        if question.number in found
    ]
    questions = [question for question in task.questions if question.number not in found]
    return replace(task, questions=questions, bad_rows=[*task.bad_rows, *bad_rows])


def _with_id_of_video(row: Row) -> Row:
    """Give a row the id of its video in box files, as in the original: the name without extension."""
    name, ending = name_of_video(row), Path(name_of_video(row)).suffix
    return replace(row, box_id=name.removesuffix(ending) if ending.lower() in VIDEO_ENDINGS else name)


def describe(bad_rows: Sequence[BadRow]) -> str:
    """Name bad rows, at most a few."""
    named = "; ".join(map(str, bad_rows[:_NAMED]))
    return named + (f"; and {len(bad_rows) - _NAMED} more." if len(bad_rows) > _NAMED else ".")


__all__ = ["BadRow", "OnError", "Task", "describe", "load_task", "without_placeholders"]
