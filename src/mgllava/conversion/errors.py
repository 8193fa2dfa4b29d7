"""The one error of the converter."""


class ConversionError(ValueError):
    """A checkpoint or a repository cannot be converted; the message says what to do about it."""


__all__ = ["ConversionError"]
