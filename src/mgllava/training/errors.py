"""The errors of training."""

from mgllava.errors import MGLlavaError


class TrainingError(MGLlavaError, ValueError):
    """A recipe or its data cannot be used; the message says what to do about it."""


class SampleError(TrainingError):
    """A sample cannot be learned from; the message starts with its id."""


__all__ = ["SampleError", "TrainingError"]
