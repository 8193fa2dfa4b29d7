"""A detector whose boxes depend on the pixels only, and a script that runs a job with it, which a test can kill."""

import hashlib
import json
import sys
import time
from pathlib import Path

from mgllava.box_files import detect_images


class StubDetector:
    """Finds 0 to 3 boxes per image, and writes the digests of all images to a log file, if it has one."""

    def __init__(self, whole=True, seconds=0.0, log=None, mode="faithful"):
        self.config = {"tagger": None, "detector": "stub", "mode": mode}
        self.whole, self.seconds, self.log = whole, seconds, log
        self.calls = 0

    def detect(self, images, labels=None, threshold=0.2, batch_size=8):
        self.calls += 1
        time.sleep(self.seconds)
        found = [self._detect_one(image, labels) for image in images]
        if self.log is not None:
            with open(self.log, "a") as file:
                file.writelines(f"{digest(image)}\n" for image in images)
        return found

    def _detect_one(self, image, labels):
        numbers = bytes.fromhex(digest(image))
        boxes = [[number - 9, 3, number + image.width, image.height] for number in numbers[: numbers[0] % 4]]
        if not self.whole:
            boxes = [[corner + 0.25 for corner in box] for box in boxes]
        names = labels or ["cup", "Löffel"]
        return {
            "boxes": boxes,
            "labels": [names[number % len(names)] for number in numbers[: len(boxes)]],
            "scores": [0.2 + number / 1000 for number in numbers[: len(boxes)]],
        }


def begin(started, *arguments, **options):
    """Run a job, and first make a file: everything is imported, so that kills hit the work and not the imports."""
    Path(started).touch()
    detect_images(*arguments, **options)


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


if __name__ == "__main__":
    inputs, output, detector_options, options = json.loads(sys.argv[1])
    detect_images(inputs, output, StubDetector(**detector_options), **options)
