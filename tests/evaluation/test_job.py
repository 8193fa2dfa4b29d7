"""Answering: boxes and their changes, bad rows, and runs that are interrupted and resumed."""

import importlib
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, is_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mgllava.box_files import BoxFile
from mgllava.evaluation import BoxChanges, BoxSource, EvaluationError, job, load_task
from mgllava.evaluation.answering import open_as_stored
from mgllava.evaluation.box_sources import partners, shifted
from mgllava.evaluation.evaluate import finish
from mgllava.evaluation.job import Boxes, answer_task, with_boxes
from mgllava.folder_lock import FolderLock, FolderLockedError
from tests import processes

from .conftest import Echo, in_base64, png

NONE = Boxes(BoxSource.NONE, None, BoxChanges())
DETECTOR = Boxes(BoxSource.DETECTOR, None, BoxChanges())


def run(task, output, echo=None, boxes=NONE, settings=None, **options):
    echo = echo or Echo()
    return answer_task(task, lambda: echo, boxes, output, settings or {"x": 1}, **options)


def records(*lists):
    return [{"boxes": boxes, "labels": ["x"] * len(boxes), "scores": [0.9] * len(boxes)} for boxes in lists]


def test_answers_are_in_order_and_written(task, tmp_path):
    echo = Echo(lambda prompt, boxes: prompt.partition("?")[0])
    answers = run(task, tmp_path / "out", echo, batch_size=3)
    assert answers == [{"number": number, "key": number, "answer": f"Q{number}", "boxes": []} for number in range(4)]
    assert [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()] == answers
    assert echo.options == [{"box_limit": 100}] * 2


def test_an_image_with_several_questions_is_searched_once(task, tmp_path):
    echo = Echo(lambda prompt, boxes: str(boxes))
    answers = run(task, tmp_path / "out", echo, DETECTOR, batch_size=1)
    assert sum(echo.detected) == 3  # the fourth question is about the first image
    assert [line["answer"] for line in answers] == ["[[0, 0, 20, 15]]"] * 4


def test_boxes_of_a_file_and_the_truth(task, tmp_path):
    file = BoxFile([0, 1, 2, 3], records([[1, 2, 3, 4]], [], [[5, 6, 7, 8]], [[1, 1, 2, 2]]))
    seen = []
    echo = Echo(lambda prompt, boxes: seen.append(boxes) or "A")
    given = []
    echo.objects = lambda record, image, is_frame: given.append(sorted(record)) or record
    run(task, tmp_path / "a", echo, Boxes(BoxSource.FILE, file, BoxChanges()))
    assert seen == [[[1, 2, 3, 4]], [], [[5, 6, 7, 8]], [[1, 1, 2, 2]]] and given[0] == ["boxes", "labels", "scores"]
    # Without scores, all of them get tokens.
    run(task, tmp_path / "b", echo, Boxes(BoxSource.ORACLE, file, BoxChanges()))
    assert given[-1] == ["boxes"]


def test_true_boxes_of_the_column(write_tsv):
    line = {"question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    rows = [
        {**line, "index": 1, "boxes": "[[1, 2, 3, 4]]"},
        {**line, "index": 2},
        {**line, "index": 3, "boxes": "[[3, 2, 1, 4]]"},
    ]
    task = with_boxes(load_task("seed", write_tsv(rows)), Boxes(BoxSource.ORACLE, None, BoxChanges()))
    assert [question.key for question in task.questions] == [1]
    assert [bad.reason[:38] for bad in task.bad_rows] == [
        "it has no true boxes in the column `bo",
        "its boxes cannot be read: its `boxes`:",
    ]


def test_questions_without_boxes_are_named(task):
    file = BoxFile([0, 1, 3], records([], [], []), name="b.json")
    checked = with_boxes(task, Boxes(BoxSource.FILE, file, BoxChanges()))
    assert [bad.reason for bad in checked.bad_rows] == ["the box file has no boxes for the id 2"]
    assert len(checked.questions) == 3


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.7, 1.0])
def test_dropped_boxes(drop):
    boxes = [[x, 0, x + 1, 1] for x in range(400)]
    changes, more = BoxChanges(drop=drop, seed=3), BoxChanges(drop=min(1, drop + 0.2), seed=3)
    record = {"boxes": boxes, "labels": [str(box[0]) for box in boxes], "scores": [0.5] * 400}
    kept = changes.apply(record, "id", (500, 500))
    assert abs(len(kept["boxes"]) - 400 * (1 - drop)) < 40
    assert kept["labels"] == [str(box[0]) for box in kept["boxes"]] and len(kept["scores"]) == len(kept["boxes"])
    # A larger probability drops the same boxes and more.
    assert set(more.apply(record, "id", (500, 500))["labels"]) <= set(kept["labels"])
    if 0 < drop < 1:
        assert changes.apply(record, "other", (500, 500)) != kept
        assert BoxChanges(drop=drop, seed=4).apply(record, "id", (500, 500)) != kept


