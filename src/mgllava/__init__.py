"""MG-LLaVA (arXiv 2406.17770) for transformers.

Importing this package makes the `Auto` classes of transformers know MG-LLaVA. `AutoModel` gives the model that can
generate, as `AutoModelForImageTextToText` does. They know the image tagger RAM++ too. What is saved with these classes
holds their code, so it loads with `trust_remote_code=True` where this package is not installed.
"""

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
from mgllava.processing import BoxDetector, MGLlavaImageProcessor, MGLlavaImageProcessorPil, MGLlavaProcessor
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


__all__ = [
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
