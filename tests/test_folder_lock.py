"""Only one run holds a lock, whatever happens to its process."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mgllava import folder_lock
from mgllava.folder_lock import FolderLock, FolderLockedError, lock_owner

# Imports the module without the package, which takes seconds to import.
IMPORT = f"""import os, signal, sys, time, types
sys.modules["mgllava"] = types.ModuleType("mgllava")
sys.modules["mgllava"].__path__ = [{str(Path(folder_lock.__file__).parent)!r}]
"""
HOLD = """
from mgllava.folder_lock import FolderLock
with FolderLock(sys.argv[1], "holding"):
    print("held", flush=True)
    time.sleep(60)
"""
# Takes the lock five times, in competition with other processes.
COMPETE = """
from mgllava.folder_lock import FolderLock, FolderLockedError
path, entered = sys.argv[1], 0
deadline = time.monotonic() + 60
while entered < 5 and time.monotonic() < deadline:
    try:
        with FolderLock(path, "competing") as lock:
            os.close(os.open(path + ".inside", os.O_CREAT | os.O_EXCL))
            entered += 1
            time.sleep(0.002)
            os.unlink(path + ".inside")
            lock.check()
    except FolderLockedError:
        time.sleep(0.001)
print(entered)
"""


def _hold(path):
    process = subprocess.Popen([sys.executable, "-c", IMPORT + HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def _lock_of(path, **changes):
    """Write the lock file of this process, with changes."""
    with FolderLock(path, "training") as lock:
        content = json.loads(lock.file.read_text())
    lock.file.write_text(json.dumps({**content, **changes}))
    return lock.file


def test_second_run_gets_an_error_that_names_the_owner(tmp_path):
    output = tmp_path / "out"
    with (
        FolderLock(output, "converting") as lock,
        pytest.raises(FolderLockedError, match=rf"converting \(process {os.getpid()} on .*choose another output"),
        FolderLock(output, "converting"),
    ):
        pass
    lock.file.write_text("")  # after the second run, the lock of the first still exists
    lock.file.unlink()
    with FolderLock(output, "converting"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    process = _hold(tmp_path / "out")
    with pytest.raises(FolderLockedError, match="holding"), FolderLock(tmp_path / "out", "converting"):
        pass
    process.send_signal(signal.SIGKILL)
    # Without `wait` the process is a zombie, which counts as dead.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with FolderLock(tmp_path / "out", "converting") as lock:
                lock.check()
                break
        except FolderLockedError:
            time.sleep(0.01)
    else:
        pytest.fail("not taken over")
    process.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machine", ["another boot pid:[1]", None])
def test_lock_of_another_host_is_taken_over_when_its_heartbeat_stops(tmp_path, machine):
    file = _lock_of(tmp_path / "out", machine=machine, host="node17", pid=1)
    with (
        pytest.raises(FolderLockedError, match=r"process 1 on node17.*If it is dead"),
        FolderLock(tmp_path / "out", "x"),
    ):
        pass
    long_ago = time.time() - folder_lock.STALE_SECONDS - 5
    os.utime(file, (long_ago, long_ago))
    with FolderLock(tmp_path / "out", "converting") as lock:
        assert json.loads(lock.file.read_text())["purpose"] == "converting"
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_dead_process_whose_number_is_in_use_is_taken_over(tmp_path):
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("needs /proc")
    _lock_of(tmp_path / "out", process_started="1")
    with FolderLock(tmp_path / "out", "converting"):
        pass


ELSEWHERE = {"machine": "another boot pid:[1]", "host": "node17", "pid": 1}


@pytest.mark.parametrize(
    ("changes", "age", "is_held"),
    [
        (ELSEWHERE, 110, True),
        (ELSEWHERE, 130, False),  # no sign of life for two minutes
        ({}, 1000, True),  # this process lives, although it was suspended
        ({"process_started": "1"}, 0, False),
        # A value that cannot be the number of a process is ignored.
        ({"pid": "1"}, 110, True),
        ({"pid": 0}, 130, False),
        ({"pid": -1}, 110, True),
        ({"pid": 10**30}, 0, False),
    ],
)
def test_lock_is_held_until_its_owner_must_be_dead(tmp_path, changes, age, is_held):
    file = _lock_of(tmp_path / "out", **changes)
    os.utime(file, (time.time() - age, time.time() - age))
    assert (lock_owner(tmp_path / "out") or "").startswith("training (process ") == is_held
    if is_held:
        with pytest.raises(FolderLockedError), FolderLock(tmp_path / "out", "converting"):
            pass
        assert json.loads(file.read_text())["purpose"] == "training"
    else:
        with FolderLock(tmp_path / "out", "converting"):
            assert json.loads(file.read_text())["purpose"] == "converting"
    assert folder_lock.HEARTBEAT_SECONDS * 6 < folder_lock.STALE_SECONDS


def test_a_free_lock_has_no_owner(tmp_path):
    assert lock_owner(tmp_path / "out") is None
    with FolderLock(tmp_path / "out", "converting"):
        assert lock_owner(tmp_path / "out").startswith(f"converting (process {os.getpid()} on ")
    assert lock_owner(tmp_path / "out") is None


def test_process_of_another_user_is_alive(tmp_path, monkeypatch):
    _lock_of(tmp_path / "out")

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert lock_owner(tmp_path / "out") is not None


def test_systems_without_proc_know_processes_by_host(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(os, "readlink", fail)
    with FolderLock(tmp_path / "out", "converting") as lock:
        owner = json.loads(lock.file.read_text())
        assert owner["machine"].startswith(f"{socket.gethostname()} ")
        with pytest.raises(FolderLockedError), FolderLock(tmp_path / "out", "another"):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with FolderLock(tmp_path / "out", "converting") as lock, pytest.raises(FolderLockedError):
            FolderLock(tmp_path / "out", "another").__enter__()
        assert not list(tmp_path.iterdir())


def test_heartbeat_is_as_old_as_the_clock_says_where_no_file_can_be_written(tmp_path, monkeypatch):
    file = _lock_of(tmp_path / "out", **ELSEWHERE)

    def fail(*args, **kwargs):
        raise OSError("read-only")

    monkeypatch.setattr(folder_lock.tempfile, "TemporaryFile", fail)
    assert lock_owner(tmp_path / "out") is not None
    os.utime(file, (time.time() - 130, time.time() - 130))
    assert lock_owner(tmp_path / "out") is None


def test_lock_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    file = _lock_of(tmp_path / "out", process_started="1")
    open_file = os.open

    def refuse(path, *args, **kwargs):
        if Path(path) == file:
            raise PermissionError(errno.EACCES, "denied")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="denied"), FolderLock(tmp_path / "out", "converting"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]


def test_lock_that_may_not_be_written_is_an_error(tmp_path, monkeypatch):
    def refuse(path, flags, *args, **kwargs):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(folder_lock, "_write", refuse)
    with pytest.raises(PermissionError, match="denied"), FolderLock(tmp_path / "a" / "out", "converting"):
        pass
    assert not list(tmp_path.iterdir())


# Between two steps of this process, another one does something.


def test_lock_of_a_run_that_was_faster_is_kept(tmp_path, monkeypatch):
    other = _lock_of(tmp_path / "other")
    for links in (True, False):

        def link(source, target, links=links):
            target.write_text(other.read_text())
            raise FileExistsError if links else OSError("no links on this disk")

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(FolderLockedError, match="training"), FolderLock(tmp_path / "out", "converting"):
            pass
        assert (tmp_path / "out.lock").read_text() == other.read_text()
        (tmp_path / "out.lock").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.lock"]


def test_new_lock_of_a_run_that_took_over_first_is_put_back(tmp_path, monkeypatch):
    is_dead, file = folder_lock._is_dead, _lock_of(tmp_path / "out", process_started="1")
    new = json.loads(_lock_of(tmp_path / "other").read_text())

    def overtaken(owner):
        if owner["process_started"] == "1":
            file.write_text(json.dumps(new))
            return True
        return is_dead(owner)

    monkeypatch.setattr(folder_lock, "_is_dead", overtaken)
    with pytest.raises(FolderLockedError), FolderLock(tmp_path / "out", "converting"):
        pass
    assert json.loads(file.read_text()) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.lock", "out.lock"]


@pytest.mark.parametrize("after", ["_read", "_age", "_is_dead"])
def test_lock_that_is_removed_meanwhile_is_free(tmp_path, monkeypatch, after):
    file = _lock_of(tmp_path / "out", **ELSEWHERE)
    owner = FolderLock if after == "_age" else folder_lock
    original = getattr(owner, after)

    def removed(*args):
        found = original(*args)
        file.unlink(missing_ok=True)
        monkeypatch.setattr(owner, after, original)
        return {"_read": None, "_age": None, "_is_dead": True}.get(after, found)

    monkeypatch.setattr(owner, after, removed)
    with FolderLock(tmp_path / "out", "converting") as lock:
        lock.check()
    assert not list(tmp_path.iterdir())


def test_lock_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:  # of the lock itself, after that of its copy
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links on this disk")))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"), FolderLock(tmp_path / "a" / "out", "converting"):
        pass
    assert not list(tmp_path.iterdir())


def test_lock_that_is_away_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    """Another run may have renamed it by mistake, and be putting it back."""
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.005)
    read, calls, beaten = folder_lock._read, [], threading.Event()

    def away_at_first(path):
        if threading.current_thread() is threading.main_thread():
            return read(path)
        calls.append(path)
        if len(calls) > 4:
            beaten.set()
        return None if len(calls) in (1, 3) else read(path)

    monkeypatch.setattr(folder_lock, "_read", away_at_first)
    with FolderLock(tmp_path / "out", "converting") as lock:
        assert beaten.wait(30)
        lock.check()


def test_a_lock_that_was_lost_can_be_taken_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.01)
    lock = FolderLock(tmp_path / "out", "converting")
    with lock:
        lock.file.unlink()
        lock._heartbeat.join(30)
        with pytest.raises(FolderLockedError, match="it was removed"):
            lock.check()
    with lock:
        os.utime(lock.file, (1, 1))
        lock.check()
        deadline = time.monotonic() + 30
        while lock.file.stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.file.stat().st_mtime > 100


def test_suspended_owner_on_this_machine_keeps_its_lock(tmp_path):
    """It is alive, but without a heartbeat."""
    process = _hold(tmp_path / "out")
    os.utime(tmp_path / "out.lock", (1, 1))
    with pytest.raises(FolderLockedError), FolderLock(tmp_path / "out", "converting"):
        pass
    process.kill()
    process.wait()


@pytest.mark.parametrize("content", ["notes of mine", "{}", "", "[" * 100_000, '{"mark": "other"}'])
def test_other_files_with_the_name_of_the_lock_are_not_changed(tmp_path, content, monkeypatch):
    monkeypatch.setattr(folder_lock, "_SETTLING_SECONDS", 0.0)
    (tmp_path / "out.lock").write_text(content)
    os.utime(tmp_path / "out.lock", (1, 1))
    with pytest.raises(FolderLockedError, match="in the way"), FolderLock(tmp_path / "out", "converting"):
        pass
    assert (tmp_path / "out.lock").read_text() == content


def test_lock_that_is_still_being_written_is_waited_for(tmp_path):
    """Without hard links, it is empty at first."""
    file = _lock_of(tmp_path / "out")
    content = file.read_text()
    file.write_text("")
    writer = threading.Timer(0.1, file.write_text, [content])
    writer.start()
    with pytest.raises(FolderLockedError, match=r"written by another run: training \(process"):
        FolderLock(tmp_path / "out", "converting").__enter__()
    writer.join()


def test_folders_links_and_pipes_with_the_name_of_the_lock_are_not_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_SETTLING_SECONDS", 0.0)
    stale = _lock_of(tmp_path / "target", machine="another", pid=1)
    os.utime(stale, (1, 1))
    (tmp_path / "a.lock").mkdir()
    (tmp_path / "b.lock").symlink_to(stale)
    (tmp_path / "c.lock").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "d.lock")
    before = sorted(tmp_path.iterdir())
    for name in "abcd":
        with pytest.raises(FolderLockedError, match="in the way"), FolderLock(tmp_path / name, "converting"):
            pass
    assert sorted(tmp_path.iterdir()) == before


def test_run_that_lost_its_lock_gets_an_error_and_leaves_the_new_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.01)
    with FolderLock(tmp_path / "out", "converting") as lock:
        lock.check()
        owner = json.loads(lock.file.read_text())
        lock.file.write_text(json.dumps({**owner, "token": "other", "host": "node17"}))
        with pytest.raises(FolderLockedError, match=r"on node17.*holds it"):
            lock.check()
        lock._heartbeat.join(10)  # the heartbeat notices it, too
    assert json.loads((tmp_path / "out.lock").read_text())["token"] == "other"
    (tmp_path / "out.lock").unlink()
    with FolderLock(tmp_path / "out", "converting") as lock:
        lock.file.unlink()
        with pytest.raises(FolderLockedError, match="removed"):
            lock.check()


def test_heartbeat_updates_the_modification_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.01)
    with FolderLock(tmp_path / "out", "converting") as lock:
        os.utime(lock.file, (1, 1))
        deadline = time.monotonic() + 30
        while lock.file.stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.file.stat().st_mtime > 100


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
def test_process_that_is_killed_while_it_creates_its_lock_holds_none(tmp_path, call):
    code = f"os.{call} = lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL)\n" + HOLD
    killed = subprocess.run(
        [sys.executable, "-c", IMPORT + "import mgllava.folder_lock\n" + code, str(tmp_path / "out")]
    )
    assert killed.returncode == -signal.SIGKILL
    with FolderLock(tmp_path / "out", "holding"):
        assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]
    assert not list(tmp_path.iterdir())


def test_lock_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links on this disk")))
    with FolderLock(tmp_path / "out", "holding"):
        with pytest.raises(FolderLockedError, match="holding"), FolderLock(tmp_path / "out", "another"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]


def test_competing_processes_take_over_one_at_a_time(tmp_path):
    path = tmp_path / "out"
    _lock_of(path, process_started="1")
    command = [sys.executable, "-c", IMPORT + COMPETE, str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    # If two held the lock at once, creating the same file would fail.
    assert [process.communicate()[0] for process in processes] == ["5\n"] * 4
    assert list(tmp_path.iterdir()) == []


def test_parent_folders_are_created_and_empty_ones_removed(tmp_path):
    with FolderLock(tmp_path / "a" / "b" / "out", "converting") as lock:
        assert lock.file.is_file()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "a" / "b" / "out", "converting"):
        (tmp_path / "a" / "kept").write_text("")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["kept"]
