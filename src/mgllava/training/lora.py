"""Adapters of the language model, through peft."""

from typing import Any

# Every linear layer of the language model but the head: of Llama and its like, and the fused ones of Phi-3.
_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj"
TARGET_MODULES = rf"(.*\.)?language_model\..*\.({_LAYERS})"
# Small, and trained as a whole in both stages.
MODULES_TO_SAVE = ("fusion", "multi_modal_projector", "box_projector", "object_attention")


def lora_config(model: Any = None, **kwargs: Any) -> Any:
    """Describe adapters on the language model's linear layers, with fusion and projectors trained beside them.

    Args:
        model ([`MGLlavaForConditionalGeneration`], *optional*): The model, if it may lack some of these modules: only
            those that it has, and that have parameters, are named.
        **kwargs: Arguments of `peft.LoraConfig`, such as `r`, `lora_alpha` and `lora_dropout`.

    Returns:
        `peft.LoraConfig`: For `peft.get_peft_model`, or `peft_config` of TRL.

    Raises:
        ImportError: If peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'mgllava[train]'.") from error
    saved = [name for name in MODULES_TO_SAVE if model is None or has_parameters(model, name)]
    options = {"target_modules": TARGET_MODULES, "modules_to_save": saved, "task_type": "CAUSAL_LM", **kwargs}
    return LoraConfig(**options)


def has_parameters(model: Any, name: str) -> bool:
    """Tell whether a variant of the model has a module, and parameters in it.

    Args:
        model ([`MGLlavaForConditionalGeneration`]): The model.
        name (`str`): Name of a module of [`MGLlavaModel`].

    Returns:
        `bool`: Whether there is something to train.
    """
    module = getattr(model.model, name, None)
    return module is not None and any(True for _ in module.parameters())


__all__ = ["MODULES_TO_SAVE", "TARGET_MODULES", "has_parameters", "lora_config"]
