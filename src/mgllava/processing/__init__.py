"""Images, boxes and text to the inputs of the model; a Hub folder: it imports nothing of the rest of the package."""

from .box_detection_mgllava import COCO_80, BoxDetector, BoxDetectorProtocol
from .boxes_mgllava import prepare_boxes
from .image_processing_mgllava import (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorKwargs,
    MGLlavaImageProcessorPil,
)
from .processing_mgllava import CHAT_TEMPLATES, MGLlavaProcessor

__all__ = [
    "CHAT_TEMPLATES",
    "COCO_80",
    "BoxDetector",
    "BoxDetectorProtocol",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorKwargs",
    "MGLlavaImageProcessorPil",
    "MGLlavaProcessor",
    "prepare_boxes",
]
