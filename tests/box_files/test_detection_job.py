"""Detection jobs: complete, in order, and with the same result for any number of processes and interruptions."""

import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from mgllava.box_files import (
    BoxFileError,
    detect_images,
    detection_job,
    detection_settings,
    list_images,
    read_boxes,
    slices,
)
from mgllava.folder_lock import FolderLockedError
from tests import processes
from tests.box_files.conftest import NUMBER
from tests.box_files.stub_detector import StubDetector, begin

UNREADABLE = ["0000.png", "0250.png", "0499.png"]
OPTIONS = {"shard_size": 48, "batch_size": 4}


@pytest.fixture(scope="session")
def undisturbed(many_images, tmp_path_factory):
    """The box files of a run without interruptions, by extension."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outputs = {extension: folder / extension / f"boxes.{extension}" for extension in ("json", "parquet")}
    for output in outputs.values():
        detect_images(many_images, output, StubDetector(), **OPTIONS)
    return outputs


def files_of(output):
    names = [output, output.with_suffix(".settings.json"), output.with_suffix(".unreadable.jsonl")]
    return {path.name: path.read_bytes() for path in names if path.exists()}


def leftovers(output):
    return [path.name for path in output.parent.iterdir() if "shards" in path.name or "partial" in path.name]


def test_every_image_has_its_boxes_in_order(many_images, undisturbed):
    images, detector = list_images(many_images), StubDetector()
    file = read_boxes(undisturbed["parquet"])
    readable = [name for entry in images.entries if (name := entry.image) not in UNREADABLE]
    assert list(file) == readable and len(readable) == NUMBER - 3
    for number in range(1, NUMBER, 50):
        image = images.load(number)
        expected = detector.detect([image])[0]
        found = file[f"{number:04d}.png"]
        assert {name: found[name] for name in expected} == expected
        assert (found["width"], found["height"]) == image.size and found["image"] == f"{number:04d}.png"
    assert file.settings == detection_settings(detector)
    from_json = read_boxes(undisturbed["json"])
    assert [from_json[name]["boxes"] for name in readable] == [file[name]["boxes"] for name in readable]


def test_unreadable_images_are_counted_logged_and_listed(many_images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        summary = detect_images(many_images, tmp_path / "boxes.json", StubDetector())
    assert summary.unreadable == 3 and summary.records == NUMBER - 3
    listed = [json.loads(line) for line in summary.unreadable_list.read_text().splitlines()]
    assert [entry["image"] for entry in listed] == UNREADABLE
    assert "UnreadableImageError" in listed[1]["reason"]
    assert "Skipped 0250.png (UnreadableImageError" in caplog.text
    assert "Unreadable images: 3, see" in str(summary)
    # The list goes with the images.
    (tmp_path / "whole").mkdir()
    shutil.copy(many_images / "0001.png", tmp_path / "whole" / "0001.png")
    summary = detect_images(tmp_path / "whole", tmp_path / "boxes.json", StubDetector(), overwrite=True)
    assert summary.unreadable == 0 and "Unreadable" not in str(summary) and not summary.unreadable_list.exists()


def test_no_readable_image_is_an_error_without_output(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(BoxFileError, match=r"None of the 1 images can be read; the first one: a\.jpg"):
        detect_images(tmp_path, tmp_path / "boxes.json", StubDetector())
    assert not (tmp_path / "boxes.json").exists()


def test_sizes_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    detect_images(tmp_path, tmp_path / "boxes.parquet", StubDetector())
    record = read_boxes(tmp_path / "boxes.parquet")["a.jpg"]
    assert (record["width"], record["height"]) == (10, 30)


def test_questions_about_one_image_share_its_boxes_and_one_detection(some_images, tmp_path):
    lines = [{"question_id": number, "image": f"{number % 2}.png"} for number in range(6)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    log = tmp_path / "log"
    detect_images(questions, tmp_path / "boxes.json", StubDetector(log=str(log)), image_folder=some_images)
    file = read_boxes(tmp_path / "boxes.json")
    assert sorted(file) == [0, 1, 2, 3, 4, 5]
    assert file[0]["boxes"] == file[4]["boxes"] and len(log.read_text().split()) == 2


def test_labels_and_threshold_reach_the_detector_and_the_settings(some_images, tmp_path):
    given = []

    class Listening(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            given.append((labels, threshold, batch_size))
            return super().detect(images, labels, threshold, batch_size)

    detector = Listening()
    detect_images(some_images, tmp_path / "b.json", detector, labels=["fork"], threshold=0.4, batch_size=16)
    assert given == [(["fork"], 0.4, 16)]
    settings = read_boxes(tmp_path / "b.json").settings
    detect_images(some_images, tmp_path / "c.json", detector)
    assert given[1:] == [(None, 0.2, 8)] * 2 and read_boxes(tmp_path / "c.json").settings == detection_settings(
        detector
    )
    assert settings == detection_settings(detector, ["fork"], 0.4)
    assert (settings["labels"], settings["threshold"]) == (["fork"], 0.4)


def test_tensors_and_fractions_become_plain_values(some_images, tmp_path):
    import torch

    class Tensors(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            return [
                {"boxes": torch.tensor([[0.5, 1, 2, 3]]), "labels": ["cup"], "scores": torch.tensor([0.25])}
                for _ in images
            ]

    detect_images(some_images, tmp_path / "b.parquet", Tensors())
    record = read_boxes(tmp_path / "b.parquet")["3.png"]
    assert record["boxes"] == [[0.5, 1.0, 2.0, 3.0]] and record["scores"] == [0.25]


def test_detector_that_skips_an_image_is_an_error(some_images, tmp_path):
    class Losing(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            return super().detect(images[1:])

    with pytest.raises(BoxFileError, match="gave 7 results for 8 images"):
        detect_images(some_images, tmp_path / "b.json", Losing())


def test_show_draws_every_image(some_images, tmp_path):
    show = some_images / "shown"
    for _ in range(2):
        detect_images(some_images, tmp_path / "b.json", StubDetector(), show=show, overwrite=True)
        names = sorted(path.name for path in show.iterdir())
        assert names == [f"{number:06d}_{number}.jpg" for number in range(10)]
    assert len(read_boxes(tmp_path / "b.json")) == 10  # drawings of the first run are not input of the second


# Interruptions


def _killed_runs(many_images, output, kills, seconds, seed):
    """Run the job in processes that are killed at random moments, and in one that finishes."""
    moments = random.Random(seed)
    log, started = output.parent / "log", output.parent / "started"
    for kill in range(kills + 1):
        process = processes.SERVER.Process(
            target=begin,
            args=(str(started), str(many_images), str(output), StubDetector(seconds=seconds, log=str(log))),
            kwargs={**OPTIONS, "resume": True},
        )
        started.unlink(missing_ok=True)
        process.start()
        while not started.exists():
            time.sleep(0.005)
        if kill == kills:
            process.join()
            assert process.exitcode == 0
        else:
            # During the first batches. All 20 runs together are shorter than the work of 125 batches.
            time.sleep(0.1 + moments.uniform(0, 5 * seconds))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL, "the job was done before the last kill"
    return log.read_text().split()


@pytest.mark.parametrize(
    ("extension", "kills", "seed"),
    [
        ("parquet", 5, 0),
        pytest.param("json", 20, 1, marks=pytest.mark.slow),
        pytest.param("parquet", 20, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_the_result_is_the_same(many_images, undisturbed, tmp_path, extension, kills, seed):
    output = tmp_path / f"boxes.{extension}"
    detected = _killed_runs(many_images, output, kills, seconds=0.05, seed=seed)
    assert files_of(output) == files_of(undisturbed[extension])
    assert leftovers(output) == []
    # At most one batch is repeated after each kill.
    assert NUMBER - 3 <= len(detected) <= NUMBER - 3 + kills * OPTIONS["batch_size"]


class Killed(BaseException):
    """Simulates a kill."""


def _kill(*_, **__):
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (slices.os, "fsync"),  # a slice is written, but not renamed
        (slices.os, "replace"),  # there is no manifest
        (detection_job, "_merge"),  # all slices are complete
        (detection_job, "write_boxes"),
        (Path, "replace"),  # the output is written, but not renamed
        (slices.SliceFolder, "remove"),  # there are the output and all slices
        (slices.shutil, "rmtree"),  # the slices are being removed
    ],
)
@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_killed_between_two_steps_the_result_is_the_same(
    many_images, undisturbed, tmp_path, monkeypatch, owner, name, extension
):
    output = tmp_path / f"boxes.{extension}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, _kill)
        detect_images(many_images, output, StubDetector(), **OPTIONS)
    detect_images(many_images, output, StubDetector(), resume=True, **OPTIONS)
    assert files_of(output) == files_of(undisturbed[extension])
    assert leftovers(output) == []


def test_batch_of_an_incomplete_line_is_repeated(many_images, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "boxes.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(detection_job, "_merge", _kill)
        detect_images(many_images, output, StubDetector(), **OPTIONS)
    folder = tmp_path / "boxes.json.shards"
    complete = folder / "shard-000002.jsonl"
    complete.with_name(complete.name + ".partial").write_bytes(complete.read_bytes()[:-10])
    complete.unlink()
    detector = StubDetector()
    detect_images(many_images, output, detector, resume=True, **OPTIONS)
    assert detector.calls == 1
    assert files_of(output) == files_of(undisturbed["json"])


def test_interrupted_jobs_of_earlier_releases_can_be_resumed(some_images, tmp_path, monkeypatch):
    """The manifest has the defaults that docs/detect.md gives."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(detection_job, "_merge", _kill)
        detect_images(some_images, tmp_path / "boxes.json", StubDetector())
    manifest = json.loads((tmp_path / "boxes.json.shards" / "manifest.json").read_text())
    assert (manifest.pop("shard_size"), manifest.pop("images")) == (512, 10)
    digest = list_images(some_images).digest
    assert manifest == {"settings": detection_settings(StubDetector()), "inputs_digest": digest}


