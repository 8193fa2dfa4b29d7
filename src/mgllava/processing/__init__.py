"""Images, boxes and text to the inputs of the model; a Hub folder: it imports nothing of the rest of the package."""

from .box_detection_mgllava import COCO_80, BoxDetector, BoxDetectorProtocol
from .boxes_mgllava import prepare_boxes
from .image_processing_mgllava import (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorKwargs,
    MGLlavaImageProcessorPil,
)
from .image_processing_ram_plus import RamPlusImageProcessor, RamPlusImageProcessorPil
from .image_processing_slime import SlimeImageProcessor, SlimeImageProcessorKwargs, SlimeImageProcessorPil
from .processing_mgllava import CHAT_TEMPLATES, MGLlavaProcessor
from .processing_slime import SLIME_CHAT_TEMPLATES, SlimeProcessor
from .video_processing_mgllava import MGLlavaVideoProcessor, MGLlavaVideoProcessorKwargs
from .video_reading_mgllava import UnreadableVideoError, VideoLimits

__all__ = [
    "CHAT_TEMPLATES",
    "COCO_80",
    "SLIME_CHAT_TEMPLATES",
    "BoxDetector",
    "BoxDetectorProtocol",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorKwargs",
    "MGLlavaImageProcessorPil",
    "MGLlavaProcessor",
    "MGLlavaVideoProcessor",
    "MGLlavaVideoProcessorKwargs",
    "RamPlusImageProcessor",
    "RamPlusImageProcessorPil",
    "SlimeImageProcessor",
    "SlimeImageProcessorKwargs",
    "SlimeImageProcessorPil",
    "SlimeProcessor",
    "UnreadableVideoError",
    "VideoLimits",
    "prepare_boxes",
]
