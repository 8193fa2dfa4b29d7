"""RAM++ (arXiv 2310.15200), the image tagger; a Hub folder: it imports nothing of the rest of the package."""

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
