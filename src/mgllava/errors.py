"""The base class of this package's errors, and the form of values in their messages.

Hub folders cannot import it, so `UnreadableImageError` and `UnsupportedLanguageModelError` derive from built-in errors
only.
"""


class MGLlavaError(Exception):
    """Base class of this package's errors, each of which also derives from a built-in error."""


def shorten(text: str) -> str:
    """Shorten a long text for an error message."""
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["MGLlavaError", "shorten"]
