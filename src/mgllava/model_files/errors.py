"""The error of model files."""

from mgllava.errors import MGLlavaError


class ConversionError(MGLlavaError, ValueError):
    """A checkpoint or a repository cannot be converted; the message says what to do about it."""


__all__ = ["ConversionError"]
