"""Read the texts of a data set, to train a tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path


def conversation_texts(folder: Path) -> Iterator[str]:
    """Yield all captions, questions and answers, and after each conversation the words of the chat template."""
    for name in ("captions.json", "conversations.json"):
        for sample in json.loads((folder / name).read_text(encoding="utf-8")):
            yield from (turn["value"].removeprefix("<image>\n") for turn in sample["conversations"])
            yield "USER: ASSISTANT:"
