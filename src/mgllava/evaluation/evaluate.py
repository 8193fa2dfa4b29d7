"""Evaluate a model on a benchmark: ask, score, and write the files."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgllava.box_files import detection_settings, read_boxes
from mgllava.box_files.detectors import folder_digest
from mgllava.box_files.slices import processes
from mgllava.families import takes_boxes, takes_videos
from mgllava.model_files.json_files import write_json

from .answering import MAX_NEW_TOKENS, Answerer, check_context
from .benchmarks import Benchmark
from .box_sources import BoxChanges, BoxSource
from .errors import EvaluationError
from .job import Answers, Boxes, Progress, answer_task, skipped, with_boxes
from .paper import reported
from .report import REPORT, write_report
from .scores import Scores
from .task import OnError, Task, describe, load_task, without_placeholders

logger = logging.getLogger(__name__)

SCORES = "scores.json"


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        output: The folder.
        main: Name of the main score; `None` if that takes a judge.
        scores: All scores by name; percentages, except for points of MME.
        categories: The main score by category.
        answered: Number of answered questions.
        skipped: Number of rows that were skipped.
        files: Files for servers and judges.
    """

    output: Path
    main: str | None
    scores: dict[str, float]
    categories: dict[str, float]
    answered: int
    skipped: int
    files: list[Path]

    def __str__(self) -> str:
        said = f"{self.main}: {self.scores[self.main]:.1f}" if self.main is not None else "No score without a judge"
        said += f" ({self.answered:,} answers"
        said += f", {self.skipped:,} rows skipped). " if self.skipped else "). "
        return said + f"Wrote {self.output / REPORT} and {', '.join(path.name for path in self.files) or SCORES}."


def evaluate(
    model: str,
    benchmark: str | Benchmark,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    image_folder: str | Path | None = None,
    annotations: str | Path | None = None,
    boxes: str | BoxSource | None = None,
    box_file: str | Path | None = None,
    box_key: str | None = None,
    drop_boxes: float = 0.0,
    shift_boxes: float = 0.0,
    shuffle_boxes: bool = False,
    seed: int = 0,
    on_error: OnError = "stop",
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 4,
    num_frames: int | None = None,
    progress: Progress | None = None,
    **loading: Any,
) -> Evaluation | None:
    """Evaluate a model on a benchmark.

    Questions, answers and scores are those of the original's evaluation: greedy answers, no system message, images as
    they are stored (EXIF orientation is ignored), and its limit of boxes. Under `accelerate launch` every process
    calls this, and the main process scores.

    The folder gets `answers.jsonl`, `settings.json`, `scores.json`, `report.html` and, for some benchmarks, files for
    servers and judges.

    Args:
        model (`str`): Folder or Hub id.
        benchmark (`str` or [`Benchmark`]): The benchmark, or its name in `BENCHMARKS`.
        data (`str`, `Path` or list of them): Its files, see [`read_rows`].
        output (`str` or `Path`): The folder to write.
        image_folder (`str` or `Path`, *optional*): Folder that paths of images and videos start from; by default that
            of `data`.
        annotations (`str` or `Path`, *optional*): File with the answers of TextVQA, VQAv2, GQA, or of questions about
            videos.
        boxes (`str`, *optional*): `"none"`, `"file"` (of `box_file`), `"detector"` (that of the model) or `"oracle"`
            (true boxes, of the column `boxes` or of `box_file`, all of which get tokens). By default `"file"` with a
            `box_file`, else `"detector"` if the model has one, else `"none"`.
        box_file (`str` or `Path`, *optional*): Box file.
        box_key (`str`, *optional*): Column with the ids of the box file; by default that of the questions' ids.
        drop_boxes (`float`): Probability with which each box is dropped.
        shift_boxes (`float`): Distance in pixels of the image by which each box is moved, in a random direction.
        shuffle_boxes (`bool`): Whether each image gets the boxes of another one, scaled to its size.
        seed (`int`): Random seed of these changes.
        on_error (`str`): `"stop"` at rows that cannot be asked, or `"skip"` them.
        batch_size (`int`): Questions at a time.
        max_new_tokens (`int`): Maximum length of an answer in tokens; the original has 50 for its 13B model.
        limit (`int`, *optional*): Number of rows to read, from the first.
        resume (`bool`): Whether to resume an interrupted evaluation, or score a finished one again.
        overwrite (`bool`): Whether to start over.
        workers (`int`): Threads that open images and videos.
        num_frames (`int`, *optional*): Frames that are sampled from each video; by default 8, as in the original.
        progress (`Callable`, *optional*): Called with the number of questions just done, and of all.
        **loading: `revision`, `dtype`, `bits`, `device`, `attn_implementation` and `trust_remote_code`, as in
            `mgllava chat`.

    Returns:
        [`Evaluation`], *optional*: The scores; `None` in other than the main process.

    Raises:
        EvaluationError: If an argument is wrong, a file has another form, or a row cannot be asked and `on_error` is
            `"stop"`.
        ValueError: If the model cannot be loaded, or options of boxes are given for a model without boxes.
        FolderLockedError: If another run writes to the output.
        ImportError: If a file is Parquet and pyarrow is not installed.
        OSError: If something cannot be read or written.
    """
    source = None if boxes is None else _source(boxes)
    changes = BoxChanges(drop_boxes, shift_boxes, shuffle_boxes, seed)
    _check(source, box_file, changes, on_error, batch_size, max_new_tokens, workers, resume, overwrite)
    output = Path(output)
    # Everything that can be wrong with the files is found before the model is loaded.
    task = load_task(
        benchmark,
        data,
        image_folder=image_folder,
        annotations=annotations,
        box_key=box_key,
        limit=limit,
        num_frames=num_frames,
    )
    loaded = _Loaded(model, loading, source, box_file, changes)
    source = loaded.source
    if task.num_frames is not None:
        loaded.check_videos(task.num_frames)
    file = None if box_file is None else read_boxes(box_file)
    given = Boxes(source, file, changes)
    processor = loaded.processor
    tokens = [token for token in (processor.image_token, getattr(processor, "video_token", None)) if token]
    task = with_boxes(without_placeholders(task, tokens), given)
    if task.bad_rows and on_error == "stop":
        raise EvaluationError(
            f"`data`: {len(task.bad_rows)} rows cannot be asked: {describe(task.bad_rows)} Correct them, or set "
            "`on_error` to skip."
        )
    if not task.questions:
        raise EvaluationError(f"`data`: no row can be asked. {describe(task.bad_rows)}")
    settings = {
        "benchmark": task.benchmark.name,
        "model": loaded.identity,
        **{name: loading.get(name) for name in ("dtype", "bits", "attn_implementation")},
        "max_new_tokens": max_new_tokens,
        "boxes": {"source": source.value, **loaded.box_settings, **changes.settings},
    }
    if task.num_frames is not None:
        settings["num_frames"] = task.num_frames
    answers = answer_task(
        task,
        lambda: loaded.answerer(max_new_tokens),
        given,
        output,
        settings,
        on_error=on_error,
        batch_size=batch_size,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        progress=progress,
    )
    return None if answers is None else finish(task, answers, output, settings, model)


