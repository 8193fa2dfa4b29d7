"""Merge LoRA's low-rank updates into the base weights."""

import math

import torch

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.tensor_matching import FLOAT_DTYPES


def is_positive_number(value: object) -> bool:
    """Tell whether a value can be a `lora_alpha`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def check_lora_alpha(alpha: float | None) -> None:
    """Refuse a `lora_alpha` that is not a positive, finite number."""
    if alpha is not None and not is_positive_number(alpha):
        raise ConversionError(f"`lora_alpha` must be a positive number, got {alpha!r}.")


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """Compute the factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` if it is rank-stabilized."""
    if rank < 1:
        raise ConversionError("The checkpoint has LoRA weights of rank 0.")
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def merge_lora(base: LazyTensor, low_a: LazyTensor, low_b: LazyTensor, scaling: float) -> LazyTensor:
    """Return `W + scaling * B @ A`, in float32, so that it is rounded once, to the dtype of the model.

    `W` has shape `(out, in)`, `A` has shape `(rank, in)`, `B` has shape `(out, rank)`.
    """
    if (
        len(low_a.shape) != 2
        or len(low_b.shape) != 2
        or (low_b.shape[0], low_a.shape[1]) != base.shape
        or low_a.shape[0] != low_b.shape[1]
    ):
        raise ConversionError(
            f"LoRA factors of shapes {low_b.shape} and {low_a.shape} ({low_a.origin}) do not fit the base weight "
            f"{base.origin} of shape {base.shape}. Is `llm` the model that the adapter was trained on?"
        )

    # The dtype of packed weights is refused later.
    dtype = torch.float32 if base.dtype in FLOAT_DTYPES else base.dtype

    def load() -> torch.Tensor:
        update = low_b.load().float() @ low_a.load().float()
        return base.load().float().add(update, alpha=scaling)

    return LazyTensor(base.shape, dtype, f"{base.origin} + {scaling:g} * LoRA of {low_a.origin}", load)


__all__ = ["check_lora_alpha", "is_positive_number", "merge_lora", "scaling_of"]
