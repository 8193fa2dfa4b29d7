"""Adapters of the language model, through peft."""

from typing import Any

from mgllava.extras import import_extra
from mgllava.families import FAMILIES, family_of

from .recipe import DEFAULT_FAMILY

# Every linear layer of the language model except the head: of Llama and similar models, and the fused ones of Phi-3.
_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj"
_TARGET_MODULES = rf"(.*\.)?language_model\..*\.({_LAYERS})"


def lora_config(model: Any = None, **kwargs: Any) -> Any:
    """Configure adapters on the linear layers of the language model, next to modules that are trained as a whole.

    Args:
        model (`PreTrainedModel`, *optional*): The model. Of the modules that its family trains as a whole, only those
            are named that it has, and that have parameters. By default, all those of MG-LLaVA are named: fusion and
            projectors.
        **kwargs: Arguments of `peft.LoraConfig`, such as `r`, `lora_alpha` and `lora_dropout`.

    Returns:
        `peft.LoraConfig`: For `peft.get_peft_model`, or `peft_config` of TRL.

    Raises:
        ValueError: If the model is of no family of this package.
        ImportError: If peft is not installed.
    """
    peft = import_extra("peft", "train", "LoRA")
    family = FAMILIES[DEFAULT_FAMILY] if model is None else family_of(model.config)
    whole = [name for name in family.trained_whole if model is None or has_parameters(model, name)]
    options = {"target_modules": _TARGET_MODULES, "modules_to_save": whole, "task_type": "CAUSAL_LM", **kwargs}
    return peft.LoraConfig(**options)


def has_parameters(model: Any, name: str) -> bool:
    """Tell whether this variant of a model has a module with parameters in it."""
    module = getattr(model.model, name, None)
    return module is not None and any(True for _ in module.parameters())


__all__ = ["has_parameters", "lora_config"]
