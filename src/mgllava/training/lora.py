"""LoRA adapters of the language model, with peft."""

from typing import Any

from mgllava.extras import import_extra
from mgllava.families import FAMILIES, family_of

from .recipe import DEFAULT_FAMILY

# All linear layers of the language model except the head: those of Llama and similar models, and Phi-3's fused ones.
_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj"
_TARGET_MODULES = rf"(.*\.)?language_model\..*\.({_LAYERS})"


def lora_config(model: Any = None, **kwargs: Any) -> Any:
    """Configure adapters on the linear layers of the language model, and modules that are trained in full.

    Args:
        model (`PreTrainedModel`, *optional*): The model; modules that this variant of it lacks, or that have no
            parameters, are left out of `modules_to_save`. By default, that has all of MG-LLaVA: fusion and projectors.
        **kwargs: Arguments of `peft.LoraConfig`, such as `r`, `lora_alpha` and `lora_dropout`.

    Returns:
        `peft.LoraConfig`: For `peft.get_peft_model`, or `peft_config` of TRL.

    Raises:
        ValueError: If the model does not belong to a family of this package.
        ImportError: If peft is not installed.
    """
    peft = import_extra("peft", "train", "LoRA")
    family = FAMILIES[DEFAULT_FAMILY] if model is None else family_of(model.config)
    whole = [name for name in family.trained_whole if model is None or has_parameters(model, name)]
    options = {"target_modules": _TARGET_MODULES, "modules_to_save": whole, "task_type": "CAUSAL_LM", **kwargs}
    return peft.LoraConfig(**options)


def has_parameters(model: Any, name: str) -> bool:
    """Return whether this variant of a model has a module with parameters."""
    module = getattr(model.model, name, None)
    return module is not None and any(True for _ in module.parameters())


__all__ = ["has_parameters", "lora_config"]
