"""The texts of a data set, as the model will see them but for the pictures."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mgllava.processing import CHAT_TEMPLATES

_FILES = ("captions.json", "conversations.json")


def conversations(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Read the conversations of a data set, captions first, without their pictures.

    Args:
        folder (`Path`): A data set of `small_world.dataset`.

    Yields:
        `list[dict]`: Messages with `role` and `content`.
    """
    roles = {"human": "user", "gpt": "assistant"}
    for name in _FILES:
        for sample in json.loads((folder / name).read_text(encoding="utf-8")):
            yield [
                {"role": roles[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
                for turn in sample["conversations"]
            ]


def conversation_texts(folder: Path) -> Iterator[str]:
    """Read everything that is said in a data set, to learn a tokenizer from."""
    for messages in conversations(folder):
        yield from (message["content"] for message in messages)
        yield "USER: ASSISTANT:"


def conversation_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Encode the conversations of a data set in the template of the small model.

    Args:
        folder (`Path`): A data set of `small_world.dataset`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.

    Returns:
        `list[torch.Tensor]`: Ids of each conversation.
    """
    rendered = [
        tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES["vicuna"], tokenize=False)
        for messages in conversations(folder)
    ]
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return [torch.tensor(ids) for ids in encoded]
