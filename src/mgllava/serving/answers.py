"""Decode the tokens of answers piece by piece, in the same way for streams and whole answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from transformers.generation.streamers import BaseStreamer

# Earlier tokens that are decoded with new ones: a tokenizer may write a token differently at the start of a text.
_CONTEXT_TOKENS = 6
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, of one token each. After this many tokens the bytes are not valid UTF-8.
_MOST_INCOMPLETE = 8


class AnswerFinishedError(Exception):
    """Raised within `generate` to end it: a stop string is complete, or the client has disconnected."""


class AnswerWriter(BaseStreamer):
    """Streamer for `generate` that receives the tokens of an answer and passes its text to `on_text`.

    Text is held back while it may be the beginning of a stop string or of a character. A stop string and what follows
    it are never passed on. `before` are tokens that the text continues; without them, white space at the start of the
    text is dropped.
    """

    def __init__(
        self,
        tokenizer: Any,  # not used elsewhere at the same time
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
        # Tokens are decoded from `_start`; the text of those before `_read` has been written.
        self._start, self._read = 0, len(self._tokens)
        self._held = ""
        self._is_prompt = True
        self._has_ended = self._has_stopped = False
        self.text = ""
        self.num_tokens = 0

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """`"stop"` if the model or a stop string ended the answer."""
        return "stop" if self._has_ended or self._has_stopped else "length"

    def put(self, value: Any) -> None:
        """Receive a tensor of token ids; the first one is the prompt."""
        if self._is_cancelled():
            raise AnswerFinishedError
        if self._is_prompt:
            self._is_prompt = False
            return
        self.add(value.flatten().tolist())

    def add(self, tokens: Iterable[int]) -> None:
        """Receive tokens of the answer; raise `AnswerFinishedError` after a complete stop string."""
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
        """Write the text that was held back; transformers calls this unless `AnswerFinishedError` ended the answer."""
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
        # The next window starts where a character starts: from its middle, tokens of single bytes form no text.
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
        if not self.text and not self._is_continuation:
            text = text.lstrip()
        if text:
            self.text += text
            self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of a text that is a prefix of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


__all__ = ["AnswerFinishedError", "AnswerWriter"]
