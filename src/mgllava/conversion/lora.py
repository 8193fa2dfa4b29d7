"""LoRA checkpoints: names of PEFT taken apart, low-rank updates merged into the base weights."""

import math
import re
from dataclasses import dataclass, field

import torch

from .errors import ConversionError
from .tensor_files import LazyTensor

_WRAPPER = "llm.base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight$")


@dataclass
class LoraState:
    """The language model's tensors of a checkpoint, with PEFT's wrapping undone.

    Args:
        plain (`dict[str, LazyTensor]`): Tensors stored whole, as XTuner names them without LoRA.
        factors (`dict[str, dict[str, LazyTensor]]`): For each weight that has an update, its factors `"A"` and `"B"`.
        dropped (`dict[str, str]`): Names in the checkpoint that are not used, and why.
        has_base (`bool`): Whether the base weights are in the checkpoint as well.
    """

    plain: dict[str, LazyTensor] = field(default_factory=dict)
    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    has_base: bool = False


def split_lora(state: dict[str, LazyTensor]) -> LoraState:
    """Take PEFT's names apart.

    Args:
        state (`dict[str, LazyTensor]`): A checkpoint; names without PEFT's wrapping stay as they are.

    Returns:
        `LoraState`: Its parts.
    """
    result = LoraState()
    for key, tensor in state.items():
        if not key.startswith(_WRAPPER):
            result.plain[key] = tensor
            continue
        name = "llm." + key[len(_WRAPPER) :]
        if match := _LOW_RANK.fullmatch(name):
            result.factors.setdefault(f"{match['module']}.weight", {})[match["factor"]] = tensor
        elif ".original_module." in name:
            result.dropped[key] = "replaced by the trained copy that PEFT keeps in modules_to_save"
        else:
            result.has_base |= ".base_layer." in name
            result.plain[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    return result


def read_lora_alpha(config_text: str) -> float | None:
    """Find `lora_alpha` in the text of a training config, which is never executed.

    Args:
        config_text (`str`): Python source as mmengine stores it in the checkpoint's meta.

    Returns:
        `float | None`: The value for the language model; `None` if there is none, or several that differ.
    """
    number = r"lora_alpha\s*=\s*(\d+(?:\.\d*)?)"
    of_llm = re.findall(rf"llm_lora\s*=\s*dict\([^)]*?{number}", config_text)
    values = {float(value) for value in of_llm or re.findall(number, config_text)}
    return values.pop() if len(values) == 1 else None


def lora_scaling(alpha: float | None, rank: int, config_text: str) -> float:
    """Compute the factor of the low-rank update.

    Args:
        alpha (`float`, *optional*): `lora_alpha` as the user gives it; else it is read from the config text.
        rank (`int`): Rank of the update.
        config_text (`str`): Text of the training config.

    Returns:
        `float`: `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilized LoRA.

    Raises:
        ConversionError: If `lora_alpha` is neither given nor found, or differs between modules.
    """
    if re.search(r"alpha_pattern\s*=\s*dict\(\s*\w|alpha_pattern\s*=\s*\{\s*['\"]", config_text):
        raise ConversionError(
            "The checkpoint was trained with `alpha_pattern` (a lora_alpha for each module), which is not supported. "
            "Merge the adapter with peft first."
        )
    if alpha is None:
        alpha = read_lora_alpha(config_text)
    if alpha is None:
        raise ConversionError(
            "The checkpoint holds LoRA weights, and its config text does not say one `lora_alpha`. "
            "Pass --lora-alpha (lora_alpha=…), the value of the training config."
        )
    return alpha / (math.sqrt(rank) if re.search(r"use_rslora\s*=\s*True", config_text) else rank)


def merge_lora(base: LazyTensor, low_a: LazyTensor, low_b: LazyTensor, scaling: float) -> LazyTensor:
    """Add a low-rank update to a weight: `W + scaling * B @ A`, computed in fp32, in the dtype of `W`.

    Args:
        base (`LazyTensor`): `W` of shape `(out, in)`.
        low_a (`LazyTensor`): `A` of shape `(rank, in)`.
        low_b (`LazyTensor`): `B` of shape `(out, rank)`.
        scaling (`float`): Factor of the update.

    Returns:
        `LazyTensor`: The merged weight.

    Raises:
        ConversionError: If the shapes do not fit.
    """
    if (low_b.shape[0], low_a.shape[1]) != base.shape or low_a.shape[0] != low_b.shape[1]:
        raise ConversionError(
            f"LoRA factors of shapes {low_b.shape} and {low_a.shape} ({low_a.origin}) do not fit the base weight "
            f"{base.origin} of shape {base.shape}. Is --llm the model that the adapter was trained on?"
        )

    def load() -> torch.Tensor:
        update = low_b.load().float() @ low_a.load().float()
        return base.load().float().add(update, alpha=scaling).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, f"{base.origin} + {scaling:g} * LoRA of {low_a.origin}", load)


__all__ = ["LoraState", "lora_scaling", "merge_lora", "read_lora_alpha", "split_lora"]
