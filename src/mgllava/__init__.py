"""MG-LLaVA (arXiv 2406.17770) for transformers.

Importing this package registers its model families, MG-LLaVA and the image tagger RAM++, with the Auto classes of
transformers. `AutoModel` loads the model that can generate, as `AutoModelForImageTextToText` does. A model saved with
these classes carries their code, so it loads with `trust_remote_code=True` where this package is not installed.
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
)
from mgllava.processing import COCO_80, BoxDetector, MGLlavaImageProcessor, MGLlavaImageProcessorPil, MGLlavaProcessor
from mgllava.quantization import quantization_config
from mgllava.ram_plus import RamPlusConfig, RamPlusForImageTagging, RamPlusImageProcessor, RamPlusImageProcessorPil

__version__ = "0.1.0"

for _family in FAMILIES.values():
    register(_family)


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
# Functions of such modules, by the module.
_LAZY_NAMES = {"build_from_parts": "conversion"}


def __getattr__(name: str) -> Any:
    """Import a module of the package, or a function of one, at its first use."""
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _LAZY_NAMES:
        return getattr(import_module(f"{__name__}.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all names, those included that are imported at their first use."""
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
    "RamPlusConfig",
    "RamPlusForImageTagging",
    "RamPlusImageProcessor",
    "RamPlusImageProcessorPil",
    "build_from_parts",
    "quantization_config",
]
