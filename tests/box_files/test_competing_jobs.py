"""Two jobs on one output, full disks, folders of the user: finished work is kept, and no other file is deleted."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time

import pytest

from mgllava.box_files import BoxFileError, detect_images, read_boxes
from mgllava.box_files.slices import Batch, SliceFolder
from mgllava.folder_lock import FolderLock, FolderLockedError
from tests import processes
from tests.box_files.stub_detector import StubDetector

OPTIONS = {"shard_size": 2, "batch_size": 1, "workers": 1}


def start(images, output, **options):
    """Start a slow job in a process, and wait until it has written a batch."""
    arguments = [str(images), str(output), {"seconds": 0.3}, {**OPTIONS, **options}]
    log = output.with_name("log.txt")
    process = processes.start("-m", "tests.box_files.stub_detector", json.dumps(arguments), output=log)
    shards = output.with_name(output.name + ".shards")
    deadline = time.monotonic() + 120
    while not any(shards.glob("shard-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.is_alive(), log.read_text()
    return process


@pytest.fixture
def expected(some_images, tmp_path):
    detect_images(some_images, tmp_path / "expected.json", StubDetector(), **OPTIONS)
    return (tmp_path / "expected.json").read_text()


def test_second_job_is_an_error_and_the_first_one_finishes(some_images, tmp_path, expected):
    output = tmp_path / "boxes.json"
    first = start(some_images, output)
    for options in ({}, {"resume": True}, {"overwrite": True}, {"array_task": (0, 2), "resume": True}):
        with pytest.raises(FolderLockedError, match=r"written by another run: detecting boxes \(process \d+ on"):
            detect_images(some_images, output, StubDetector(), **OPTIONS, **options)
    first.join(60)
    assert first.exitcode == 0
    assert output.read_text() == expected
    assert not output.with_name("boxes.json.lock").exists()


def test_tasks_of_an_array_run_together_but_none_twice(some_images, tmp_path, expected):
    output = tmp_path / "boxes.json"
    with FolderLock(output.with_name("boxes.json.task-0-of-2"), "detecting part 0 of 2"):
        with pytest.raises(FolderLockedError, match="detecting part 0 of 2"):
            detect_images(some_images, output, StubDetector(), array_task=(0, 2), resume=True, **OPTIONS)
        with pytest.raises(FolderLockedError, match="their array has 2 tasks, not 3"):
            detect_images(some_images, output, StubDetector(), array_task=(1, 3), resume=True, **OPTIONS)
        with pytest.raises(FolderLockedError, match="written by array tasks: detecting part 0 of 2"):
            detect_images(some_images, output, StubDetector(), resume=True, **OPTIONS)
        assert detect_images(some_images, output, StubDetector(), array_task=(1, 2), resume=True, **OPTIONS) is None
    detector = StubDetector()
    detect_images(some_images, output, detector, resume=True, **OPTIONS)
    assert output.read_text() == expected and detector.calls == 6


def test_locks_of_dead_tasks_and_of_other_outputs_are_in_nobodys_way(some_images, tmp_path):
    output = tmp_path / "boxes.json"
    with FolderLock(output.with_name("boxes.json.task-1-of-3"), "detecting part 1 of 3") as lock:
        content = json.loads(lock.file.read_text())
    lock.file.write_text(json.dumps({**content, "process_started": "1"}))
    with FolderLock(output.with_name("other.json.task-0-of-2"), "detecting part 0 of 2"):
        assert detect_images(some_images, output, StubDetector(), array_task=(0, 2), **OPTIONS) is None
        detect_images(some_images, output, StubDetector(), resume=True, **OPTIONS)
    assert len(read_boxes(output)) == 10


def test_task_of_another_job_does_not_join_an_array(some_images, tmp_path):
    output = tmp_path / "boxes.json"
    with FolderLock(output.with_name("boxes.json.task-1-of-2"), "detecting part 1 of 2"):
        detect_images(some_images, output, StubDetector(), array_task=(0, 2), **OPTIONS)
        with pytest.raises(BoxFileError, match=r"belongs to another job: settings\.threshold is 0.2, expected 0.5"):
            detect_images(
                some_images, output, StubDetector(), array_task=(0, 2), resume=True, threshold=0.5, **OPTIONS
            )


def test_task_that_starts_at_the_same_time_keeps_the_work_of_another_one(tmp_path, monkeypatch):
    manifest = {"settings": {}, "inputs_digest": "0", "images": 4, "shard_size": 2}
    first, second = (SliceFolder(tmp_path / "boxes.json") for _ in range(2))
    looked = SliceFolder.read_manifest

    def look_and_be_overtaken(folder):
        found = looked(folder)
        if folder is second and found is None:
            first.begin(manifest)
            first.append(0, Batch(0, 2))
        return found

    monkeypatch.setattr(SliceFolder, "read_manifest", look_and_be_overtaken)
    second.begin(manifest)
    assert (first.next_image(0), second.next_image(0), second.next_image(1)) == (2, 2, 2)
    assert (first.path / "shard-000000.jsonl").is_file()


@pytest.mark.parametrize("is_shared", [False, True])
def test_interrupted_removal_is_finished_unless_another_task_may_be_at_it(some_images, tmp_path, is_shared):
    output = tmp_path / "boxes.json"
    left = SliceFolder(output)._finished
    left.mkdir()
    (left / "shard-000000.jsonl").write_text("")
    other = FolderLock(output.with_name("boxes.json.task-1-of-2"), "detecting part 1 of 2")
    with other if is_shared else contextlib.nullcontext():
        detect_images(some_images, output, StubDetector(), array_task=(0, 2), **OPTIONS)
    assert left.exists() == is_shared


def test_lock_of_a_killed_job_is_taken_over(some_images, tmp_path, expected, caplog):
    output = tmp_path / "boxes.json"
    first = start(some_images, output)
    first.kill()
    first.join(60)
    assert output.with_name("boxes.json.lock").exists()
    detect_images(some_images, output, StubDetector(), resume=True, **OPTIONS)
    assert output.read_text() == expected and "Took over the lock" in caplog.text


def test_batch_that_a_full_disk_cuts_off_is_repeated(some_images, tmp_path, expected, monkeypatch):
    output, real_open = tmp_path / "boxes.json", type(tmp_path).open
    taken = []

    class NearlyFull:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, line):
            taken.append(line)
            return self.file.write(line if len(taken) != 4 else line[:7])

    def open_nearly_full(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        return NearlyFull(file) if mode == "ab" and "shard-" in path.name else file

    monkeypatch.setattr(type(tmp_path), "open", open_nearly_full)
    with pytest.raises(OSError, match=r"7 of \d+ bytes") as caught:
        detect_images(some_images, output, StubDetector(), **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    detector = StubDetector()
    detect_images(some_images, output, detector, resume=True, **OPTIONS)
    assert output.read_text() == expected and detector.calls == 10 - 3


def test_damaged_file_of_a_complete_slice_is_resumed_after_its_intact_lines(some_images, tmp_path, expected):
    output = tmp_path / "boxes.json"
    for task in (0, 1):
        detect_images(some_images, output, StubDetector(), array_task=(task, 2), resume=True, **OPTIONS)
    shard = tmp_path / "boxes.json.shards" / "shard-000001.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(lines[0] + lines[1][:9] + b"\0" * 20)
    detector = StubDetector()
    detect_images(some_images, output, detector, resume=True, **OPTIONS)
    assert output.read_text() == expected and detector.calls == 1


@pytest.mark.parametrize("name", ["boxes.json.shards", "boxes.json.shards.finished"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_folder_of_the_user_is_refused(some_images, tmp_path, name, options):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(BoxFileError, match=r"is in the way: it is not the folder of an interrupted job \(thesis\.txt"):
        detect_images(some_images, tmp_path / "boxes.json", StubDetector(), **OPTIONS, **options)
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_link_instead_of_the_folder_is_refused(some_images, tmp_path):
    (tmp_path / "precious").mkdir()
    os.symlink(tmp_path / "precious", tmp_path / "boxes.json.shards")
    with pytest.raises(BoxFileError, match=r"not the folder of an interrupted job \(a link\)"):
        detect_images(some_images, tmp_path / "boxes.json", StubDetector(), overwrite=True, **OPTIONS)
    assert (tmp_path / "precious").is_dir()


@pytest.mark.slow
def test_two_jobs_that_are_killed_at_random_never_lose_a_batch(many_images, tmp_path):
    output = tmp_path / "boxes.json"
    detect_images(many_images, tmp_path / "expected.json", StubDetector())
    delays = [0.4 + 0.13 * (number % 7) for number in range(20)]
    arguments = [str(many_images), str(output), {"seconds": 0.02}, {"shard_size": 48, "batch_size": 4, "resume": True}]
    command = [sys.executable, "-m", "tests.box_files.stub_detector", json.dumps(arguments)]
    for delay in delays:
        pair = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
        time.sleep(3 + delay)
        for process in pair:
            process.kill()
            process.wait(60)
    assert subprocess.run(command).returncode == 0
    assert output.read_text() == (tmp_path / "expected.json").read_text()
    assert len(read_boxes(output)) == len(read_boxes(tmp_path / "expected.json"))
