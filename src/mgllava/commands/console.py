"""Functions of all commands: errors as messages, progress bars, printable text."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mgllava.errors import MGLlavaError

_Command = TypeVar("_Command", bound=Callable[..., None])


def errors_as_messages(*kinds: type[Exception]) -> Callable[[_Command], _Command]:
    """Let a command print expected errors as one message, with its options for arguments, and exit with 1."""
    expected: tuple[type[Exception], ...] = (MGLlavaError, OSError, *kinds)

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            try:
                command(*arguments, **options)
            except expected as error:
                words = _words(command)
                text = re.sub(
                    r"`(\w+)(?:=(?:True|False))?`", lambda found: words.get(found[1], found[0]), f"error: {error}"
                )
                say(text, stderr=True, style="red")
                raise typer.Exit(1) from None

        return run  # type: ignore[return-value]

    return decorate


def _words(command: Callable[..., None]) -> dict[str, str]:
    """Map the names of a command's parameters to its options."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return {
        parameter.name: parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "argument"
        else [*parameter.opts, *parameter.secondary_opts][0]
        for parameter in typer.main.get_command(app).params
        if parameter.name is not None
    }


def say(text: str, stderr: bool = False, style: str | None = None) -> None:
    """Print a text without markup or line breaks of its own."""
    Console(stderr=stderr).print(printable(text), style=style, soft_wrap=True, markup=False, highlight=False)


def is_main_process() -> bool:
    """Tell whether this is the main process of `accelerate launch`, which prints."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Escape control characters and invalid Unicode, which names in downloaded files may hold."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield progress


def image_bar() -> AbstractContextManager[Callable[[int, int], None]]:
    """Show the progress of the main process, whose share of the images is as large as any other."""
    return _bar("images")


def question_bar() -> AbstractContextManager[Callable[[int, int], None]]:
    """Show the progress of the main process in answering questions."""
    return _bar("questions")


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not is_main_process()) as bars:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        task = bars.add_task(unit if processes == 1 else f"{unit} (process 1 of {processes})", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, advance=done, total=total)

        yield progress


__all__ = ["errors_as_messages", "image_bar", "is_main_process", "printable", "progress_bars", "question_bar", "say"]
