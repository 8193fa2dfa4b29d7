"""Encode text of users, in which `</s>`, `<image>` and other control tokens are ordinary text."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Whether transformers itself can encode control tokens as text (not in 5.16).
_CAN_SANITIZE = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters


def encode_conversation(processor: Any, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
    """Turn a conversation into the model's inputs, reading control tokens in its texts as text.

    If transformers cannot do this (5.16), a space is inserted into each: `</s>` becomes `< /s>`. `kwargs` are passed
    to `apply_chat_template`.
    """
    if _CAN_SANITIZE:
        kwargs["sanitize_control_tokens"] = True
    else:
        logger.warning_once(
            "This release of transformers cannot encode control tokens in the text of users as text. A space is "
            "inserted into each: `</s>` becomes `< /s>`. Upgrade transformers to leave the text unchanged."
        )
        messages = break_tokens(messages, control_tokens(processor))
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def control_tokens(processor: Any) -> re.Pattern[str]:
    """Compile a pattern of control tokens: special tokens, the placeholder, and added tokens of the chat template."""
    template = str(processor.chat_template)
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template}
    placeholders = {processor.image_token, getattr(processor, "video_token", None)} - {None}
    tokens = {token for token in tokens | placeholders if token.strip()}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def break_tokens(value: Any, tokens: re.Pattern[str]) -> Any:
    """Copy a conversation, with a space inserted into each control token of its texts."""
    if isinstance(value, str):
        while tokens.search(value):
            value = tokens.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", value)
        return value
    if isinstance(value, Mapping):
        return {key: break_tokens(item, tokens) if key in ("content", "text") else item for key, item in value.items()}
    if isinstance(value, list):
        return [break_tokens(item, tokens) for item in value]
    return value


__all__ = ["break_tokens", "control_tokens", "encode_conversation"]
