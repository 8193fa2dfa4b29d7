"""MG-LLaVA (arXiv 2406.17770) for transformers.

Importing this package makes the `Auto` classes of transformers know MG-LLaVA. `AutoModel` gives the model that can
generate, as `AutoModelForImageTextToText` does. They know the image tagger RAM++ too. What is saved with these classes
holds their code, so it loads with `trust_remote_code=True` where this package is not installed.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from mgllava.modeling import (
    MGLlavaConfig,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaPreTrainedModel,
    quantization_config,
)
from mgllava.processing import COCO_80, BoxDetector, MGLlavaImageProcessor, MGLlavaImageProcessorPil, MGLlavaProcessor
from mgllava.ram_plus import RamPlusConfig, RamPlusForImageTagging, RamPlusImageProcessor, RamPlusImageProcessorPil

__version__ = "0.1.0"

AutoConfig.register(MGLlavaConfig.model_type, MGLlavaConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MGLlavaConfig, MGLlavaForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(
    MGLlavaConfig,
    image_processor_classes={"torchvision": MGLlavaImageProcessor, "pil": MGLlavaImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(MGLlavaConfig, MGLlavaProcessor, exist_ok=True)

AutoConfig.register(RamPlusConfig.model_type, RamPlusConfig, exist_ok=True)
for _tagger_auto_class in (AutoModel, AutoModelForImageClassification):
    _tagger_auto_class.register(RamPlusConfig, RamPlusForImageTagging, exist_ok=True)
AutoImageProcessor.register(
    RamPlusConfig,
    image_processor_classes={"torchvision": RamPlusImageProcessor, "pil": RamPlusImageProcessorPil},
    exist_ok=True,
)

# From here on `save_pretrained` copies the code and notes it in `auto_map`.
for _config_class in (MGLlavaConfig, RamPlusConfig):
    _config_class.register_for_auto_class()
for _model_class in (MGLlavaForConditionalGeneration, MGLlavaModel, RamPlusForImageTagging):
    _model_class.register_for_auto_class("AutoModel")
for _image_processor_class in (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
):
    _image_processor_class.register_for_auto_class()
MGLlavaProcessor.register_for_auto_class()


# Loaded at the first use: `mgllava.chat.ChatSession` works after `import mgllava`, which stays light.
_LAZY_MODULES = (
    "box_files",
    "chat",
    "conversion",
    "folder_lock",
    "hub",
    "serving",
    "training",
    "visualization",
)


def __getattr__(name: str) -> Any:
    """Import a module of the package at its first use."""
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the modules too that are imported at their first use."""
    return sorted({*globals(), *_LAZY_MODULES})


__all__ = [
    "COCO_80",
    "BoxDetector",
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorPil",
    "MGLlavaModel",
    "MGLlavaPreTrainedModel",
    "MGLlavaProcessor",
    "RamPlusConfig",
    "RamPlusForImageTagging",
    "RamPlusImageProcessor",
    "RamPlusImageProcessorPil",
    "quantization_config",
]
