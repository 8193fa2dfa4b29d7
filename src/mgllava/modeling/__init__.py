"""Configurations and modules of MG-LLaVA, SliME and RAM++; a Hub folder, whose files are copied into saved models."""

from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResVisionConfig
from .configuration_ram_plus import RamPlusConfig
from .configuration_slime import SlimeConfig
from .modeling_mgllava import (
    MGLlavaCausalLMOutputWithPast,
    MGLlavaForConditionalGeneration,
    MGLlavaModel,
    MGLlavaModelOutputWithPast,
    MGLlavaPreTrainedModel,
)
from .modeling_ram_plus import RamPlusForImageTagging, RamPlusImageTaggingOutput
from .modeling_slime import (
    SlimeCausalLMOutputWithPast,
    SlimeForConditionalGeneration,
    SlimeImageFeatures,
    SlimeModel,
    SlimeModelOutputWithPast,
    SlimePreTrainedModel,
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
    "RamPlusConfig",
    "RamPlusForImageTagging",
    "RamPlusImageTaggingOutput",
    "SlimeCausalLMOutputWithPast",
    "SlimeConfig",
    "SlimeForConditionalGeneration",
    "SlimeImageFeatures",
    "SlimeModel",
    "SlimeModelOutputWithPast",
    "SlimePreTrainedModel",
]
