"""Convert the values of a recipe to the types of their fields, and check their ranges."""

import difflib
import enum
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mgllava.errors import MGLlavaError, shorten

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
# Fields for which transformers accepts more or fewer values than it declares.
_TYPES: dict[str, Any] = {
    "training.fsdp": bool | str | list[str] | None,
    "training.report_to": str | list[str] | None,
    "training.debug": str | list[str] | None,
    "training.deepspeed": dict | str | None,
    "training.accelerator_config": dict | str | None,
    "training.liger_kernel_config": dict | None,
    "training.train_sampling_strategy": typing.Literal["random", "sequential", "group_by_length"],
}


class WrongValueError(MGLlavaError):
    """A value does not fit its field; the message continues a sentence that starts with the field's name."""


class _Range(typing.NamedTuple):
    test: Callable[[Any], bool]
    words: str


_POSITIVE = _Range(lambda value: value > 0, "greater than 0")
_NOT_NEGATIVE = _Range(lambda value: value >= 0, "0 or greater")
_COUNT = _Range(lambda value: value >= 1, "1 or greater")
_SHARE = _Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
# The seeds that NumPy's generator accepts.
_SEED = _Range(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
_INTERVAL = _Range(
    lambda value: value > 0 and (value < 1 or value == int(value)),
    "a whole number of steps, or a share of all steps between 0 and 1",
)
_RANGES = {
    "global_batch_size": _COUNT,
    "learning_rates": _Range(lambda value: all(rate > 0 for rate in value.values()), "numbers greater than 0"),
    "model.bits": _Range(lambda value: value in (4, 8), "4 or 8"),
    "data.max_text_length": _COUNT,
    "data.num_frames": _COUNT,
    "data.processes": _COUNT,
    "data.detector.threshold": _Range(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "training.per_device_train_batch_size": _COUNT,
    "training.per_device_eval_batch_size": _COUNT,
    "training.gradient_accumulation_steps": _COUNT,
    "training.eval_accumulation_steps": _COUNT,
    "training.num_train_epochs": _POSITIVE,
    "training.max_steps": _Range(lambda value: value >= 1 or value == -1, "1 or greater (-1: no limit)"),
    "training.learning_rate": _POSITIVE,
    "training.warmup_steps": _NOT_NEGATIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.adam_beta1": _SHARE,
    "training.adam_beta2": _SHARE,
    "training.adam_epsilon": _NOT_NEGATIVE,
    "training.max_grad_norm": _NOT_NEGATIVE,
    "training.label_smoothing_factor": _SHARE,
    "training.neftune_noise_alpha": _POSITIVE,
    "training.torch_empty_cache_steps": _COUNT,
    "training.logging_steps": _INTERVAL,
    "training.eval_steps": _INTERVAL,
    "training.save_steps": _INTERVAL,
    "training.eval_delay": _NOT_NEGATIVE,
    "training.save_total_limit": _Range(lambda value: value >= 1, "1 or greater (null: keep all)"),
    "training.seed": _SEED,
    "training.data_seed": _SEED,
    "training.dataloader_num_workers": _NOT_NEGATIVE,
    "training.dataloader_prefetch_factor": _COUNT,
    "training.ddp_timeout": _COUNT,
    "training.ddp_bucket_cap_mb": _COUNT,
    "lora.r": _COUNT,
    "lora.lora_alpha": _COUNT,
    "lora.lora_dropout": _SHARE,
}


def read_value(value: Any, kind: Any, name: str) -> Any:
    """Convert a value, from YAML or Python, to plain data of its field's type; `name` is the field's dotted name.

    The type decides what text means: `no` is a choice of `save_strategy` and false for a boolean field; `"1e-5"` is a
    number for a numeric field.
    """
    read = _read(value, _TYPES.get(name, kind))
    # `evaluation` has the same keys as `data`.
    name = re.sub(r"^evaluation\.", "data.", name)
    if read is None:
        return None
    if (limits := _RANGES.get(name)) is not None and not limits.test(read):
        raise WrongValueError(f"must be {limits.words}, got {_shown(value)}")
    return read


def _read(value: Any, kind: Any) -> Any:
    members = _members(kind)
    if Any in members:
        _refuse_words(value)
        return value
    if isinstance(value, enum.Enum):
        value = value.value
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or (isinstance(value, str) and value == "None" and type(None) in members):
        if type(None) not in members:
            raise WrongValueError(f"must be {_words(members)}, got null. Leave the key out for its default")
        if value is not None:
            raise WrongValueError("got the word None. Write null")
        return None
    # First without conversion, so that `str | bool` reads true as a boolean and `no` as text.
    for reader in (_as_it_is, _converted):
        for member in members:
            read = reader(value, member)
            if read is not _NOT_THIS:
                return read
    problem = f"must be {_words(members)}, got {_shown(value)}"
    if str in members and isinstance(value, bool | int | float):
        problem += ". Write it in quotes if it is meant as text"
    if isinstance(value, str):
        problem += _nearest(value, [choice for member in members for choice in _choices(member)])
    raise WrongValueError(problem)


_NOT_THIS = object()


def _members(kind: Any) -> list[Any]:
    """List the members of a union type, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = [member for part in typing.get_args(kind) for member in _members(part)]
        # An enumeration lists the allowed text, so `str` next to it is left out.
        if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in found):
            found = [member for member in found if member is not str]
        return found
    return [kind]


def _choices(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [member.value for member in kind]
    return []


def _as_it_is(value: Any, kind: Any) -> Any:
    """Return a value that already has the type, or `_NOT_THIS`."""
    origin = typing.get_origin(kind) or kind
    if choices := _choices(kind):
        matching = [choice for choice in choices if choice == value and type(choice) is type(value)]
        # peft has a pattern with brackets among its choices.
        is_pattern = any(isinstance(choice, str) and "[" in choice for choice in choices)
        return value if matching or (is_pattern and isinstance(value, str)) else _NOT_THIS
    if origin is list and isinstance(value, list | tuple):
        items = (typing.get_args(kind) or (Any,))[0]
        return [_read(item, items) for item in value]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        if (items := (*typing.get_args(kind), Any, Any)[1]) is not Any:
            return {key: _read(item, items) for key, item in value.items()}
        _refuse_words(value)
        return dict(value)
    if origin is tuple and isinstance(value, list | tuple):
        return list(value)
    if origin in (bool, int, str) and type(value) is origin:
        return value
    if origin is float and type(value) is float:
        return _finite(value)
    # YAML cannot express objects of other packages, only their keys and values.
    if isinstance(origin, type) and origin.__module__ not in ("builtins", "collections.abc"):
        return value if isinstance(value, origin) else dict(value) if isinstance(value, Mapping) else _NOT_THIS
    return _NOT_THIS


def _converted(value: Any, kind: Any) -> Any:
    """Convert a value to the type if it is unambiguous, or return `_NOT_THIS`."""
    word = value.strip().lower() if isinstance(value, str) else value
    if kind is bool:
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        return bool(value) if type(value) is int and value in (0, 1) else _NOT_THIS
    if kind in (int, float) and not isinstance(value, bool):
        if isinstance(value, str):
            with suppress(ValueError):
                value = int(word) if word.lstrip("+-").isdigit() else float(word)
        if not isinstance(value, int | float):
            return _NOT_THIS
        value = _finite(value)
        if kind is float:
            return value
        return int(value) if value == int(value) else _NOT_THIS
    if isinstance(word, str):
        for choice in _choices(kind):
            if choice is not None and str(choice).lower() == word and isinstance(choice, str | bool):
                return choice
    return _NOT_THIS


def _refuse_words(value: Any) -> None:
    """Refuse yes, no, on and off in dictionaries of unknown types: as text, all of them would be true in Python."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            if isinstance(below, str) and below.lower() in ("yes", "no", "on", "off"):
                raise WrongValueError(f"has {key}={below}, which is read as text here. Write true or false")
            _refuse_words(below)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise WrongValueError(f"must be a finite number, got {value}")
    return value


# How many choices a message lists.
_LISTED = 15


def _words(members: Sequence[Any]) -> str:
    words: list[str] = []
    for member in members:
        origin = typing.get_origin(member) or member
        named = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
        if choices := _choices(member):
            words.append(_either([choice for choice in choices if choice is not None][:_LISTED]))
        elif origin in (list, tuple):
            items = typing.get_args(member)
            words.append("a list" + (f" of {_words(_members(items[0]))}s" if items and items[0] is str else ""))
        elif origin in (dict, Mapping) or origin not in named:
            words.append("keys and values")
        else:
            words.append(named[origin])
    return " or ".join(dict.fromkeys(words))


def _either(choices: Sequence[Any]) -> str:
    names = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _nearest(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices])
    return f". Did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    return shorten(
        "true" if value is True else "false" if value is False else "null" if value is None else repr(value)
    )


__all__ = ["WrongValueError", "read_value"]
