"""Images, boxes and text to the inputs of the model; a Hub folder: it imports nothing of the rest of the package."""

from .box_detection_mgllava import BoxDetector
from .boxes_mgllava import prepare_boxes
from .coco_labels_mgllava import COCO_80
from .image_inputs_mgllava import MGLlavaImageProcessorKwargs
from .image_processing_mgllava import MGLlavaImageProcessor, MGLlavaImageProcessorPil
from .processing_mgllava import BoxDetectorProtocol, MGLlavaProcessor
from .text_chunks_mgllava import CHAT_TEMPLATES

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
