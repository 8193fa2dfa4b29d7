"""Which models vLLM can serve with the same answers as this package."""

from typing import Any

from mgllava.families import Family, resolve

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
    if drops_tokens(config, family) and not getattr(resolve(str(family.base_model)), "placeholders_to_drop", None):
        raise ValueError(
            f"{family.title} embeds images depending on the text, but vLLM counts and caches the tokens of an image "
            "before it knows them. Use `mgllava serve` without `--engine vllm`."
        )


def drops_tokens(config: Any, family: Family) -> bool:
    """Tell whether the tokens of an image depend on the text of the prompt."""
    needed = family.values_without_text
    has_others = any(getattr(config, name) != value for name, value in needed.items())
    return family.images_depend_on_text and (has_others or not needed)


__all__ = ["PLAIN_LANGUAGE_MODELS", "check_config", "drops_tokens"]
