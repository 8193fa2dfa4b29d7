"""The options of a request that decide about generation, checked before anything is computed."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mgllava.serving.errors import RequestError
from mgllava.serving.limits import MAX_BEAMS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS

_MAX_TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Ends included. transformers makes a repetition penalty of 1 + frequency_penalty, which must be positive.
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-0.99, 2.0),
    "seed": (-(2.0**63), 2.0**63 - 2**10),
}
# What a request may set in a `generation_config`, which `transformers chat` sends: nothing that chooses code, files,
# caches or outputs.
_GENERATION_CONFIG = {
    "bad_words_ids",
    "bos_token_id",
    "do_sample",
    "early_stopping",
    "eos_token_id",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "pad_token_id",
    "repetition_penalty",
    "stop_strings",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
}
# Fields that transformers ignores, although the answer would be another one with them.
_WITHOUT_EFFECT = ("tools", "functions", "response_format", "logprobs", "echo", "previous_response_id", "conversation")


def check_options(body: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Check the options of a request.

    Args:
        body (`Mapping`): The request.
        vocab_size (`int`): Number of token ids.

    Returns:
        `dict`: The request, with `max_completion_tokens` as `max_tokens`, which every release of transformers reads,
        and floats in `logit_bias`.

    Raises:
        RequestError: If an option is not as it must be, or has no effect here.
    """
    body = dict(body)
    for name in _WITHOUT_EFFECT:
        value = body.get(name)
        if value and not (name == "response_format" and value == {"type": "text"}):
            raise RequestError(f"`{name}` must be absent: this server does not support it.", name, "unsupported")
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise RequestError(f"`{name}` must be 1, got {body[name]!r}: send several requests.", name, "unsupported")
    if body.get("chat_template_kwargs"):
        raise RequestError(
            "`chat_template_kwargs` must be absent: the operator sets them, with --chat-template-kwargs.",
            "chat_template_kwargs",
            "unsupported",
        )
    if not isinstance(body.get("stream"), bool | None):
        raise RequestError(f"`stream` must be true or false, got {body['stream']!r}.", "stream")
    for name in _MAX_TOKEN_FIELDS:
        if body.get(name) is not None and not _is_count(body[name]):
            raise RequestError(f"`{name}` must be a whole number, at least 1, got {body[name]!r}.", name)
    if (tokens := body.pop("max_completion_tokens", None)) is not None:
        body["max_tokens"] = tokens
    for name, (low, high) in _RANGES.items():
        value = body.get(name)
        if value is None:
            continue
        if not _is_number(value) or not low <= value <= high or (name == "seed" and not isinstance(value, int)):
            raise RequestError(f"`{name}` must be between {low:g} and {high:g}, got {value!r}.", name)
    _check_stop(body.get("stop"), "stop")
    if body.get("logit_bias") is not None:
        body["logit_bias"] = _read_bias(body["logit_bias"], vocab_size)
    if body.get("generation_config") is not None:
        _check_generation_config(body["generation_config"])
    return body


def _check_stop(stop: Any, param: str) -> None:
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None:
        return
    if (
        not isinstance(strings, list)
        or not 0 < len(strings) <= MAX_STOP_STRINGS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in strings)
    ):
        raise RequestError(
            f"`{param}` must be 1 to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters, "
            f"got {str(stop)[:80]!r}.",
            param,
        )


def _read_bias(bias: Any, vocab_size: int) -> dict[str, float]:
    if not isinstance(bias, Mapping) or not all(
        token.isdecimal() and int(token) < vocab_size and _is_number(value) for token, value in bias.items()
    ):
        raise RequestError(
            f"`logit_bias` must map token ids below {vocab_size} to numbers, got {str(bias)[:80]!r}.", "logit_bias"
        )
    return {token: float(value) for token, value in bias.items()}  # JSON has one kind of number, transformers two


def _check_generation_config(text: Any) -> None:
    param = "generation_config"
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise RequestError(f"`{param}` must be a string with a JSON object, got {str(text)[:80]!r}.", param)
    if unknown := sorted(set(config) - _GENERATION_CONFIG):
        raise RequestError(f"`{param}` may have {', '.join(sorted(_GENERATION_CONFIG))}, got also {unknown}.", param)
    for name, most in (("num_beams", MAX_BEAMS), ("max_new_tokens", math.inf)):
        value = config.get(name)
        if value is not None and not (_is_count(value) and value <= most):
            raise RequestError(f"`{param}.{name}` must be a whole number from 1 to {most}, got {value!r}.", param)
    _check_stop(config.get("stop_strings"), f"{param}.stop_strings")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