def _source(boxes: str | BoxSource) -> BoxSource:
    try:
        return BoxSource(boxes)
    except ValueError:
        names = ", ".join(source.value for source in BoxSource)
        raise EvaluationError(f"`boxes` must be one of {names}, got {boxes!r}.") from None


def _check(
    source: BoxSource | None,
    box_file: str | Path | None,
    changes: BoxChanges,
    on_error: str,
    batch_size: int,
    max_new_tokens: int,
    workers: int,
    resume: bool,
    overwrite: bool,
) -> None:
    if on_error not in ("stop", "skip"):
        raise EvaluationError(f"`on_error` must be stop or skip, got {on_error!r}.")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("workers", workers)):
        if value < 1:
            raise EvaluationError(f"`{name}` must be at least 1, got {value}.")
    if resume and overwrite:
        raise EvaluationError("`resume` continues an evaluation and `overwrite` starts over: pass one of them.")
    if source is BoxSource.FILE and box_file is None:
        raise EvaluationError("`boxes` is file, so `box_file` must name one.")
    if box_file is not None and source in (BoxSource.NONE, BoxSource.DETECTOR):
        raise EvaluationError(f"`box_file` must be left out if `boxes` is {source.value}.")
    if changes and source is BoxSource.NONE:
        raise EvaluationError(
            "`drop_boxes`, `shift_boxes` and `shuffle_boxes` change boxes, but `boxes` is none. Choose file, detector "
            "or oracle."
        )


