"""Benchmarks of image understanding: the original's questions, boxes and scores."""

from .answering import Answerer
from .benchmarks import BENCHMARKS, Benchmark, find_benchmark
from .box_sources import BoxChanges, BoxSource
from .errors import BadRowError, EvaluationError
from .evaluate import Evaluation, evaluate
from .task import Task, load_task

__all__ = [
    "BENCHMARKS",
    "Answerer",
    "BadRowError",
    "Benchmark",
    "BoxChanges",
    "BoxSource",
    "Evaluation",
    "EvaluationError",
    "Task",
    "evaluate",
    "find_benchmark",
    "load_task",
]