def test_shifted_boxes_keep_their_size_and_stay_inside():
    changes = BoxChanges(shift=8)
    boxes = [[40, 40, 60, 50], [0, 0, 10, 10], [95, 90, 100, 100], [-5, 20, 30, 110]]
    moved = changes.apply({"boxes": boxes}, 1, (100, 100))["boxes"]
    for old, new in zip(boxes, moved, strict=True):
        assert (new[2] - new[0], new[3] - new[1]) == (old[2] - old[0], old[3] - old[1])
        assert min(0, old[0]) <= new[0] and new[2] <= max(100, old[2])
    offset = [new - old for old, new in zip(boxes[0][:2], moved[0][:2], strict=True)]
    assert 7 < (offset[0] ** 2 + offset[1] ** 2) ** 0.5 < 9
    assert shifted([0, 0, 1, 1], 5, 0.0, (100, 100)) == [5, 0, 6, 1]


def test_shifts_have_all_directions_alike():
    boxes = [[500, 500, 510, 510]] * 2000
    moved = BoxChanges(shift=100).apply({"boxes": boxes}, 1, (1000, 1000))["boxes"]
    offsets = np.array([[new[0] - 500, new[1] - 500] for new in moved])
    assert np.abs(offsets.mean(axis=0)).max() < 6  # three standard deviations are 5
    assert [((offsets[:, 0] > 0) & (offsets[:, 1] > 0)).mean()] == pytest.approx([0.25], abs=0.05)


def test_changes_are_described_if_there_are_any():
    assert BoxChanges(seed=3).settings == {} and not BoxChanges(seed=3)
    assert BoxChanges(shift=2.5, seed=3).settings == {"drop": 0.0, "shift": 2.5, "shuffle": False, "seed": 3}
    for change in ({"drop": 0.5}, {"shift": 1.0}, {"shuffle": True}):
        assert BoxChanges(**change)


def test_progress_counts_the_questions_of_an_earlier_run_together(task, tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "out", Interrupted(3), batch_size=1, progress=lambda *call: calls.append(call))
    assert 0 < len(calls) <= 3 and set(calls) == {(1, 4)}
    done, calls = len(calls), []
    run(task, tmp_path / "out", batch_size=2, resume=True, progress=lambda *call: calls.append(call))
    assert calls[0][0] >= done and sum(count for count, _ in calls) == 4 and {total for _, total in calls} == {4}


def test_shuffled_boxes_are_those_of_another_image_and_scaled(write_tsv, tmp_path):
    rows = [
        {"index": n, "question": "Q?", "A": "x", "answer": "A", "image": in_base64("red", size)}
        for n, size in enumerate([(40, 30), (80, 90), (20, 20)])
    ]
    task = load_task("seed", write_tsv(rows))
    boxes = [[[4, 3, 8, 6]], [[8, 9, 16, 18]], [[2, 2, 4, 4], [0, 0, 2, 2]]]
    changes = BoxChanges(shuffle=True, seed=1)
    sizes, seen = [], []
    echo = Echo(lambda prompt, boxes: seen.append(boxes) or "A")
    echo.objects = lambda record, image, is_frame: sizes.append(image.size) or record
    run(task, tmp_path / "out", echo, Boxes(BoxSource.FILE, BoxFile([0, 1, 2], records(*boxes)), changes))
    given = partners([0, 1, 2], 1)
    assert all(key != partner for key, partner in given.items()) and sorted(given.values()) == [0, 1, 2]
    assert sizes == [(40, 30), (80, 90), (20, 20)]
    for number, (width, height) in enumerate(sizes):
        # All first boxes lie at a tenth to a fifth of their image.
        assert seen[number][0] == pytest.approx([width / 10, height / 10, width / 5, height / 5])
        assert len(seen[number]) == len(boxes[given[number]])


