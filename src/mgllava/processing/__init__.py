"""Images, boxes and text to the inputs of the model; a Hub folder: it imports nothing of the rest of the package."""

from .boxes_mgllava import prepare_boxes
from .chat_templates_mgllava import CHAT_TEMPLATES
from .image_inputs_mgllava import MGLlavaBatchFeature, MGLlavaImageProcessorKwargs
from .image_processing_mgllava import MGLlavaImageProcessor
from .image_processing_pil_mgllava import MGLlavaImageProcessorPil
from .processing_mgllava import BoxDetectorProtocol, MGLlavaProcessor

__all__ = [
    "CHAT_TEMPLATES",
    "BoxDetectorProtocol",
    "MGLlavaBatchFeature",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorKwargs",
    "MGLlavaImageProcessorPil",
    "MGLlavaProcessor",
    "prepare_boxes",
]
