"""Answering the questions of a task, in one or several processes, so that it can be interrupted and resumed."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mgllava.atomic_files import replacing
from mgllava.box_files import BoxFile
from mgllava.box_files.box_file import describe_differences
from mgllava.box_files.slices import Batch, SliceFolder, processes, read_ahead
from mgllava.folder_lock import FolderLock
from mgllava.model_files.json_files import try_read_json, write_json

from .answering import Film, Visual, plain
from .box_sources import BoxChanges, BoxSource, boxes_of, partners, scaled
from .errors import BadRowError, EvaluationError
from .questions import Question
from .task import BadRow, OnError, Task

logger = logging.getLogger(__name__)

# Called with the number of questions just done (those of an earlier run together) and the number of all.
Progress = Callable[[int, int], None]

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"
# What is made of the answers.
_RESULTS = (SETTINGS, "scores.json", "report.html")
# Questions that a process takes at a time.
_SLICE_SIZE = 64
_BATCHES_AHEAD = 2
# Images whose detected boxes are kept.
_REMEMBERED = 512


class Answers(Protocol):
    """What [`Answerer`] does for a job."""

    takes_boxes: bool

    def detect(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Find the boxes of images."""

    def objects(self, record: Mapping[str, Any], image: Image.Image, is_frame: bool = False) -> dict[str, Any]:
        """Return the objects of an image, or of a frame of a video, that get tokens."""

    def answer(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        boxes: Sequence[Mapping[str, Any]] | None = None,
        **image_options: Any,
    ) -> list[str]:
        """Answer questions."""

    def answer_videos(
        self,
        clips: Sequence[Any],
        prompts: Sequence[str],
        boxes: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        **video_options: Any,
    ) -> list[str]:
        """Answer questions about videos."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of a task: their source, their file if they are from one, and changes to them."""

    source: BoxSource
    file: BoxFile | None
    changes: BoxChanges


@dataclass(frozen=True)
class _Asked:
    """A question with its opened image or video, and the question and image or video whose boxes it gets.

    `owner_id` is the same for all questions about this image or video.
    """

    question: Question
    visual: Visual
    owner: Question
    owner_visual: Visual
    owner_id: str


def answer_task(
    task: Task,
    answerer: Callable[[], Answers],
    boxes: Boxes,
    output: Path,
    settings: Mapping[str, Any],
    *,
    on_error: OnError = "stop",
    batch_size: int = 8,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 4,
    progress: Progress | None = None,
) -> list[dict[str, Any]] | None:
    """Answer the questions of a task, and write `answers.jsonl` into a folder.

    Answers are appended to files, so that a run that was interrupted resumes after its last batch. Under
    `accelerate launch` every process calls this; the main process returns all answers, the others `None`.

    Args:
        task ([`Task`]): The questions.
        answerer (`Callable`): Returns what answers them; called if there are questions left.
        boxes ([`Boxes`]): Their boxes.
        output (`Path`): The folder.
        settings (`Mapping`): What answers depend on; a run with other settings does not resume this one.
        on_error (`str`): `"stop"` at the first question that cannot be asked, or `"skip"` such questions.
        batch_size (`int`): Questions at a time.
        resume (`bool`): Whether to resume an interrupted run; without one, a run is started.
        overwrite (`bool`): Whether to start over.
        workers (`int`): Threads that open images.
        progress (`Callable`, *optional*): Called with the number of questions just done, and of all of this process.

    Returns:
        `list[dict]`, *optional*: Per question `number`, `key` and `answer`, and `boxes` with `labels` if the model
        takes boxes (for a video these in a list `frames`); or `number`, `key` and `reason` for one that was skipped.

    Raises:
        EvaluationError: If a question cannot be asked and `on_error` is `"stop"`, there are answers already, or the
            output is a file.
        BoxFileError: If the folder has an interrupted run of other settings.
        FolderLockedError: If another run writes there.
    """
    if output.exists() and not output.is_dir():
        raise EvaluationError(f"`output`: {output} is a file, expected a folder. Choose another one.")
    path = output / ANSWERS
    manifest = {
        "settings": dict(settings),
        "inputs_digest": task.digest,
        "images": len(task.questions),
        "shard_size": _SLICE_SIZE,
    }
    state = processes()
    folder = SliceFolder(path)
    with ExitStack() as stack:
        # The main process holds the lock for the other processes, which end with it.
        lock = stack.enter_context(FolderLock(path, "evaluating")) if state.is_main_process else None
        if state.is_main_process:
            _prepare(path, folder, manifest, resume, overwrite)
        state.wait_for_everyone()
        folder.read_manifest()
        if folder.manifest is None:
            return _read_answers(path) if state.is_main_process else None
        share = range(state.process_index, folder.num_slices, state.num_processes)
        _Job(task, answerer, boxes, on_error, batch_size, workers).run(folder, share, lock, progress)
        state.wait_for_everyone()
        if lock is None:
            return None
        lock.check()
        answers = [record for batch in folder.batches() for record in (*batch.records, *batch.unreadable)]
        answers.sort(key=lambda record: record["number"])
        # Before the answers: until these have their name, the run counts as interrupted.
        write_json(output / SETTINGS, {"settings": dict(settings), "questions_digest": task.digest})
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in answers), encoding="utf-8")
        folder.remove()
        return answers


