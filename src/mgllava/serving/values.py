"""Check the values of requests, and show them in errors."""

import reprlib
from typing import Any

from .errors import RequestError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that float32 can hold, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def shown(value: Any) -> str:
    """Return the type and the beginning of a value, in few characters even for huge values."""
    return f"{type(value).__name__} {_SHORT.repr(value)[:80]}" if value is not None else "nothing"


def wrong_value(
    field: str, expected: str, value: Any, param: str | None = None, code: str | None = None
) -> RequestError:
    """Return the error about a field that has another value than expected; `param` is by default the field."""
    return RequestError(f"`{field}` must be {expected}, got {shown(value)}.", param or field, code)


__all__ = ["is_number", "shown", "wrong_value"]
