"""The high-resolution tower: a timm ConvNeXt without its head (MG-LLaVA, arXiv 2406.17770, section 3.1)."""

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput

from .configuration_mgllava import MGLlavaHighResVisionConfig


class MGLlavaHighResVisionModel(PreTrainedModel):
    """Stem and four stages of a ConvNeXt; parameter names are timm's own."""

    config: MGLlavaHighResVisionConfig
    config_class = MGLlavaHighResVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ConvNeXtStage"]
    # It has no attention, so it must not be what refuses an implementation for the whole model.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MGLlavaHighResVisionConfig):
        super().__init__(config)
        trunk = timm.create_model(
            config.architecture,
            pretrained=False,
            num_classes=0,
            depths=tuple(config.depths),
            dims=tuple(config.hidden_sizes),
        )
        self.stem = trunk.stem
        self.stages = trunk.stages
        self.post_init()

    def _init_weights(self, module: torch.nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            init.constant_(module.gamma, 1e-6)

    def forward(self, pixel_values: torch.Tensor) -> BackboneOutput:
        """Compute the maps of all four stages.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`):
                Normalised high-resolution images.

        Returns:
            `BackboneOutput` whose `feature_maps` are four tensors of shape
            `(num_images, hidden_sizes[i], height / 2**(i + 2), width / 2**(i + 2))`.
        """
        hidden_states = self.stem(pixel_values.to(self.dtype))
        feature_maps = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            feature_maps.append(hidden_states)
        return BackboneOutput(feature_maps=tuple(feature_maps))


__all__ = ["MGLlavaHighResVisionModel"]
