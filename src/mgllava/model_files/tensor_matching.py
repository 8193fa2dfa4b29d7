"""Check that the tensors of files match a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import ConversionError
from .lazy_tensor import LazyTensor

# Dtypes of weights. Integers and 8-bit floats are packed values of a quantizer.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAMPLES = 10


def build_on_meta(model_class: Any, config: Any) -> Any:
    """Build a model on the meta device, to get names and shapes of its weights without their memory."""
    with torch.device("meta"):
        return model_class(config)


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters and buffers that are stored; of tied ones, the shared one."""
    tied = model.all_tied_weights_keys or {}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def match_tensors(
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, tuple[int, ...]],
    unexpected: Sequence[str],
    problem: str,
) -> dict[str, LazyTensor]:
    """Check that tensors match a model by name, shape and dtype, and return them in the model's order.

    `unexpected` describes further tensors of the sources; `problem` is the start of the error.
    """
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected = [
        *unexpected,
        *(f"{name} {tensor.shape} from {tensor.origin}" for name, tensor in tensors.items() if name not in expected),
    ]
    wrong = [
        f"{name}: expected {shape}, got {tensors[name].shape} from {tensors[name].origin}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    packed = [
        f"{name}: expected {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOAT_DTYPES)}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} from {tensor.origin}"
        for name, tensor in tensors.items()
        if name in expected and tensor.dtype not in FLOAT_DTYPES
    ]
    if missing or unexpected or wrong or packed:
        lists = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong, "wrong dtype": packed}
        raise ConversionError(problem + "".join(_listed(title, items) for title, items in lists.items()))
    return {name: tensors[name] for name in expected}


def _listed(title: str, items: Sequence[str]) -> str:
    more = f"\n  and {len(items) - _SAMPLES} more" if len(items) > _SAMPLES else ""
    if not items and title == "wrong dtype":
        return ""
    return f"\n{title}: {len(items)}" + "".join(f"\n  {item}" for item in items[:_SAMPLES]) + more


__all__ = ["FLOAT_DTYPES", "build_on_meta", "match_tensors", "stored_shapes"]
