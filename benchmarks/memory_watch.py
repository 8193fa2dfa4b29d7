"""Measure the peak memory and the time of a block of code; needs Linux."""

import threading
import time
from pathlib import Path
from typing import Any

_INTERVAL = 0.005


class MemoryWatch:
    """A context manager that measures this process.

    Attributes:
        extra_gb: Peak of the anonymous memory beyond what was in use at the start.
        mapped_gb: Peak of the mapped file pages, which the kernel can take back.
        peak_gb: Peak of both together.
        seconds: Time in the context.
    """

    def __enter__(self) -> "MemoryWatch":
        self._before = process_memory("RssAnon")
        self._peaks = {"RssAnon": self._before, "RssFile": 0, "VmRSS": 0}
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watcher.join()
        self.extra_gb = (self._peaks["RssAnon"] - self._before) / 1e9
        self.mapped_gb, self.peak_gb = self._peaks["RssFile"] / 1e9, self._peaks["VmRSS"] / 1e9

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            for kind in self._peaks:
                self._peaks[kind] = max(self._peaks[kind], process_memory(kind))


def process_memory(kind: str) -> int:
    """Return a value of the process status (`VmRSS`, `VmHWM`, …), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {kind} in /proc/self/status: this benchmark needs Linux")
