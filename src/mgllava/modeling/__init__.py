"""Configuration and modules of MG-LLaVA; a Hub folder, whose files are copied into saved models."""

from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResVisionConfig
from .modeling_mgllava import (
    MGLlavaCausalLMOutputWithPast,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaModelOutputWithPast,
    MGLlavaPreTrainedModel,
)
from .pretrained_common import CACHE_NAME
from .vision_mgllava import MGLlavaHighResVisionModel

__all__ = [
    "CACHE_NAME",
    "MGLlavaCausalLMOutputWithPast",
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaHighResVisionConfig",
    "MGLlavaHighResVisionModel",
    "MGLlavaModel",
    "MGLlavaModelOutputWithPast",
    "MGLlavaPreTrainedModel",
]
