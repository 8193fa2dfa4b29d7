"""Box files, which hold the boxes of many images, and the job that computes them."""

from .box_file import BoxFile, settings_digest
from .detection_job import DetectionSummary, detect_images
from .detectors import LazyDetector, detection_settings, open_detector
from .errors import BoxFileError, MissingBoxesError
from .formats import read_boxes, write_boxes
from .image_lists import ImageList, list_images

__all__ = [
    "BoxFile",
    "BoxFileError",
    "DetectionSummary",
    "ImageList",
    "LazyDetector",
    "MissingBoxesError",
    "detect_images",
    "detection_settings",
    "list_images",
    "open_detector",
    "read_boxes",
    "settings_digest",
    "write_boxes",
]
