"""Packages that only some features need: the extras of setup.cfg."""

from importlib import import_module
from typing import Any


def install_hint(extra: str) -> str:
    """Say how to install an extra. The package is not on the index, so its name alone would not do."""
    return f"Install the extra `{extra}` from a clone of the mgllava git repository: pip install -e '.[{extra}]'"


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module of an extra; the error of a missing one says who needs it and how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs {module.split('.')[0]} ({error}). {install_hint(extra)}") from error


__all__ = ["import_extra", "install_hint"]
