"""The texts of a data set, to learn a tokenizer from."""

import json
from collections.abc import Iterator
from pathlib import Path

_FILES = ("captions.json", "conversations.json")


def conversation_texts(folder: Path) -> Iterator[str]:
    """Read everything that is said in a data set, captions first.

    Args:
        folder (`Path`): A data set of `small_world.dataset`.

    Yields:
        `str`: Captions, questions and answers, and after each conversation the words between them.
    """
    for name in _FILES:
        for sample in json.loads((folder / name).read_text(encoding="utf-8")):
            yield from (turn["value"].removeprefix("<image>\n") for turn in sample["conversations"])
            yield "USER: ASSISTANT:"