def _prepare(path: Path, folder: SliceFolder, manifest: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Start or resume a run, or raise. Afterwards there is a manifest, unless all answers are there."""
    folder.clean()
    if overwrite:
        # Scores go before their answers, so that a kill leaves none beside others.
        for name in reversed(_RESULTS):
            path.with_name(name).unlink(missing_ok=True)
        folder.remove()
        path.unlink(missing_ok=True)
    begun = folder.has_begun()
    if (begun or path.exists()) and not resume:
        raise EvaluationError(
            f"{path.parent} holds {'an interrupted' if begun else 'a finished'} evaluation. Pass `resume=True` to "
            f"{'continue it' if begun else 'score its answers again'}, or `overwrite=True` to start over."
        )
    foreign = [name for name in _RESULTS if path.with_name(name).exists()]
    if foreign and not (begun or path.exists() or resume or overwrite):
        raise EvaluationError(
            f"{path.parent} has {', '.join(foreign)} but no answers, so they are of something else. Choose another "
            "`output`, or pass `overwrite=True` to replace them."
        )
    if path.exists() and not begun:
        made = try_read_json(path.with_name(SETTINGS)) or {}
        wanted = {"settings": manifest["settings"], "questions_digest": manifest["inputs_digest"]}
        if made != json.loads(json.dumps(wanted)):
            raise EvaluationError(
                f"{path} has the answers of other settings: {describe_differences(made, wanted)}. Choose another "
                "`output`, or pass `overwrite=True`."
            )
        folder.remove()
        return
    folder.begin(manifest)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class _Job:
    """The share of one process."""

    def __init__(
        self,
        task: Task,
        answerer: Callable[[], Answers],
        boxes: Boxes,
        on_error: OnError,
        batch_size: int,
        workers: int,
    ):
        self.task = task
        self.make_answerer = answerer
        self.answerer: Answers | None = None
        self.boxes = boxes
        self.on_error = on_error
        self.batch_size = batch_size
        self.workers = workers
        self._partners: dict[Any, Any] = {}
        self._owners: dict[Any, Question] = {}
        self._detections: dict[str, list[Mapping[str, Any]]] = {}
        if boxes.changes.shuffle:
            self._partners = partners([question.box_key for question in task.questions], boxes.changes.seed)
            self._owners = {question.box_key: question for question in reversed(task.questions)}

    def run(self, folder: SliceFolder, share: range, lock: FolderLock | None, progress: Progress | None) -> None:
        """Answer the questions of some slices."""
        total = sum(stop - start for start, stop in map(folder.bounds, share))

        def report(done: int) -> None:
            if progress is not None and done:
                progress(done, total)

        with ThreadPoolExecutor(self.workers) as pool:

            def upcoming() -> Iterator[tuple[int, int, list[Future[_Asked]]]]:
                for number in share:
                    start, stop = folder.bounds(number)
                    position = folder.next_image(number)
                    report(position - start)
                    for first in range(position, stop, self.batch_size):
                        questions = self.task.questions[first : min(first + self.batch_size, stop)]
                        yield number, first, [pool.submit(self._open, question) for question in questions]

            try:
                for number, first, opened in read_ahead(upcoming(), _BATCHES_AHEAD):
                    if lock is not None:
                        lock.check()
                    folder.append(number, self._answer(first, opened))
                    report(len(opened))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _open(self, question: Question) -> _Asked:
        stored = self.task.find_image(question)
        visual = self.task.open(stored)
        owner, owner_visual = question, visual
        if self._partners:
            owner = self._owners[self._partners[question.box_key]]
            try:
                stored = self.task.find_image(owner)
                owner_visual = self.task.open(stored)
            except BadRowError as error:
                raise BadRowError(f"it gets the boxes of {owner.row.place}, and there {error}") from error
        image_id = hashlib.sha256(stored).hexdigest() if isinstance(stored, bytes) else str(stored)
        return _Asked(question, visual, owner, owner_visual, image_id)

    def _answer(self, first: int, opened: Sequence[Future[_Asked]]) -> Batch:
        """Answer a batch; questions that cannot be asked are skipped, or end the run."""
        if self.answerer is None:
            self.answerer = self.make_answerer()
        batch = Batch(first, first + len(opened))
        asked: list[_Asked] = []
        records: list[list[Mapping[str, Any]] | None] = []
        for question, future in zip(self.task.questions[first : batch.stop], opened, strict=True):
            try:
                item = future.result()
                record = boxes_of(item.owner, self.boxes.source, self.boxes.file, self.task.num_frames)
                asked.append(item)
                records.append(record)
            except BadRowError as error:
                self._skip(batch, question, error)
        kept, given, objects = self._with_boxes(batch, asked, records)
        options = {"box_limit": self.task.benchmark.box_limit} if self.answerer.takes_boxes else {}
        texts: list[str] = []
        prompts = [item.question.prompt for item in kept]
        if kept and self.task.num_frames is None:
            of_images = None if given is None else [records[0] for records in given]
            texts = self.answerer.answer([item.visual.frames[0] for item in kept], prompts, of_images, **options)
        elif kept:
            clips = [item.visual.clip for item in kept if isinstance(item.visual, Film)]
            texts = self.answerer.answer_videos(clips, prompts, given, **options)
        for item, text, seen in zip(kept, texts, objects, strict=True):
            turned = {"is_turned": True} if item.visual.is_turned else {}
            batch.records.append(
                {"number": item.question.number, "key": item.question.key, "answer": text, **seen, **turned}
            )
        return batch

    def _with_boxes(
        self, batch: Batch, asked: Sequence[_Asked], records: Sequence[list[Mapping[str, Any]] | None]
    ) -> tuple[list[_Asked], list[list[Mapping[str, Any]]] | None, list[dict[str, Any]]]:
        """Detect missing boxes, change them, and find out which get tokens; for each frame of a visual."""
        assert self.answerer is not None
        if not self.answerer.takes_boxes:
            return list(asked), None, [{}] * len(asked)
        self._detect([item for item, record in zip(asked, records, strict=True) if record is None])
        complete = [
            self._detections[item.owner_id] if record is None else list(map(plain, record))
            for item, record in zip(asked, records, strict=True)
        ]
        is_video = self.task.num_frames is not None
        kept: list[_Asked] = []
        given: list[list[Mapping[str, Any]]] = []
        objects: list[dict[str, Any]] = []
        for item, of_frames in zip(asked, complete, strict=True):
            try:
                pairs = [
                    self._changed(item, frame, place, record)
                    for place, (frame, record) in enumerate(zip(item.visual.frames, of_frames, strict=True))
                ]
            except (TypeError, ValueError) as error:
                self._skip(batch, item.question, BadRowError(f"its boxes cannot be used: {error}"))
                continue
            kept.append(item)
            given.append([changed for changed, _ in pairs])
            seen = [of_frame for _, of_frame in pairs]
            objects.append({"frames": seen} if is_video else seen[0])
        return kept, given, objects

    def _changed(
        self, item: _Asked, frame: Image.Image, place: int, record: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Change the boxes of an image or frame; return them, and those that get tokens."""
        assert self.answerer is not None
        if item.owner is not item.question:
            record = scaled(record, item.owner_visual.size, frame.size)
        is_video = self.task.num_frames is not None
        key = f"{item.question.box_key}/{place}" if is_video else item.question.box_key
        changed = self.boxes.changes.apply(record, key, frame.size)
        seen = self.answerer.objects(changed, frame, is_frame=is_video)
        labels = {"labels": list(seen["labels"])} if "labels" in seen else {}
        return changed, {"boxes": [[round(value, 1) for value in box] for box in seen["boxes"]], **labels}

    def _detect(self, asked: Sequence[_Asked]) -> None:
        """Detect the boxes of images and videos, each once: benchmarks ask several questions about one."""
        assert self.answerer is not None
        wanted = {item.owner_id: item.owner_visual for item in asked}
        # Those of the last batches are enough, since questions about an image follow each other.
        while len(self._detections) > _REMEMBERED and (old := next(iter(self._detections))) not in wanted:
            del self._detections[old]
        new = {name: visual.frames for name, visual in wanted.items() if name not in self._detections}
        if self.task.num_frames is not None:  # the frames of a video are a batch
            self._detections |= {name: list(self.answerer.detect(frames)) for name, frames in new.items()}
            return
        found = self.answerer.detect([frame for frames in new.values() for frame in frames])
        self._detections |= zip(new, ([record] for record in found), strict=True)

    def _skip(self, batch: Batch, question: Question, error: BadRowError) -> None:
        if self.on_error == "stop":
            raise EvaluationError(
                f"{question.row.place} (id {question.key!r}) cannot be asked: {error}. Correct it, or "
                "set `on_error` to skip."
            ) from error
        logger.warning("Skipped %s (id %r): %s.", question.row.place, question.key, error)
        batch.unreadable.append({"number": question.number, "key": question.key, "reason": str(error)})


def with_boxes(task: Task, boxes: Boxes) -> Task:
    """Move questions whose boxes are not there to the bad rows."""
    questions, bad_rows = [], []
    for question in task.questions:
        try:
            boxes_of(question, boxes.source, boxes.file, task.num_frames)
        except BadRowError as error:
            bad_rows.append(BadRow(question.row.place, question.key, str(error)))
        else:
            questions.append(question)
    return replace(task, questions=questions, bad_rows=[*task.bad_rows, *bad_rows])


def skipped(task: Task, answers: Sequence[Mapping[str, Any]]) -> list[BadRow]:
    """Return the rows that were skipped while asking."""
    places = {question.number: question.row.place for question in task.questions}
    return [BadRow(places[line["number"]], line["key"], line["reason"]) for line in answers if "reason" in line]


__all__ = ["ANSWERS", "Answers", "Boxes", "answer_task", "processes", "skipped", "with_boxes"]
