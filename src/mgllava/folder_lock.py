"""Lock files that keep two runs, also on different hosts, from writing the same output."""

import errno
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .atomic_files import partial_name, remove_partial
from .errors import MGLlavaError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# Network file systems may report a modification time that is a minute old.
STALE_SECONDS = 120.0

_MARK = "mgllava lock"
# Without hard links, a lock file is created empty and written afterwards; a reader in between retries for this long.
_SETTLING_SECONDS = 1.0
_MAX_BYTES = 1 << 16


class FolderLockedError(MGLlavaError, OSError):
    """Another run holds the lock or has taken it over; the message says what to do."""


class FolderLock:
    """A context manager that holds a lock on an output.

    The lock is a file `PATH.lock` next to the output. Creating it is atomic, also on file systems that many hosts
    share. It names its owner, which touches it every few seconds. A second run gets an error. If the owner has died
    without removing the lock, the lock is taken over: at once if the owner ran on this machine, otherwise after two
    minutes without a heartbeat. The lock is not reentrant. A file of that name that is not a lock of this package is
    never changed.

    Args:
        path (`str` or `Path`): The file or folder to write, which need not exist. Missing parent folders are created,
            and removed again if they are empty at the end.
        purpose (`str`): What the run does, such as `"converting"`, for the error message of a second run.

    Raises:
        FolderLockedError: On entry, if another run holds the lock, or the file is not a lock of this package.
        OSError: On entry, if the lock file cannot be written.
    """

    def __init__(self, path: str | Path, purpose: str):
        self.path = Path(path).absolute()
        self.file = self.path.with_name(self.path.name + ".lock")
        self.purpose = purpose
        self._token = ""
        self._created_folders: list[Path] = []
        self._released = threading.Event()
        self._lost = ""
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        self._create_parents()
        try:
            while not self._try_to_create():
                self._make_way()
        except BaseException:
            self._remove_created_parents()
            raise
        self._released.clear()
        self._lost = ""
        self._heartbeat = threading.Thread(target=self._beat, name=f"lock of {self.path.name}", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        owner = _read(self.file)
        if owner is not None and owner.get("token") == self._token:
            with suppress(FileNotFoundError):
                self.file.unlink()
        self._remove_created_parents()

    def check(self) -> None:
        """Raise `FolderLockedError` if the lock is no longer held. Call this before a step that cannot be undone."""
        owner = None if self._lost else _read(self.file)
        if not self._lost and (owner is None or owner.get("token") != self._token):
            self._lost = "it was removed" if owner is None else f"now {_describe(owner)} holds it"
        if self._lost:
            raise FolderLockedError(
                f"This run has lost its lock on {self.path}: {self._lost}. Was this run suspended for minutes, or "
                f"{self.file} deleted? Nothing more is written. Start it again when no other run writes there."
            )

    def _try_to_create(self) -> bool:
        self._token = uuid.uuid4().hex
        owner = {
            "mark": _MARK,
            "token": self._token,
            "purpose": self.purpose,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "process_started": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        if os.path.lexists(self.file):
            return False
        partial = partial_name(self.file)
        try:
            _write(partial, owner)
            try:
                # A hard link appears with its content, so a killed process leaves no incomplete lock.
                os.link(partial, self.file)
            except FileExistsError:
                return False
            except (OSError, NotImplementedError):
                # The file system has no hard links.
                try:
                    _write(self.file, owner)
                except FileExistsError:
                    return False
                except BaseException:
                    self.file.unlink(missing_ok=True)
                    raise
        finally:
            partial.unlink(missing_ok=True)
        remove_partial(self.file)  # left by processes that were killed right here
        return True

    def _make_way(self) -> None:
        """Remove the existing lock if its owner is dead, or raise."""
        deadline = time.monotonic() + _SETTLING_SECONDS
        while (owner := _read(self.file)) is None:
            if not os.path.lexists(self.file):
                return
            if time.monotonic() > deadline:
                raise FolderLockedError(
                    f"{self.file} is in the way: it is not a lock file of this package, or incomplete. If no other "
                    "run is writing there, move or delete it."
                )
            time.sleep(0.05)
        age = self._age()
        if age is None:
            return
        is_dead = _is_dead(owner)
        if is_dead is False or (is_dead is None and age < STALE_SECONDS):
            wait = STALE_SECONDS - age
            rest = "" if is_dead is False else f" If it is dead, delete {self.file}, or start again in {wait:.0f} s."
            raise FolderLockedError(
                f"{self.path} is being written by another run: {_describe(owner)}, last sign of life {age:.0f} s ago. "
                f"Wait until it has finished, or choose another output.{rest}"
            )
        self._take_away(owner)

    def _take_away(self, stale: dict[str, Any]) -> None:
        """Rename a stale lock, then remove it: of several runs that try this, one succeeds."""
        aside = self.file.with_name(f".{uuid.uuid4().hex}.lock")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        moved = _read(aside)
        if moved is None or moved.get("token") != stale.get("token"):
            # Another run has taken over, and this is its new lock: put it back.
            with suppress(OSError):
                os.link(aside, self.file)
        else:
            logger.warning("Took over the lock on %s from %s, which is dead.", self.path, _describe(stale))
        aside.unlink(missing_ok=True)

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat by the clock of the file system; `None` without a lock."""
        try:
            modified = self.file.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            with tempfile.TemporaryFile(dir=self.file.parent) as probe:
                now = os.fstat(probe.fileno()).st_mtime
        except OSError:
            now = time.time()
        return max(0.0, now - modified)

    def _beat(self) -> None:
        misses = 0
        while not self._released.wait(HEARTBEAT_SECONDS if not misses else min(1.0, HEARTBEAT_SECONDS)):
            owner = _read(self.file)
            if owner is not None and owner.get("token") == self._token:
                misses = 0
                # A temporary file system error is not a reason to stop.
                with suppress(OSError):
                    os.utime(self.file)
                continue
            # Another run may have renamed the lock by mistake, and be putting it back (see `_take_away`).
            misses += 1
            if misses > 1 and (owner is not None or not os.path.lexists(self.file)):
                self._lost = "it was removed" if owner is None else f"now {_describe(owner)} holds it"
                logger.error("This run has lost its lock on %s: %s.", self.path, self._lost)
                return

    def _create_parents(self) -> None:
        missing = []
        folder = self.path.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._created_folders = missing

    def _remove_created_parents(self) -> None:
        for folder in self._created_folders:
            try:
                folder.rmdir()
            except OSError:
                break
        self._created_folders = []


def lock_owner(path: str | Path) -> str | None:
    """Describe who holds the lock on an output; `None` if it is free or its owner is dead."""
    lock = FolderLock(path, "")
    owner, age = _read(lock.file), lock._age()
    if owner is None or age is None:
        return None
    is_dead = _is_dead(owner)
    return None if is_dead or (is_dead is None and age >= STALE_SECONDS) else _describe(owner)


def _write(path: Path, owner: dict[str, Any]) -> None:
    """Create a lock file, which must not exist, and write it to the disk."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(owner, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any] | None:
    """Read a lock file; `None` if there is none, or if it is something else."""
    try:
        # Network file systems refresh their cache when a file is opened. The flags refuse a symbolic link, and keep a
        # pipe from blocking.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.EACCES):
            raise
        return None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("mark") == _MARK else None


def _describe(owner: dict[str, Any]) -> str:
    return f"{owner.get('purpose')} (process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')})"


def _is_dead(owner: dict[str, Any]) -> bool | None:
    """Tell whether the owner's process has ended; `None` if this process cannot know."""
    pid = owner.get("pid")
    if os.name != "posix" or not isinstance(pid, int) or pid <= 0 or owner.get("machine") != _machine():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    # Another process may have got the same number since.
    return bool(owner.get("process_started") != _process_start(pid))


def _machine() -> str:
    """Identify the boot and the PID namespace that process numbers belong to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process_start(pid: int) -> str | None:
    """Return the start time of a process, in the units of the system; `None` if it is not known."""
    try:
        # The second field, the name of the program in parentheses, may itself contain parentheses.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie is dead, although its parent has not read its exit status yet.
    return None if text[0] in "ZX" else text[19]


__all__ = ["HEARTBEAT_SECONDS", "STALE_SECONDS", "FolderLock", "FolderLockedError", "lock_owner"]
