"""Configuration and modules of MG-LLaVA.

A folder that the Hub gets as it is: its files import each other as siblings only.
"""

from .cache_mgllava import CACHE_NAME
from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResVisionConfig
from .high_res_vision_mgllava import MGLlavaHighResVisionModel
from .modeling_mgllava import (
    MGLlavaCausalLMOutputWithPast,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaModelOutputWithPast,
    MGLlavaPreTrainedModel,
)
from .quantization_mgllava import quantization_config

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
    "quantization_config",
]
