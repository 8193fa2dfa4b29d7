"""Run a measurement in a process of its own, so that memory peaks and settings do not mix."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def run_alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function of a module, called in a new process that imports the module again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()
