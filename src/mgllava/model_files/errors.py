"""Errors of model files."""

from mgllava.errors import MGLlavaError


class ConversionError(MGLlavaError, ValueError):
    """A checkpoint or a model folder cannot be read, converted or written; the message says what to do about it."""


class UnreadableSourceError(ConversionError, OSError):
    """A model folder or Hub repository that cannot be found or read."""


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["ConversionError", "UnreadableSourceError", "one_line"]
