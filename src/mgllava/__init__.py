"""MG-LLaVA (arXiv 2406.17770) and SliME (arXiv 2406.08487) for transformers.

Importing this package registers its model families, these two and the image tagger RAM++, with the Auto classes of
transformers. `AutoModel` loads the model that can generate, as `AutoModelForImageTextToText` does. Saving a model also
saves the code of its classes, so it loads with `trust_remote_code=True` where this package is not installed.
"""

from importlib import import_module
from typing import Any

from mgllava.errors import MGLlavaError
from mgllava.families import FAMILIES, register
from mgllava.modeling import (
    MGLlavaConfig,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaPreTrainedModel,
    RamPlusConfig,
    RamPlusForImageTagging,
    SlimeConfig,
    SlimeForConditionalGeneration,
    SlimeModel,
    SlimePreTrainedModel,
)
from mgllava.processing import (
    COCO_80,
    BoxDetector,
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    MGLlavaProcessor,
    MGLlavaVideoProcessor,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
    SlimeImageProcessor,
    SlimeImageProcessorPil,
    SlimeProcessor,
)
from mgllava.quantization import quantization_config

__version__ = "0.1.0"

for _family in FAMILIES.values():
    register(_family)


# Modules that are imported on first use, so that `import mgllava` stays fast.
_LAZY_MODULES = (
    "box_files",
    "chat",
    "conversion",
    "evaluation",
    "folder_lock",
    "hub",
    "serving",
    "training",
    "visualization",
)
# Functions of these modules that are names of the package, each with its module.
_LAZY_NAMES = {"add_videos": "conversion", "build_from_parts": "conversion"}


def __getattr__(name: str) -> Any:
    """Import a module of the package, or a function of one, on first use."""
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _LAZY_NAMES:
        return getattr(import_module(f"{__name__}.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all names, including those that are imported on first use."""
    return sorted({*globals(), *_LAZY_MODULES, *_LAZY_NAMES})


__all__ = [
    "COCO_80",
    "BoxDetector",
    "MGLlavaConfig",
    "MGLlavaError",
    "MGLlavaForConditionalGeneration",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorPil",
    "MGLlavaModel",
    "MGLlavaPreTrainedModel",
    "MGLlavaProcessor",
    "MGLlavaVideoProcessor",
    "RamPlusConfig",
    "RamPlusForImageTagging",
    "RamPlusImageProcessor",
    "RamPlusImageProcessorPil",
    "SlimeConfig",
    "SlimeForConditionalGeneration",
    "SlimeImageProcessor",
    "SlimeImageProcessorPil",
    "SlimeModel",
    "SlimePreTrainedModel",
    "SlimeProcessor",
    "add_videos",
    "build_from_parts",
    "quantization_config",
]
