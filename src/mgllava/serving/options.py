"""The generation options of a request, checked before anything is computed."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from .errors import RequestError
from .limits import MAX_BEAMS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from .values import is_number, shown, wrong_value

# Longest answer if neither the request nor the model sets it.
_MAX_TOKENS = 1024
_MAX_TOKEN_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Logits are below 1e4, and float32 ends at 3e38: divided by these temperatures, or scaled by these penalties, they
# stay finite. Both ends are included. A temperature of 0 is allowed too, and means greedy.
_RANGES = {
    "temperature": (1e-6, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (1e-6, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "length_penalty": (-5.0, 5.0),
}
_INT64 = (-(2**63), 2**63 - 1)
_MAX_BIAS = 100.0
_MAX_CONFIG_CHARACTERS = 100_000
_MAX_WORDS, _MAX_WORD_TOKENS, _MAX_NGRAM = 1000, 100, 1000

_SAMPLING = {
    "frequency_penalty",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
}
_COMMON = {*_SAMPLING, "generation_config", "model", "stream", "stream_options"}
# Fields of OpenAI's API that do not change the answer.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"chat_template_kwargs": ({},), "best_of": (1,), "n": (1,)}
_REASONS = {
    "best_of": "send several requests",
    "chat_template_kwargs": "the operator sets them",
    "n": "send several requests",
}


@dataclass(frozen=True)
class Fields:
    """The fields of requests to an endpoint.

    Attributes:
        used: Fields that are read, in addition to those that all endpoints have.
        unsupported: Fields that the server does not support, each with the values that are accepted because they have
            no effect; `None` always is.
    """

    used: set[str]
    unsupported: dict[str, tuple[Any, ...]] = field(default_factory=dict)


CHAT_FIELDS = Fields(
    {"boxes", "messages", "max_tokens", "max_completion_tokens"},
    {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logprobs": (False,),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
)
RESPONSE_FIELDS = Fields(
    {"boxes", "input", "instructions", "max_output_tokens"},
    {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": None}, {"effort": "none"}),
        "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
)
COMPLETION_FIELDS = Fields({"prompt", "max_tokens"}, {"echo": (False,), "logprobs": (), "suffix": ("",)})


@dataclass
class Options:
    """How to generate an answer.

    Attributes:
        config: The options that transformers applies itself, always without sampling.
        temperature: 0 means greedy.
        usage_in_stream: Whether the numbers of tokens come in a chunk of their own; `None`: in the last chunk.
    """

    config: GenerationConfig
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = _MAX_TOKENS
    is_stream: bool = False
    usage_in_stream: bool | None = None


def check_fields(body: Mapping[str, Any], fields: Fields) -> None:
    """Refuse unknown fields, and values whose effect the server does not support."""
    unsupported = {**_COMMON_UNSUPPORTED, **fields.unsupported}
    for name, value in body.items():
        if name in fields.used or name in _COMMON or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in unsupported:
            message = f"`{name[:50]}` must be absent: this server does not know it."
            raise RequestError(message, name[:50], "unknown_parameter", 422)
        # Compared as JSON: in Python, 1 equals True and 0 equals False.
        if _canonical(value) not in map(_canonical, unsupported[name]):
            reason = _REASONS.get(name, "this server does not support it")
            allowed = "".join(f" or {_canonical(neutral)}" for neutral in unsupported[name][:1])
            raise RequestError(f"`{name}` must be absent{allowed}, got {shown(value)}: {reason}.", name, "unsupported")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def read_options(body: Mapping[str, Any], model_config: GenerationConfig, vocab_size: int, compile: bool) -> Options:
    """Read and check the options of a request; `model_config` has the defaults.

    `compile` means to decode with a static cache.
    """
    config = deepcopy(model_config)
    given = _read_generation_config(body.get("generation_config"), vocab_size)
    sampling = {name: value for name, value in given.items() if name in _CHECKS_OF_SAMPLING}
    for name in _CHECKS_OF_SAMPLING:
        if name in _SAMPLING and body.get(name) is not None:
            _check(body, name, "", vocab_size)
            sampling[name] = body[name]

    does_sample = sampling.get("do_sample", config.do_sample)
    if body.get("temperature") is not None:
        does_sample = body["temperature"] > 0
    elif "do_sample" not in given:
        does_sample = does_sample or any(sampling.get(name) is not None for name in ("top_p", "top_k", "min_p"))
    limits = {
        name: sampling.get(name, getattr(config, name, None) if config.do_sample else None)
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p")
    }
    temperature = 1.0 if limits["temperature"] is None else float(limits["temperature"])

    # transformers never samples itself: it would draw from one generator for all requests.
    config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    suppressed = [*(config.suppress_tokens or []), *(given.pop("suppress_tokens", None) or [])]
    config.update(**{name: value for name, value in given.items() if name in _CHECKS_OF_CONFIG})
    config.suppress_tokens = sorted(set(suppressed)) or None
    if sampling.get("repetition_penalty") is not None:
        config.repetition_penalty = float(sampling["repetition_penalty"])
    if does_sample and temperature > 0 and (config.num_beams or 1) > 1:
        raise RequestError("`generation_config.num_beams` must be 1 for sampling.", "generation_config")

    # As in `transformers serve`, the model's own limit only counts if it is higher.
    max_tokens = given.get("max_new_tokens") or max(config.max_new_tokens or 0, _MAX_TOKENS)
    for name in reversed(_MAX_TOKEN_FIELDS):
        if body.get(name) is not None:
            if not _is_whole(body[name], 1, _INT64[1]):
                raise wrong_value(name, "a whole number, at least 1", body[name])
            max_tokens = body[name]
    # `max_tokens` limits the answer; `max_length` would limit the whole conversation.
    config.max_length, config.stop_strings = None, None
    if compile and config.cache_implementation is None:
        config.cache_implementation = "static"
    stop = body["stop"] if body.get("stop") is not None else given.get("stop_strings")
    return Options(
        config,
        temperature=temperature if does_sample else 0.0,
        top_p=limits["top_p"],
        top_k=limits["top_k"] if (limits["top_k"] or 0) > 0 else None,
        min_p=limits["min_p"],
        typical_p=limits["typical_p"],
        frequency_penalty=float(body.get("frequency_penalty") or 0.0),
        presence_penalty=float(body.get("presence_penalty") or 0.0),
        logit_bias=_read_bias(body.get("logit_bias"), vocab_size),
        seed=body.get("seed"),
        stop=_read_stop(stop, "stop"),
        max_tokens=max_tokens,
        **_read_stream(body),
    )


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _in_range(name: str) -> tuple[str, Callable[[Any, int], bool]]:
    low, high = _RANGES[name]
    expected = f"between {low:g} and {high:g}"
    if name == "temperature":
        return f"0 or {expected}", lambda value, _: is_number(value) and (value == 0 or low <= value <= high)
    return expected, lambda value, _: is_number(value) and low <= value <= high


def _whole(low: int, high: int) -> tuple[str, Callable[[Any, int], bool]]:
    return f"a whole number from {low} to {high}", lambda value, _: _is_whole(value, low, high)


def _is_ids(value: Any, vocab_size: int, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(_is_whole(id_, 0, vocab_size - 1) for id_ in value)


_TOKEN = ("a token id", lambda value, vocab_size: _is_whole(value, 0, vocab_size - 1))
_BOOLEAN = ("true or false", lambda value, _: isinstance(value, bool))
# What each option must be, in words and as a function of the value and the size of the vocabulary.
_CHECKS_OF_SAMPLING: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "do_sample": _BOOLEAN,
    "top_k": _whole(-1, _INT64[1]),
    "seed": _whole(*_INT64),
    **{name: _in_range(name) for name in _RANGES if name != "length_penalty"},
}
# Options that a request may also set in a `generation_config`, which `transformers chat` sends. None of them selects
# code, files, caches or outputs.
_CHECKS_OF_CONFIG: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "bad_words_ids": (
        f"at most {_MAX_WORDS} lists of token ids",
        lambda value, vocab_size: (
            isinstance(value, list)
            and 0 < len(value) <= _MAX_WORDS
            and all(_is_ids(word, vocab_size, _MAX_WORD_TOKENS) and word for word in value)
        ),
    ),
    "bos_token_id": _TOKEN,
    "early_stopping": ("true, false or 'never'", lambda value, _: isinstance(value, bool) or value == "never"),
    "eos_token_id": (
        "a token id or a list of token ids",
        lambda value, vocab_size: _is_whole(value, 0, vocab_size - 1) or (_is_ids(value, vocab_size, 100) and value),
    ),
    "length_penalty": _in_range("length_penalty"),
    "min_new_tokens": _whole(0, _INT64[1]),
    "no_repeat_ngram_size": _whole(0, _MAX_NGRAM),
    "num_beams": _whole(1, MAX_BEAMS),
    "pad_token_id": _TOKEN,
}
_OTHER_CHECKS: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "max_new_tokens": _whole(1, _INT64[1]),
    "stop_strings": ("a string or a list of strings", lambda value, _: isinstance(value, str | list)),
    "suppress_tokens": ("a list of token ids", lambda value, vocab_size: _is_ids(value, vocab_size, vocab_size)),
    "transformers_version": ("a string", lambda value, _: isinstance(value, str)),
}
_NOT_IN_CONFIG = ("frequency_penalty", "presence_penalty", "seed")
_CHECKS = {**_CHECKS_OF_SAMPLING, **_CHECKS_OF_CONFIG, **_OTHER_CHECKS}


def _check(values: Mapping[str, Any], name: str, prefix: str, vocab_size: int) -> None:
    expected, is_valid = _CHECKS[name]
    value = values.get(name)
    if value is not None and not is_valid(value, vocab_size):
        raise wrong_value(f"{prefix}{name}", expected, value, param=prefix.rstrip(".") or name)


def _read_generation_config(text: Any, vocab_size: int) -> dict[str, Any]:
    param = "generation_config"
    if text is None:
        return {}
    try:
        config = json.loads(text) if len(text) <= _MAX_CONFIG_CHARACTERS else None
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise wrong_value(param, "a string with a JSON object", text)
    known = set(_CHECKS) - set(_NOT_IN_CONFIG)
    if unknown := sorted(set(config) - known):
        raise RequestError(f"`{param}` may have {', '.join(sorted(known))}, got also {str(unknown)[:200]}.", param)
    for name in config:
        _check(config, name, f"{param}.", vocab_size)
    _read_stop(config.get("stop_strings"), f"{param}.stop_strings")
    return {name: value for name, value in config.items() if value is not None}


def _read_stop(stop: Any, param: str) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in strings)
    ):
        expected = f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        raise wrong_value(param, expected, stop, param=param.partition(".")[0])
    return tuple(strings)


def _read_bias(bias: Any, vocab_size: int) -> dict[int, float]:
    if bias is None:
        return {}

    def is_valid(token: str, value: Any) -> bool:
        is_token = token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) < vocab_size
        return is_token and is_number(value) and abs(value) <= _MAX_BIAS

    wrong: str | None = None
    if isinstance(bias, Mapping):
        entries = (f"{token[:20]!r}: {shown(value)}" for token, value in bias.items() if not is_valid(token, value))
        wrong = next(entries, None)
    else:
        wrong, bias = shown(bias), {}
    if wrong:
        raise RequestError(
            f"`logit_bias` must map token ids below {vocab_size} to numbers from {-_MAX_BIAS:g} to {_MAX_BIAS:g}, "
            f"got {wrong}.",
            "logit_bias",
        )
    return {int(token): float(value) for token, value in bias.items()}


def _read_stream(body: Mapping[str, Any]) -> dict[str, Any]:
    is_stream, options = body.get("stream"), body.get("stream_options")
    if not isinstance(is_stream, bool | None):
        raise wrong_value("stream", "true or false", is_stream)
    if options is None:
        return {"is_stream": bool(is_stream)}
    known = {"include_usage", "include_obfuscation"}
    if (
        not isinstance(options, Mapping)
        or set(options) - known
        or not all(isinstance(value, bool | None) for value in options.values())
    ):
        raise wrong_value("stream_options", f"an object with true or false for {' and '.join(sorted(known))}", options)
    if not is_stream:
        raise RequestError("`stream_options` must be absent unless `stream` is true.", "stream_options")
    return {"is_stream": True, "usage_in_stream": options.get("include_usage")}


__all__ = ["CHAT_FIELDS", "COMPLETION_FIELDS", "RESPONSE_FIELDS", "Fields", "Options", "check_fields", "read_options"]
