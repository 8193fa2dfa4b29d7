"""The image tagger RAM++ (arXiv 2310.15200); a Hub folder, whose files are copied into saved models."""

from .configuration_ram_plus import RamPlusConfig
from .image_processing_ram_plus import RamPlusImageProcessor, RamPlusImageProcessorPil
from .modeling_ram_plus import RamPlusForImageTagging, RamPlusImageTaggingOutput

__all__ = [
    "RamPlusConfig",
    "RamPlusForImageTagging",
    "RamPlusImageProcessor",
    "RamPlusImageProcessorPil",
    "RamPlusImageTaggingOutput",
]
