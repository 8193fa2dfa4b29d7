"""The errors of training."""

from mgllava.errors import MGLlavaError


class TrainingError(MGLlavaError, ValueError):
    """A recipe or its data cannot be used."""


class SampleError(TrainingError):
    """A sample cannot be used for training; the message names its id."""


__all__ = ["SampleError", "TrainingError"]
