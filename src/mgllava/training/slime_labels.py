"""Samples from which the original SliME learns nothing, although they have answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mgllava.processing import SLIME_CHAT_TEMPLATES
from mgllava.processing.text_chunks_common import BOUNDARY_NAMES, IMAGE_TOKEN, PRIVATE_CHARACTERS


@dataclass(frozen=True)
class _Rule:
    """How the original finds the answers in the string of a conversation.

    It cuts the string after each `end`, expects one `tag` in each round, and adds up the tokens of the rounds. If the
    sum is not the number of all tokens without padding, it drops all labels of the sample.
    """

    end: str
    tag: str
    # The string has `end` after each answer; otherwise the original writes it there, and removes it from the ids.
    is_text: bool = True


_RULES = {
    "v1": _Rule("</s>", " ASSISTANT: "),
    "llama3": _Rule("<|eot_conversation|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", is_text=False),
    "plain": None,
}


class SlimeLabels:
    """Compares what a sample teaches with what the original learns from it."""

    def __init__(self, processor: Any):
        self.processor = processor
        template = processor.chat_template
        self.template = next((name for name, known in SLIME_CHAT_TEMPLATES.items() if known == template), None)
        self._rule = _RULES.get(self.template or "plain")

    def clean(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remove what the original removes from texts, its mark between rounds."""
        rule = self._rule
        if rule is None or rule.is_text:
            return conversation
        return [
            {**message, "content": [_without(block, rule.end) for block in message["content"]]}
            for message in conversation
        ]

    def are_lost(self, conversation: list[dict[str, Any]], ids: Sequence[int], limit: int) -> bool:
        """Whether the original drops the labels of a conversation.

        `conversation` is not cleaned yet, `ids` are those of the cleaned one, each image being one of them, and
        `limit` is the longest text in tokens.
        """
        if self._rule is None:
            return False
        rule, tokenizer = self._rule, self.processor.tokenizer
        text = self.processor.apply_chat_template(conversation, **BOUNDARY_NAMES)
        if not rule.is_text:
            text = _mark_answers(text, rule.end)
        text = PRIVATE_CHARACTERS.sub("", text).removeprefix(tokenizer.bos_token or "")
        rounds = text.split(rule.end)
        counted = next((n for n, part in enumerate(rounds) if not part or part.count(rule.tag) != 1), len(rounds))
        total, num_counted = len(ids), len(ids)
        if any(rounds[counted:]):
            end = rule.end if rule.is_text else ""
            num_counted = self._count("".join(part + end for part in rounds[:counted]))
        if IMAGE_TOKEN not in text:  # the tokenizer truncates text alone, nothing else is truncated before the check
            total = min(total, limit)
        padding = tokenizer.unk_token_id if self.template == "v1" else tokenizer.pad_token_id
        total -= list(ids[:total]).count(padding)
        return num_counted < limit and num_counted != total

    def _count(self, text: str) -> int:
        """Return the number of tokens of a text with its BOS; an image is one."""
        pieces = [piece for piece in text.split(IMAGE_TOKEN) if piece]
        encoded = self.processor.tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
        return 1 + text.count(IMAGE_TOKEN) + sum(map(len, encoded))


def _mark_answers(text: str, end: str) -> str:
    """Write `end` after each answer of a rendered conversation with boundaries."""
    answer, boundary = BOUNDARY_NAMES["answer_boundary"], BOUNDARY_NAMES["chunk_boundary"]
    first, *answers = text.split(answer)
    return first + "".join(answer + part.replace(boundary, end, 1) for part in answers)


def _without(block: dict[str, Any], mark: str) -> dict[str, Any]:
    return {**block, "text": block["text"].replace(mark, "")} if block.get("type") == "text" else block


__all__ = ["SlimeLabels"]
