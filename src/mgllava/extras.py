"""Optional dependencies: the extras of setup.cfg."""

from importlib import import_module
from typing import Any


def install_hint(extra: str) -> str:
    """Say how to install an extra: from a clone of this git repository, since the package is not on PyPI."""
    return f"Install the extra `{extra}` from a clone of the mgllava git repository: pip install -e '.[{extra}]'"


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module of an extra; if that fails, the error says that `user` needs it, and how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs {module.split('.')[0]} ({error}). {install_hint(extra)}") from error


__all__ = ["import_extra", "install_hint"]
