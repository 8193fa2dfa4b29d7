"""Errors of evaluations."""

from mgllava.errors import MGLlavaError


class EvaluationError(MGLlavaError, ValueError):
    """Arguments, files or settings that an evaluation cannot work with; the message says what to do."""


class BadRowError(EvaluationError):
    """A row of a benchmark that cannot be asked or scored; the message is the reason, without a full stop."""

    def __init__(self, reason: str):
        super().__init__(reason.rstrip("."))


__all__ = ["BadRowError", "EvaluationError"]
