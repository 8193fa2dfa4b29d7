"""The base class of this package's errors.

Hub folders cannot import it, so `UnreadableImageError` and `UnsupportedLanguageModelError` derive from built-in errors
only.
"""


class MGLlavaError(Exception):
    """Base class of this package's errors, each of which also derives from a built-in error."""


__all__ = ["MGLlavaError"]
