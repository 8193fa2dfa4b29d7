"""The base of all errors that this package raises on purpose.

The files that are copied into saved models cannot import it: `UnreadableImageError` and
`UnsupportedLanguageModelError` derive from built-in errors only.
"""


class MGLlavaError(Exception):
    """Base of this package's errors; each also derives from the built-in error that it is a case of."""


__all__ = ["MGLlavaError"]
