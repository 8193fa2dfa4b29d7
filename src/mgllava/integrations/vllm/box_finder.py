"""Find the boxes of images of many requests in batches, and remember them."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from mgllava.processing.boxes_mgllava import plain_boxes

from .options import PluginOptions

_Job = tuple[str, Any, Future[Any]]


class BoxFinder:
    """Runs a processor's box detector in a thread of its own.

    Images that wait are processed together, whichever request they belong to. An image that comes again, by its key,
    is not processed again.

    Args:
        processor ([`ImageTextProcessor`]): Its `detect` finds boxes.
        options ([`PluginOptions`]): Device, batch size, and how many results are remembered.
    """

    def __init__(self, processor: Any, options: PluginOptions):
        self._processor, self._options = processor, options
        self._known: OrderedDict[str, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_placed = False

    def submit(self, key: str, image: Any) -> "Future[Any]":
        """Ask for the boxes of an image; the result is a mapping of lists, or `None` if there is no detector."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            future: Future[Any] = Future()
            self._known[key] = future
            while len(self._known) > self._options.remembered_images:
                self._known.popitem(last=False)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="boxes", daemon=True)
                self._thread.start()
        self._queue.put((key, image, future))
        return future

    def _run(self) -> None:
        while True:
            jobs = [self._queue.get()]
            while len(jobs) < self._options.box_detector_batch_size:
                try:
                    jobs.append(self._queue.get_nowait())
                except Empty:
                    break
            self._find(jobs)

    def _find(self, jobs: Sequence[_Job]) -> None:
        """Process a batch; if that fails, each image alone, so that only the request of a bad one fails."""
        try:
            found = self._detect([image for _, image, _ in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._find([job])
                return
            key, _, future = jobs[0]
            with self._lock:
                self._known.pop(key, None)
            future.set_exception(error)
            return
        for (_, _, future), boxes in zip(jobs, found, strict=True):
            future.set_result(boxes)

    def _detect(self, images: list[Any]) -> list[Any]:
        processor, device = self._processor, self._options.box_detector_device
        if device is not None and not self._is_placed and processor.box_detector_config is not None:
            processor.load_box_detector(device=device)
        self._is_placed = True
        if processor.box_detector is None:
            return [None] * len(images)
        return [plain_boxes(boxes) for boxes in processor.detect(images)]


__all__ = ["BoxFinder"]
