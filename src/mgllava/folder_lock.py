"""Lock files for outputs that only one run may write, also across the hosts of a cluster."""

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
# Network file systems may show a time of modification that is a minute old.
STALE_SECONDS = 120.0

_MARK = "mgllava lock"
# Without hard links, a lock is created and filled right after; whoever reads it in between tries again for this long.
_SETTLING_SECONDS = 1.0
_MAX_BYTES = 1 << 16


class FolderLockedError(MGLlavaError, OSError):
    """Another run holds the lock, or the lock was lost to one; the message says what to do."""


class FolderLock:
    """A lock on an output, for a `with` block.

    The lock is a file `PATH.lock` next to the output. It is created exclusively, which file systems shared by many
    hosts do atomically, names its owner, and is touched every few seconds while it is held. A second run gets an
    error. The lock of a process that ended without removing it (killed, a host that crashed) is taken over: at once
    if the process ran on this machine, otherwise after two minutes without a heartbeat. Not reentrant; a file of
    that name that is not a lock of this package is never touched.

    Args:
        path (`str` or `Path`): The file or folder that is to be written. It need not exist; missing parent folders
            are created, and removed again if nothing was written to them.
        purpose (`str`): What the run does, for the error message of the second run: "converting", for example.

    Raises:
        FolderLockedError: On entry, if another run holds the lock or a file of another kind has its name.
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
        """Check that the lock is still held. Call it before a step that cannot be undone.

        Raises:
            FolderLockedError: If the lock file was removed or taken over, which happens to a run that was stopped for
                minutes.
        """
        owner = None if self._lost else _read(self.file)
        if not self._lost and (owner is None or owner.get("token") != self._token):
            self._lost = "it was removed" if owner is None else f"now {_describe(owner)} holds it"
        if self._lost:
            raise FolderLockedError(
                f"This run has lost its lock on {self.path}: {self._lost}. Was this run stopped for minutes, or the "
                f"file {self.file} deleted? Nothing more is written. Start it again when no other run writes there."
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
                # A lock that appears with its content is whole even if the process is killed at any moment.
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
                    f"{self.file} is in the way: it is not a lock file that this package wrote, or not whole. If no "
                    "other run is writing there, move or delete it."
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
        """Move a stale lock aside, so that exactly one of several runs that see it succeeds."""
        aside = self.file.with_name(f".{uuid.uuid4().hex}.lock")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        moved = _read(aside)
        if moved is None or moved.get("token") != stale.get("token"):
            # Another run was faster, and this is the lock that it has just made: put it back.
            with suppress(OSError):
                os.link(aside, self.file)
        else:
            logger.warning("Took over the lock on %s from %s, which is dead.", self.path, _describe(stale))
        aside.unlink(missing_ok=True)

    def _age(self) -> float | None:
        """Seconds since the last heartbeat by the clock of the file system; `None` if the lock is gone."""
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
                # Trouble with the file system for a moment is not a reason to stop; a lost lock is.
                with suppress(OSError):
                    os.utime(self.file)
                continue
            # One miss may be another run that looked at the lock and put it back.
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
        # Opened and not only looked at, since that is when network file systems refresh what they know of a file. A
        # link is not followed, and a pipe does not block.
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
    """Tell whether the owner's process has ended; `None` if it runs where this process cannot see it."""
    pid = owner.get("pid")
    if os.name != "posix" or not isinstance(pid, int) or pid <= 0 or owner.get("machine") != _machine():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    # Process numbers are used again.
    return bool(owner.get("process_started") != _process_start(pid))


def _machine() -> str:
    """Identify what process numbers refer to: the machine since it started, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process_start(pid: int) -> str | None:
    """Give the time at which a process started, in the units of the system; `None` where it is not known."""
    try:
        # The second field, the name of the program, may hold anything, also parentheses.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A killed process whose parent has not noticed yet is dead as well.
    return None if text[0] in "ZX" else text[19]


__all__ = ["HEARTBEAT_SECONDS", "STALE_SECONDS", "FolderLock", "FolderLockedError", "lock_owner"]
