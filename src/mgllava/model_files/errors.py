"""The errors of model files."""

from mgllava.errors import MGLlavaError


class ConversionError(MGLlavaError, ValueError):
    """A checkpoint or a model folder cannot be converted; the message says what to do about it."""


class UnreadableSourceError(ConversionError, OSError):
    """A model folder or Hub repository that cannot be found or read."""


__all__ = ["ConversionError", "UnreadableSourceError"]
