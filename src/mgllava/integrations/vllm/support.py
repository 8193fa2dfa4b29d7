"""Which models vLLM can serve with the same answers as this package."""

import json
from typing import Any

from mgllava.families import Family

# Language models whose logits are the product of their last hidden states with `lm_head`, which is all that vLLM
# computes. Others scale or cap them.
PLAIN_LANGUAGE_MODELS = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def check_config(config: Any, family: Family) -> None:
    """Raise a `ValueError` for a configuration that vLLM would serve with other answers."""
    language_model = config.get_text_config().model_type
    if language_model not in PLAIN_LANGUAGE_MODELS:
        raise ValueError(
            f"`text_config.model_type` must be one of {', '.join(PLAIN_LANGUAGE_MODELS)} for vLLM, got "
            f"{language_model!r}: its logits were not compared. Use `mgllava serve` without `--engine vllm`."
        )
    if not family.images_depend_on_text:
        return
    needed = family.values_without_text
    wrong = {name: value for name, value in needed.items() if getattr(config, name) != value}
    if not wrong and needed:
        return
    given = ", ".join(f"`{name}` is {getattr(config, name)!r}" for name in wrong)
    advice = f"To serve all tokens, set hf_overrides={json.dumps(wrong)}: the answers then differ from the published "
    raise ValueError(
        f"{family.title} drops tokens of images depending on the text{given and f' ({given})'}, but vLLM counts and "
        "caches the tokens of an image before it knows them. "
        + (f"{advice}ones, and prompts are longer. Or use" if needed else "Use")
        + " `mgllava serve` without `--engine vllm`, which drops them."
    )


__all__ = ["PLAIN_LANGUAGE_MODELS", "check_config"]