class _Loaded:
    """The processor of a model, which says where boxes come from, and the model when it is needed."""

    def __init__(
        self,
        model: str,
        loading: Mapping[str, Any],
        source: BoxSource | None,
        box_file: str | Path | None,
        changes: BoxChanges,
    ):
        from mgllava.chat.loading import load

        asked = changes.settings
        options = dict(loading)
        state = processes()
        if state.num_processes > 1 and options.get("device", "auto") == "auto":
            # Otherwise every process would use all devices.
            options["device"] = str(state.device)
        self.model, self.processor = load(
            model,
            boxes=None if source in (None, BoxSource.NONE) else source,
            box_file=box_file,
            drop_boxes=asked.get("drop") or None,
            shift_boxes=asked.get("shift") or None,
            shuffle_boxes=asked.get("shuffle") or None,
            **options,
        )
        has_boxes = takes_boxes(self.processor)
        located = self.processor.locate_box_detector() if has_boxes else None
        if source is None:
            source = (
                BoxSource.FILE
                if box_file is not None
                else BoxSource.DETECTOR
                if located is not None
                else BoxSource.NONE
            )
            if changes and source is BoxSource.NONE:
                raise EvaluationError("`boxes`: the model has no box detector, so there are no boxes to change.")
        if source is BoxSource.DETECTOR and located is None:
            raise EvaluationError(f"`boxes` is detector, but {model} has none. Choose none, file or oracle.")
        self.source = source
        self.box_settings: dict[str, Any] = {}
        if source is BoxSource.DETECTOR:
            assert located is not None
            self.box_settings = {"detector": detection_settings(located)["detector"]}
        elif box_file is not None:
            self.box_settings = {"file": _file_digest(Path(box_file))}
        folder = Path(model)
        commit = getattr(self.model.config, "_commit_hash", None)
        self.identity = folder_digest(folder) if folder.is_dir() else f"{model}@{commit}"

    def check_videos(self, num_frames: int) -> None:
        """Refuse a model that takes no videos, or not so many frames."""
        if not takes_videos(self.processor):
            raise EvaluationError(
                "`model` takes no videos. A model of MG-LLaVA that was saved without them gets them from "
                "`mgllava.add_videos`."
            )
        check_context(self.model, num_frames * self.processor.image_seq_length)

    def answerer(self, max_new_tokens: int) -> Answers:
        """Return what answers questions."""
        return Answerer(self.model, self.processor, max_new_tokens)


def _file_digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return f"sha256:{content.hexdigest()}"


def finish(
    task: Task, answers: Sequence[Mapping[str, Any]], output: Path, settings: Mapping[str, Any], model: str
) -> Evaluation:
    """Score answers, and write scores, report and files for servers and judges.

    Args:
        task ([`Task`]): The questions.
        answers (`Sequence[Mapping]`): The answers, see [`answer_task`].
        output (`Path`): The folder to write.
        settings (`Mapping`): Shown in the report.
        model (`str`): Name of the model in the report.

    Returns:
        [`Evaluation`]: The scores.

    Raises:
        EvaluationError: If no question was answered.
    """
    by_number = {line["number"]: line for line in answers}
    asked = [question for question in task.questions if "answer" in by_number[question.number]]
    bad_rows = [*task.bad_rows, *skipped(task, answers)]
    if not asked:
        raise EvaluationError(f"No question could be asked: {describe(bad_rows)}")
    texts = [by_number[question.number]["answer"] for question in asked]
    benchmark = task.benchmark
    scores: Scores | None = None
    if benchmark.score is not None and task.has_answers:
        scores = benchmark.score(asked, texts)
    files: list[Path] = []
    if benchmark.upload is not None and (scores is None or benchmark.upload_for):
        files = benchmark.upload(output, asked, texts)
    notes = [] if scores is None else list(scores.notes)
    if turned := sum(by_number[question.number].get("is_turned", False) for question in asked):
        notes.append(f"{turned} images have an EXIF orientation, which the original ignores, and so does this.")
    if bad_rows:
        notes.append(f"{len(bad_rows)} rows were skipped; the scores are those of the other {len(asked)}.")
    if files:
        names = ", ".join(path.name for path in files)
        notes.append(f"{names}: for {benchmark.upload_for or 'a server'}.")
    reason = f"that takes {benchmark.upload_for}." if benchmark.score is None else "the file has no answers."
    summary = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "model": model,
        "main": None if scores is None else scores.main,
        "scores": {} if scores is None else scores.values,
        "categories": {} if scores is None else scores.categories,
        "no_score": "" if scores is not None else reason,
        "paper": reported(benchmark.paper),
        "rows": {
            "all": len(asked) + len(bad_rows) + task.left_out,
            "answered": len(asked),
            "skipped": len(bad_rows),
            "left_out": task.left_out,
        },
        "notes": notes,
        "skipped": [{"place": row.place, "id": row.key, "reason": row.reason} for row in bad_rows],
        "files": [path.name for path in files],
        "settings": dict(settings),
    }
    credits = (
        {}
        if scores is None
        else {question.number: credit for question, credit in zip(asked, scores.credits, strict=True)}
    )
    write_json(output / SCORES, summary)
    write_report(output / REPORT, task, summary, by_number, credits)
    return Evaluation(
        output,
        None if scores is None else scores.main,
        {} if scores is None else scores.values,
        {} if scores is None else scores.categories,
        len(asked),
        len(bad_rows),
        files,
    )


__all__ = ["SCORES", "Evaluation", "evaluate", "finish"]
