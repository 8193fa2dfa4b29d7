"""Keys and values of earlier steps, by the name that the installed release of transformers has for them."""

from dataclasses import fields

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# Of an argument of language models and of `generate`, and of a field of outputs: `cache` since transformers 5.24,
# `past_key_values` before.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def either_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Take what was passed under one of two names.

    Args:
        past_key_values (`Cache`, *optional*): Keys and values.
        cache (`Cache`, *optional*): The same by its newer name.

    Returns:
        `Cache`, *optional*: The one that was passed.

    Raises:
        ValueError: If both were.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Pass either `past_key_values` or `cache`, two names of one argument, got both.")
    return cache if past_key_values is None else past_key_values


__all__ = ["CACHE_NAME", "either_cache"]