def test_shuffling_needs_two_images(write_tsv, tmp_path):
    line = {"index": 1, "question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    with pytest.raises(EvaluationError, match="`shuffle_boxes` needs the boxes of at least two images"):
        run(
            load_task("seed", write_tsv([line])),
            tmp_path / "out",
            boxes=Boxes(BoxSource.DETECTOR, None, BoxChanges(shuffle=True)),
        )


@pytest.mark.parametrize(("name", "value"), [("drop", 1.5), ("drop", -1), ("shift", -1), ("shift", float("nan"))])
def test_changes_out_of_range(name, value):
    with pytest.raises(EvaluationError, match=f"`{name}_boxes`"):
        BoxChanges(**{name: value})


@pytest.fixture
def half_broken(tmp_path, write_lines):
    for name, content in (("a", png()), ("b", b"no image"), ("c", b"")):
        (tmp_path / f"{name}.png").write_bytes(content)
    rows = [{"question_id": n, "image": f"{name}.png", "text": "Q", "answer": "A"} for n, name in enumerate("abc")]
    return load_task("exact-match", write_lines(rows))


def test_bad_images_stop_the_run(half_broken, tmp_path):
    with pytest.raises(
        EvaluationError,
        match=r"row 2 \(id 1\) cannot be asked: its image cannot be read.*[^.]\. Correct it.*`on_error`",
    ):
        run(half_broken, tmp_path / "out")


def test_bad_images_are_skipped_and_reported(half_broken, tmp_path):
    output = tmp_path / "out"
    answers = run(half_broken, output, on_error="skip")
    assert [sorted(line) for line in answers[1:]] == [["key", "number", "reason"]] * 2
    assert all("cannot be read" in line["reason"] for line in answers[1:])
    result = finish(half_broken, answers, output, {}, "model")
    assert (result.answered, result.skipped, result.scores["accuracy"]) == (1, 2, 100)
    written = json.loads((output / "scores.json").read_text())
    assert [row["id"] for row in written["skipped"]] == [1, 2]
    assert written["skipped"][0]["place"].endswith("row 2") and "cannot be read" in written["skipped"][0]["reason"]
    described = {"benchmark": "exact-match", "title": "Exact match", "model": "model", "no_score": "", "files": []}
    assert {name: written[name] for name in described} == described
    assert (result.main, result.categories, result.files, result.output) == ("accuracy", {}, [], output)
    assert written["rows"] == {"all": 3, "answered": 1, "skipped": 2, "left_out": 0}
    assert "2 rows were skipped" in written["notes"][0]


class Interrupted(Echo):
    def __init__(self, after):
        super().__init__(lambda prompt, boxes: prompt.partition("?")[0])
        self.left = after

    def answer(self, images, *args, **kwargs):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().answer(images, *args, **kwargs)


def test_an_interrupted_run_resumes_after_its_last_batch(task, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(task, output, Interrupted(2), batch_size=1)
    with pytest.raises(EvaluationError, match=r"an interrupted evaluation\. Pass `resume=True`"):
        run(task, output)
    from mgllava.box_files import BoxFileError

    with pytest.raises(BoxFileError, match=r"belongs to another job: settings\.x is 1, expected 2"):
        run(task, output, settings={"x": 2}, resume=True)
    # A kill in the middle of a line.
    (partial,) = output.glob("answers.jsonl.shards/*.partial")
    with partial.open("a") as file:
        file.write('{"start": 2, "st')
    echo = Interrupted(2)
    answers = run(task, output, echo, batch_size=1, resume=True)
    assert [line["answer"] for line in answers] == ["Q0", "Q1", "Q2", "Q3"] and len(echo.sizes) == 2
    assert sorted(path.name for path in output.iterdir()) == ["answers.jsonl", "settings.json"]


def test_finished_answers_are_scored_again_without_asking(task, tmp_path):
    output = tmp_path / "out"
    first = run(task, output)
    with pytest.raises(EvaluationError, match="a finished evaluation"):
        run(task, output)
    assert run(task, output, Interrupted(0), resume=True) == first
    with pytest.raises(EvaluationError, match=r"answers of other settings: settings\.x is 1, expected 2"):
        run(task, output, settings={"x": 2}, resume=True)
    assert run(task, output, Echo(lambda *_: "new"), overwrite=True)[0]["answer"] == "new"


def test_files_of_something_else_are_not_replaced(task, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"has settings\.json but no answers"):
        run(task, tmp_path / "out")
    assert (tmp_path / "out" / "settings.json").read_text() == "{}"
    assert len(run(task, tmp_path / "out", overwrite=True)) == 4


def test_a_killed_new_run_leaves_no_old_scores(task, tmp_path):
    output = tmp_path / "out"
    run(task, output)
    for name in ("scores.json", "report.html"):
        (output / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        run(task, output, Interrupted(1), overwrite=True, batch_size=1)
    assert not [path.name for path in output.iterdir() if path.name in ("settings.json", "scores.json", "report.html")]


def test_an_output_that_is_a_file_is_named(task, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(EvaluationError, match=r"out is a file, expected a folder"):
        run(task, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_two_runs_do_not_write_the_same_folder(task, tmp_path):
    output = tmp_path / "out"
    with FolderLock(output / "answers.jsonl", "evaluating"), pytest.raises(FolderLockedError):
        run(task, output)


ONE_OF_TWO = """
import sys
from pathlib import Path
from mgllava.evaluation import BoxChanges, BoxSource, job, load_task
from tests.evaluation.conftest import Echo
job._SLICE_SIZE = 1
boxes = job.Boxes(BoxSource.NONE, None, BoxChanges())
job.answer_task(load_task("seed", sys.argv[1]), Echo, boxes, Path(sys.argv[2]), {})
"""


@pytest.mark.slow
def test_a_bad_image_of_one_process_stops_both(write_tsv, tmp_path):
    line = {"question": "Q?", "A": "x", "answer": "A"}
    path = write_tsv([{**line, "index": 1, "image": in_base64()}, {**line, "index": 2, "image": "bm9w" * 40}])
    said = [tmp_path / "said.0", tmp_path / "said.1"]
    pair = [
        processes.start("-c", ONE_OF_TWO, path, tmp_path / "out", output=output, **environment)
        for output, environment in zip(said, processes.group(2), strict=True)
    ]
    for process in pair:
        process.join(120)
    codes = [process.exitcode for process in pair]
    for process in pair:
        process.kill()
    assert codes == [1, 1] and "row 2 (id 2) cannot be asked" in said[1].read_text()
    assert not (tmp_path / "out" / "answers.jsonl").exists()


@pytest.mark.parametrize("slow", [0, 1])
def test_two_processes_share_the_questions(slow, task, tmp_path, monkeypatch):
    """Threads stand for the processes; whichever is slow, the main one has all answers, and nobody waits forever."""
    monkeypatch.setattr(job, "_SLICE_SIZE", 1)
    barrier, here, prepare, asked = threading.Barrier(2), threading.local(), job._prepare, {}
    monkeypatch.setattr(job, "processes", lambda: here.state)

    def prepare_slowly(*arguments):
        time.sleep(0.1)
        prepare(*arguments)

    monkeypatch.setattr(job, "_prepare", prepare_slowly)

    def one(index):
        here.state = SimpleNamespace(
            num_processes=2, process_index=index, is_main_process=index == 0, wait_for_everyone=lambda: barrier.wait(5)
        )

        def reply(prompt, boxes):
            time.sleep(0.1 * (index == slow))
            asked.setdefault(index, []).append(prompt.partition("?")[0])
            return prompt.partition("?")[0]

        first = run(task, tmp_path / "out", Echo(reply))
        return first, run(task, tmp_path / "out", Interrupted(0), resume=True)

    with ThreadPoolExecutor(2) as pool:
        (answers, again), other = pool.map(one, range(2))
    assert [line["answer"] for line in answers] == ["Q0", "Q1", "Q2", "Q3"] and again == answers
    assert other == (None, None) and asked == {0: ["Q0", "Q2"], 1: ["Q1", "Q3"]}


def test_images_are_shown_as_stored(tmp_path, write_lines):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, format="JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    task = load_task("exact-match", write_lines([{"question_id": 1, "image": "a.jpg", "text": "Q", "answer": "A"}]))
    echo = Echo()
    answers = run(task, tmp_path / "out", echo)
    assert echo.sizes == [(40, 30)]
    finish(task, answers, tmp_path / "out", {}, "model")
    assert (
        "1 images have an EXIF orientation" in json.loads((tmp_path / "out" / "scores.json").read_text())["notes"][0]
    )


def test_answers_are_in_order_with_skipped_questions_before_them(tmp_path, write_lines):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(b"no image")
    rows = [{"question_id": n, "image": f"{name}.png", "text": "Q"} for n, name in enumerate("bab")]
    answers = run(load_task("exact-match", write_lines(rows)), tmp_path / "out", on_error="skip")
    assert [(line["number"], "answer" in line) for line in answers] == [(0, False), (1, True), (2, False)]


def test_an_image_that_gives_its_boxes_must_be_readable(tmp_path, write_lines):
    for name, content in (("a", png()), ("b", b"no image")):
        (tmp_path / f"{name}.png").write_bytes(content)
    rows = [{"question_id": n, "image": f"{name}.png", "text": "Q"} for n, name in enumerate("ab")]
    boxes = Boxes(BoxSource.DETECTOR, None, BoxChanges(shuffle=True))
    answers = run(load_task("exact-match", write_lines(rows)), tmp_path / "out", boxes=boxes, on_error="skip")
    assert (
        answers[0]["reason"].startswith("it gets the boxes of ")
        and "row 2, and there its image" in answers[0]["reason"]
    )
    assert answers[1]["reason"].startswith("its image cannot be read")


def test_boxes_that_the_model_refuses_are_named(task, tmp_path):
    def objects(record, image, is_frame):
        if image.getpixel((0, 0)) == (0, 0, 255):
            raise ValueError("they lie outside")
        return record

    echo = Echo()
    echo.objects = objects
    answers = run(task, tmp_path / "out", echo, DETECTOR, on_error="skip")
    assert [line.get("reason") for line in answers] == [None, None, "its boxes cannot be used: they lie outside", None]


def test_only_some_detections_are_remembered(write_tsv, tmp_path, monkeypatch):
    """Those of the images that were asked about last, and always those of the batch."""
    monkeypatch.setattr(job, "_REMEMBERED", 2)
    line = {"question": "Q?", "A": "x", "answer": "A"}
    images = [in_base64(color) for color in ("red", "green", "blue", "white")]
    rows = [{"index": n, **line, "image": images[k]} for n, k in enumerate([0, 1, 2, 2, 3, 3, 0, 1])]
    echo = Echo()
    run(load_task("seed", write_tsv(rows)), tmp_path / "out", echo, DETECTOR, batch_size=1)
    # One more than the number is kept until the next batch.
    assert echo.detected == [1, 1, 1, 0, 1, 0, 1, 1]
    wide = Echo()
    run(load_task("seed", write_tsv(rows)), tmp_path / "wide", wide, DETECTOR, batch_size=8)
    assert wide.detected == [4]


def test_records_of_videos_are_not_boxes_of_an_image(task):
    frames = [{"boxes": [], "labels": [], "scores": []}]
    file = BoxFile([0, 1, 2, 3], [*records([], [], []), {"frames": frames}])
    checked = with_boxes(task, Boxes(BoxSource.FILE, file, BoxChanges()))
    assert [bad.reason for bad in checked.bad_rows] == ["the box file has boxes of frames of a video for the id 3"]


def test_no_answered_question_is_an_error(half_broken, tmp_path):
    lines = [{"number": number, "key": number, "reason": "it is broken"} for number in range(3)]
    with pytest.raises(EvaluationError, match=r"No question could be asked: .*row 1: it is broken"):
        finish(half_broken, lines, tmp_path, {}, "model")


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 6, 8])
def test_orientations_that_turn_or_mirror_are_counted(orientation, tmp_path):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", exif=exif)
    picture = open_as_stored(tmp_path / "a.jpg")
    assert picture.is_turned == (orientation in (2, 6, 8)) and picture.size == (4, 3)


def test_damaged_metadata_do_not_turn_an_image(monkeypatch):
    def fail(self):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert not open_as_stored(Image.new("RGB", (4, 3))).is_turned


def test_records_that_threads_share_cannot_be_changed():
    kinds = {
        kind
        for name in (
            "answering",
            "benchmarks",
            "box_sources",
            "evaluate",
            "job",
            "questions",
            "scores",
            "tables",
            "task",
        )
        for kind in vars(importlib.import_module(f"mgllava.evaluation.{name}")).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__.startswith("mgllava.evaluation.")
    }
    assert len(kinds) == 12
    for kind in kinds:
        with pytest.raises(FrozenInstanceError):
            setattr(object.__new__(kind), fields(kind)[0].name, None)
