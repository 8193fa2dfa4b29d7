"""Registration of models, tokenizer and renderer with vLLM, and the checks of a model before it is loaded."""

from typing import Any

from mgllava.families import FAMILIES, family_of

from . import NAME
from .hooks import (
    MODELS_CONFIG_MAP,
    RENDERER_REGISTRY,
    ModelRegistry,
    TokenizerRegistry,
    VerifyAndUpdateConfig,
    check_hooks,
)
from .options import MAX_BOXES, ROUTER_DEVICE, PluginOptions
from .support import check_config


class ModelCheck(VerifyAndUpdateConfig):
    """Checks the configuration of a model, and selects the plugin's renderer."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what would give other answers than in this package."""
        check_hooks()
        check_config(model_config.hf_config, family_of(model_config.hf_config))
        if model_config.tokenizer_mode not in ("auto", "hf", NAME):
            raise ValueError(
                f"`tokenizer_mode` must be 'auto' for models of mgllava, got {model_config.tokenizer_mode!r}."
            )
        model_config.tokenizer_mode = NAME

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the plugin's options, and hand on those that every process needs."""
        options = PluginOptions.read(vllm_config.additional_config)
        model_config = vllm_config.model_config
        for owner, name in (
            (model_config, "enable_prompt_embeds"),
            (model_config.multimodal_config, "enable_mm_embeds"),
        ):
            if getattr(owner, name, False):
                raise ValueError(f"`{name}` must be left out: models of mgllava take images and text.")
        setattr(model_config.hf_config, MAX_BOXES, options.max_boxes)
        setattr(model_config.hf_config, ROUTER_DEVICE, options.router_device)


def register_all() -> None:
    """Register every family that reads images and text. Can be called again, as vLLM does in each process."""
    for family in FAMILIES.values():
        if family.processor is not None:
            architecture = family.model.partition(":")[2]
            # A string, since vLLM must not import models before it has chosen a device.
            ModelRegistry.register_model(architecture, f"{__package__}.model:ServedModel")
            MODELS_CONFIG_MAP[architecture] = ModelCheck
    if NAME not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
    if NAME not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(NAME, f"{__package__}.renderer", "ServedRenderer")


__all__ = ["ModelCheck", "register_all"]
