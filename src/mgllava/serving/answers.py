"""Texts of answers: tokens become text piece by piece, in one way for streams and whole answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from transformers.generation.streamers import BaseStreamer

# Tokens of the text before that are decoded with new ones: a tokenizer may write a token in another way at the start.
_CONTEXT_TOKENS = 6
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so more tokens than that which end in none are bytes that form no character.
_MOST_INCOMPLETE = 8


class AnswerFinishedError(Exception):
    """Ends `generate` from within, where a stop string is complete or nobody waits for the answer."""


class AnswerWriter(BaseStreamer):
    """Receives the tokens of an answer and hands on its text, for `generate(streamer=...)`.

    Text is held back while it may be the beginning of a stop string or of a character. Nothing of a stop string, and
    nothing after it, is handed on.

    Args:
        tokenizer: The tokenizer; nothing else may use it at the same time.
        end_tokens (`Iterable[int]`): Tokens with which the model ends an answer.
        stop (`Sequence[str]`): Strings that end it.
        on_text (`Callable[[str], None]`): Called with each piece of text.
        is_cancelled (`Callable[[], bool]`): Whether nobody waits for the answer.
        before (`Sequence[int]`, *optional*): Tokens that the text continues. Without them it is an answer of its own,
            and white space at its start is dropped.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: Iterable[int],
        stop: Sequence[str],
        on_text: Callable[[str], None],
        is_cancelled: Callable[[], bool],
        before: Sequence[int] | None = None,
    ):
        self._tokenizer, self._end_tokens, self._stop = tokenizer, set(end_tokens), stop
        self._on_text, self._is_cancelled = on_text, is_cancelled
        self._is_continuation = before is not None
        self._tokens = list(before or ())[-_CONTEXT_TOKENS:]
        # The text of the tokens before `_read` has been written.
        self._start, self._read = 0, len(self._tokens)
        self._held, self._text = "", ""
        self._is_prompt = True
        self._has_ended = self._has_stopped = False
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the answer ended: as the model or a stop string has it, or because of its length."""
        return "stop" if self._has_ended or self._has_stopped else "length"

    def put(self, value: Any) -> None:
        """Receive tokens; the first ones are the prompt.

        Args:
            value (`torch.Tensor`): Token ids.

        Raises:
            AnswerFinishedError: If no more are needed.
        """
        if self._is_cancelled():
            raise AnswerFinishedError
        if self._is_prompt:
            self._is_prompt = False
            return
        self.add(value.flatten().tolist())

    def add(self, tokens: Iterable[int]) -> None:
        """Receive tokens of the answer.

        Args:
            tokens (`Iterable[int]`): Token ids.

        Raises:
            AnswerFinishedError: If a stop string is complete.
        """
        for token in tokens:
            if self._has_ended:  # what follows is padding
                return
            self.num_tokens += 1
            if token in self._end_tokens:
                self._has_ended = True
                continue
            self._tokens.append(token)
            self._hold(self._new_text(is_last=False))
            if self._has_stopped:
                raise AnswerFinishedError

    def end(self) -> None:
        """Hand on what was held back; transformers calls it where nothing ended the answer from within."""
        if not self._has_stopped:
            self._hold(self._new_text(is_last=True))
        if not self._has_stopped:
            self._write(self._held)
            self._held = ""

    def _new_text(self, is_last: bool) -> str:
        """Decode what has come since the last complete character."""
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        is_complete = len(text) > len(known) and not text.endswith(_INCOMPLETE)
        if not is_complete and not is_last and len(self._tokens) - self._read < _MOST_INCOMPLETE:
            return ""
        # The next window begins where a character does: tokens of single bytes form no text from its middle on.
        self._start, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _hold(self, text: str) -> None:
        """Look for stop strings, and write what cannot belong to one."""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self._has_stopped = True
            self._write(self._held[: min(places)])
            return
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        self._write(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]

    def _write(self, text: str) -> None:
        if not self._text and not self._is_continuation:
            text = text.lstrip()
        if text:
            self._text += text
            self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