def test_a_few_items_are_read_ahead():
    read = []
    items = slices.read_ahead((read.append(number) or number for number in range(6)), 2)
    assert [(next(items), len(read)) for _ in range(6)] == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (5, 6)]
    assert next(items, None) is None


def test_damaged_slice_is_detected_again(many_images, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "boxes.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(detection_job, "_merge", _kill)
        detect_images(many_images, output, StubDetector(), **OPTIONS)
    shard = tmp_path / "boxes.json.shards" / "shard-000001.jsonl"
    shard.write_bytes(b"".join(shard.read_bytes().splitlines(keepends=True)[1:]))
    detect_images(many_images, output, StubDetector(), resume=True, **OPTIONS)
    assert files_of(output) == files_of(undisturbed["json"])


def test_progress_counts_the_images_of_an_earlier_run(many_images, tmp_path, monkeypatch):
    class Dying(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            if self.calls == 30:
                raise Killed
            return super().detect(images)

    with pytest.raises(Killed):
        detect_images(many_images, tmp_path / "b.json", Dying(), **OPTIONS)
    seen = []
    detector = StubDetector()
    detect_images(
        many_images, tmp_path / "b.json", detector, resume=True, **OPTIONS, progress=lambda *now: seen.append(now)
    )
    assert seen[0] == (48, NUMBER) and sum(done for done, _ in seen) == NUMBER
    assert detector.calls == 125 - 30


def test_slice_whose_last_batch_is_done_only_needs_its_name(some_images, tmp_path, interrupted):
    shard = tmp_path / "boxes.json.shards" / "shard-000001.jsonl"
    shard.rename(shard.with_name(shard.name + ".partial"))
    detector = StubDetector()
    assert detect_images(some_images, interrupted, detector, shard_size=5, resume=True).records == 10
    assert detector.calls == 0


def slice_folder(tmp_path):
    folder = slices.SliceFolder(tmp_path / "boxes.json")
    folder.begin({"settings": {}, "inputs_digest": "", "images": 5, "shard_size": 3})
    return folder


def test_batches_that_do_not_follow_each_other_are_damage(tmp_path):
    folder = slice_folder(tmp_path)
    assert folder.num_slices == 2 and [folder.bounds(number) for number in (0, 1)] == [(0, 3), (3, 5)]
    folder.append(0, slices.Batch(0, 1))
    with pytest.raises(BoxFileError, match=r"damaged after input 1 of 0 to 3\. Run the same command"):
        folder.append(0, slices.Batch(2, 3))
    assert folder.next_image(0) == 1
    for batch in (slices.Batch(1, 3), slices.Batch(3, 4)):
        folder.append(batch.start // 3, batch)
    assert folder.next_image(0) == 3 and folder.next_image(1) == 4
    with pytest.raises(BoxFileError, match=r"shard-000001.* is absent or damaged \(inputs 3 to 5, complete up to 3\)"):
        list(folder.batches())
    folder.append(1, slices.Batch(4, 5))
    assert [(batch.start, batch.stop) for batch in folder.batches()] == [(0, 1), (1, 3), (3, 4), (4, 5)]


LINES = [{"start": 0, "stop": 1}, {"start": 1, "stop": 3}]


@pytest.mark.parametrize(
    ("damaged", "position"),
    [
        ([LINES[1]], 0),
        ([{"start": 0, "stop": 4}], 0),
        ([{"start": 0, "stop": 0}, LINES[0]], 0),
        ([LINES[0], LINES[0]], 1),
        ([LINES[0], "null"], 1),
        ([LINES[0], {"start": 1, "stop": 3, "more": 1}], 1),
        ([LINES[0], "{"], 1),
        ([*LINES, LINES[0]], 3),
    ],
)
def test_damaged_lines_and_all_after_them_are_done_again(tmp_path, damaged, position):
    folder = slice_folder(tmp_path)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in damaged]
    path = tmp_path / "boxes.json.shards" / "shard-000000.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    if position < 3:
        with pytest.raises(BoxFileError, match=r"inputs 0 to 3, complete up to \d"):
            list(folder.batches())
    assert folder.next_image(0) == position
    if position < 3:
        kept = path.with_name(path.name + ".partial").read_text()
        assert kept == "".join(f"{json.dumps(line)}\n" for line in LINES[:position])
    # The end of a line is part of it.
    path.write_text(json.dumps(LINES[0]))
    assert folder.next_image(0) == 0


def test_slices_without_their_manifest_are_not_removed(some_images, tmp_path, interrupted):
    shards = tmp_path / "boxes.json.shards"
    for content in ("{}", '{"settings": {}}', "[]"):
        (shards / "manifest.json").write_text(content)
        with pytest.raises(BoxFileError, match=r"is in the way: .*\(no manifest\.json of a job\)"):
            detect_images(some_images, interrupted, StubDetector(), overwrite=True)
    (shards / "manifest.json").unlink()
    with pytest.raises(BoxFileError, match=r"is in the way: .*\(no manifest\.json of a job\)"):
        detect_images(some_images, interrupted, StubDetector())
    assert len(list(shards.glob("shard-*"))) == 2


@pytest.mark.parametrize("calls", [1, 2])
def test_job_that_lost_its_lock_writes_nothing_more(some_images, tmp_path, calls):
    class Losing(StubDetector):
        def detect(self, images, **options):
            if self.calls == calls - 1:
                (tmp_path / "boxes.json.lock").unlink()
            return super().detect(images, **options)

    with pytest.raises(FolderLockedError, match="lost its lock"):
        detect_images(some_images, tmp_path / "boxes.json", Losing(), batch_size=5, workers=1)
    assert not (tmp_path / "boxes.json").exists()


# Several processes


def test_two_processes_make_the_same_file(many_images, undisturbed, tmp_path):
    output = tmp_path / "boxes.parquet"
    said, logs = ([tmp_path / f"{name}.{rank}" for rank in (0, 1)] for name in ("said", "log"))
    pair = []
    for rank, environment in enumerate(processes.group(2)):
        arguments = json.dumps([str(many_images), str(output), {"log": str(logs[rank])}, OPTIONS])
        pair.append(
            processes.start("-m", "tests.box_files.stub_detector", arguments, output=said[rank], **environment)
        )
    for process in pair:
        process.join(300)
    assert [process.exitcode for process in pair] == [0, 0], said[0].read_text() + said[1].read_text()
    assert files_of(output) == files_of(undisturbed["parquet"])
    detected = [len(log.read_text().split()) for log in logs]
    assert sum(detected) == NUMBER - 3 and min(detected) > NUMBER / 3
    assert leftovers(output) == []


def test_tasks_of_an_array_and_a_last_call_make_the_same_file(many_images, undisturbed, tmp_path):
    output = tmp_path / "boxes.parquet"
    for part in (2, 0, 1):
        detector = StubDetector()
        task = {"array_task": (part, 3), "resume": True}
        assert detect_images(many_images, output, detector, **task, **OPTIONS) is None
        assert 0 < detector.calls < 60
    assert not output.exists()
    detector = StubDetector()
    detect_images(many_images, output, detector, resume=True, **OPTIONS)
    assert detector.calls == 0
    assert files_of(output) == files_of(undisturbed["parquet"])


def test_fewer_slices_than_processes_are_a_warning(some_images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        detect_images(some_images, tmp_path / "b.json", StubDetector(), array_task=(1, 4))
    assert "1 slices for 4 processes" in caplog.text
    caplog.clear()
    detect_images(some_images, tmp_path / "c.json", StubDetector(), array_task=(1, 2), shard_size=5)
    assert not caplog.text


# Existing outputs and interrupted jobs


def test_complete_output_is_not_computed_again(some_images, tmp_path, caplog):
    output = tmp_path / "boxes.parquet"
    detect_images(some_images, output, StubDetector())
    with pytest.raises(BoxFileError, match=r"boxes\.parquet exists\. .*`overwrite=True`"):
        detect_images(some_images, output, StubDetector())
    detector = StubDetector()
    with caplog.at_level(logging.INFO):
        assert detect_images(some_images, output, detector, resume=True) is None and detector.calls == 0
    assert "boxes.parquet is complete" in caplog.text
    assert detect_images(some_images, output, detector, overwrite=True).records == 10 and detector.calls == 2
    with pytest.raises(BoxFileError, match=r"another job made it: settings\.threshold is 0\.2, expected 0\.3"):
        detect_images(some_images, output, StubDetector(), threshold=0.3, resume=True)


def test_new_job_that_failed_before_its_first_batch_leaves_the_output_complete(some_images, tmp_path):
    class Absent(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            raise OSError("no such model")

    output = tmp_path / "boxes.json"
    detect_images(some_images, output, StubDetector())
    with pytest.raises(OSError, match="no such model"):
        detect_images(some_images, output, Absent(), overwrite=True)
    detector = StubDetector()
    assert detect_images(some_images, output, detector, resume=True) is None and detector.calls == 0
    assert leftovers(output) == []


@pytest.fixture
def interrupted(some_images, tmp_path, monkeypatch):
    """A job that was killed before it was merged."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(detection_job, "_merge", _kill)
        detect_images(some_images, tmp_path / "boxes.json", StubDetector(), shard_size=5)
    return tmp_path / "boxes.json"


def test_interrupted_job_needs_resume_or_overwrite(some_images, interrupted):
    with pytest.raises(BoxFileError, match=r"holds a job that was interrupted\. Pass `resume=True`"):
        detect_images(some_images, interrupted, StubDetector(), shard_size=5)
    detector = StubDetector()
    assert detect_images(some_images, interrupted, detector, shard_size=5, overwrite=True).records == 10
    assert detector.calls == 2


def test_another_job_is_not_resumed(some_images, interrupted):
    for options, said in [
        ({"threshold": 0.5}, r"settings\.threshold is 0\.2, expected 0\.5"),
        ({"detector": StubDetector(mode="clean")}, r'settings\.detector\.mode is "faithful", expected "clean"'),
        ({"shard_size": 4}, "shard_size is 5, expected 4"),
    ]:
        options = {"detector": StubDetector(), "shard_size": 5, **options}
        with pytest.raises(BoxFileError, match=f"belongs to another job: .*{said}"):
            detect_images(some_images, interrupted, resume=True, **options)
    Image.new("RGB", (2, 2)).save(some_images / "new.png")
    with pytest.raises(BoxFileError, match=r"belongs to another job: images is 10, expected 11; inputs_digest is"):
        detect_images(some_images, interrupted, StubDetector(), shard_size=5, resume=True)


def test_job_that_failed_before_its_first_batch_is_replaced(some_images, tmp_path):
    class Absent(StubDetector):
        def detect(self, images, labels=None, threshold=0.2, batch_size=8):
            raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        detect_images(some_images, tmp_path / "b.json", Absent(mode="typo"))
    assert detect_images(some_images, tmp_path / "b.json", StubDetector()).records == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "boxes.txt"}, r"must end in \.json or \.parquet"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"num_frames": 0}, "`num_frames` must be at least 1"),
        ({"array_task": (3, 3)}, r"`array_task` must be \(i, n\)"),
        ({"array_task": (-1, 3)}, r"`array_task` must be \(i, n\)"),
        ({"array_task": (1, 3), "overwrite": True}, "would delete the work of the others"),
        ({"resume": True, "overwrite": True}, "pass one of them"),
    ],
)
def test_wrong_arguments_are_refused_before_the_work(some_images, tmp_path, options, said):
    output = tmp_path / options.pop("output", "boxes.json")
    with pytest.raises(BoxFileError, match=said):
        detect_images(some_images, output, StubDetector(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_ids_of_two_types_are_refused_for_parquet_before_the_work(some_images):
    questions = some_images / "questions.jsonl"
    questions.write_text('{"id": 1, "image": "1.png"}\n{"id": "2", "image": "2.png"}')
    detector = StubDetector()
    with pytest.raises(BoxFileError, match="ids of one type, but the input has int and str"):
        detect_images(questions, some_images / "boxes.parquet", detector)
    assert detector.calls == 0
    assert detect_images(questions, some_images / "boxes.json", detector).records == 2
