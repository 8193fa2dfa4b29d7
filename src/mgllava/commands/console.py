"""What the commands share: errors as messages, and progress."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def errors_as_messages(*kinds: type[Exception]) -> Iterator[None]:
    """Print what went wrong in one message, and exit with 1."""
    from mgllava.model_files.errors import ConversionError

    expected: tuple[type[Exception], ...] = (ConversionError, OSError, *kinds)
    try:
        yield
    except expected as error:
        message = printable(f"error: {error}")
        Console(stderr=True).print(message, style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1) from None


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show: names in files of strangers may hold anything."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield progress


@contextmanager
def image_bar() -> Iterator[Callable[[int, int], None]]:
    """Show one bar, that of the main process, which has as much to do as any other."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=os.environ.get("RANK", "0") != "0") as bars:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        task = bars.add_task("images" if processes == 1 else f"images (process 1 of {processes})", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, advance=done, total=total)

        yield progress


__all__ = ["errors_as_messages", "image_bar", "printable", "progress_bars"]
