"""MG-LLaVA (arXiv 2406.17770) for transformers.

Importing this package makes the `Auto` classes of transformers know MG-LLaVA. `AutoModel` gives the model that can
generate, as `AutoModelForImageTextToText` does.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from mgllava.modeling import (
    MGLlavaConfig,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaPreTrainedModel,
)
from mgllava.processing import MGLlavaImageProcessor, MGLlavaImageProcessorPil, MGLlavaProcessor

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


__all__ = [
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaImageProcessor",
    "MGLlavaImageProcessorPil",
    "MGLlavaModel",
    "MGLlavaPreTrainedModel",
    "MGLlavaProcessor",
]
