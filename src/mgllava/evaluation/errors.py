"""Errors of evaluations."""

from mgllava.errors import MGLlavaError


class EvaluationError(MGLlavaError, ValueError):
    """Arguments, files or settings that an evaluation cannot work with; the message says what to do."""


class BadRowError(EvaluationError):
    """A row of a benchmark that cannot be asked or scored; the message says why."""


__all__ = ["BadRowError", "EvaluationError"]
