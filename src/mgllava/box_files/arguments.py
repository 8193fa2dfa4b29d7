"""What arguments of the command line mean."""

import re
from pathlib import Path

from .errors import BoxFileError


def parse_labels(text: str | None) -> list[str] | None:
    """Read a list of labels.

    Args:
        text (`str`, *optional*): `cup,spoon`, or the name of a file with a label per line.

    Returns:
        `list[str]`, *optional*: The labels; `None` if there is no text.

    Raises:
        BoxFileError: If the list is empty.
        OSError: If the file cannot be read.
    """
    if text is None:
        return None
    is_file = Path(text).is_file()
    pieces = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    labels = [piece.strip() for piece in pieces if piece.strip()]
    if not labels:
        raise BoxFileError(f"`labels` must have at least one label, got {text!r}.")
    return labels


def parse_array_task(text: str | None) -> tuple[int, int]:
    """Read which part of a job is meant.

    Args:
        text (`str`, *optional*): `I/N`, counted from 0.

    Returns:
        `tuple[int, int]`: I and N; `(0, 1)` if there is no text.

    Raises:
        BoxFileError: If it is something else.
    """
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise BoxFileError(f"`shard` must be I/N with 0 <= I < N, such as 0/16, got {text!r}.")
    return int(match[1]), int(match[2])


__all__ = ["parse_array_task", "parse_labels"]
