"""Reading torch files that hold pickled objects without running their code.

Training runners pickle their own objects (log histories, loss scalers) beside the weights. Reading those the usual way
imports and calls whatever the file names. Here only what tensors are made of is real; every other class or function
that the file names becomes an inert placeholder, so neither its package nor its code is needed.
"""

import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError

# What a tensor in a torch file is built with. Storages are resolved by `torch.load` itself.
_REAL_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "UntypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
}


class InertObject:
    """Stands for an object of a class that is not loaded. It takes any state and does nothing with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "InertObject":
        """Make a placeholder from whatever the original would have been made from."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item, as of a pickled list subclass."""

    def extend(self, items: Any) -> None:
        """Ignore items, as of a pickled list subclass."""

    def add(self, item: Any) -> None:
        """Ignore an item, as of a pickled set subclass."""


def _is_real(module: str, name: str) -> bool:
    if (module, name) in _REAL_GLOBALS:
        return True
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def load_without_code(path: str | Path, may_be_inert: Callable[[str], bool], mmap: bool) -> Any:
    """Load a torch file with placeholders in place of foreign objects.

    Args:
        path (`str` or `Path`): The file.
        may_be_inert (`Callable[[str], bool]`): Given `module.name`, whether a placeholder may stand for it.
        mmap (`bool`): Whether tensors stay on disk until they are read.

    Returns:
        `Any`: What the file holds; tensors and plain containers are real.

    Raises:
        ConversionError: If the file names something that may not become a placeholder.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if _is_real(module, name):
                return super().find_class(module, name)
            full_name = f"{module}.{name}"
            if not may_be_inert(full_name):
                raise ConversionError(refusal(path, [full_name]))
            return type(name.rpartition(".")[2], (InertObject,), {})

    # The part of the interface of the `pickle` module that `torch.load` uses.
    restricted: Any = types.ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler
    restricted.load = lambda file, **kwargs: Unpickler(file, **kwargs).load()
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=restricted)


def refusal(path: str | Path, names: list[str]) -> str:
    """Say why a file with pickled objects is not read.

    Args:
        path (`str` or `Path`): The file.
        names (`list[str]`): What it wants to import.

    Returns:
        `str`: The message.
    """
    return (
        f"{path} holds pickled objects and not only weights: it names {', '.join(names)}. "
        "Reading such objects the usual way runs code that comes with the file, so it is refused. "
        "If you trust where the file comes from, pass --trust-pickle (trust_pickle=True): "
        "tensors are then read and every other object is skipped."
    )


__all__ = ["InertObject", "load_without_code", "refusal"]
