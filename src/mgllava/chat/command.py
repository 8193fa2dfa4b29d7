"""What `mgllava chat` does: load, then talk."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, set_seed

from mgllava import MGLlavaConfig, quantization_config
from mgllava.box_files import read_boxes

from .session import ChatError, ChatSession, read_picture
from .terminal import ChatTerminal

# Logits are divided by it, in fp32: below, they overflow; above, all tokens are equally likely.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-6, 1e4


def chat(
    model: str,
    images: Sequence[str] = (),
    *,
    bits: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    use_detector: bool = True,
    detection_threshold: float | None = None,
    box_file: Path | None = None,
    picture_folder: Path | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> None:
    """Load a model and answer the questions of the standard input; the arguments are the options of the command."""
    # Loading takes minutes: what can be wrong without the model is found before.
    _check_generation_options(max_new_tokens, temperature, top_p, seed, detection_threshold)
    quantization = None if bits is None else quantization_config(bits)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if config.model_type != MGLlavaConfig.model_type:
        raise ChatError(f"`model` must be an MG-LLaVA repository, got {model}, a model of type {config.model_type!r}.")
    pictures = [(source, read_picture(source)) for source in images]
    known_boxes = None if box_file is None else read_boxes(box_file)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    if not use_detector:
        processor.box_detector = None
    loaded = AutoModelForImageTextToText.from_pretrained(
        model,
        dtype=dtype,
        device_map=int(device) if device.isdecimal() else device,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        trust_remote_code=trust_remote_code,
    )
    session = ChatSession(
        loaded,
        processor,
        system=system,
        generation_config=generation_config(loaded, max_new_tokens, temperature, top_p),
        detection_threshold=detection_threshold,
    )
    if seed is not None:
        set_seed(seed)
    ChatTerminal(session, picture_folder, known_boxes).run(pictures)


def _check_generation_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None = None,
    detection_threshold: float | None = None,
) -> None:
    """Refuse values that generation would refuse at the first question, ignore, or stumble over."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ChatError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature is not None and not (temperature == 0 or _LEAST_TEMPERATURE <= temperature <= _MOST_TEMPERATURE):
        raise ChatError(
            f"`temperature` must be 0 or between {_LEAST_TEMPERATURE:g} and {_MOST_TEMPERATURE:g}, got {temperature}."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ChatError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    if temperature == 0 and top_p is not None:
        raise ChatError(
            "`top_p` has no effect with a `temperature` of 0, which does not sample. Leave out one of them."
        )
    if seed is not None and not 0 <= seed < 2**32:
        raise ChatError(f"`seed` must be a whole number from 0 to {2**32 - 1}, got {seed}.")
    if detection_threshold is not None and not math.isfinite(detection_threshold):
        raise ChatError(f"`detection_threshold` must be a number, got {detection_threshold}.")


def generation_config(
    model: Any, max_new_tokens: int | None = None, temperature: float | None = None, top_p: float | None = None
) -> GenerationConfig:
    """Change a model's own generation config by the options that are given.

    Args:
        model ([`MGLlavaForConditionalGeneration`]): The model; `generate` completes a configuration from its own.
        max_new_tokens (`int`, *optional*): Longest answer.
        temperature (`float`, *optional*): 0: do not sample. More: sample.
        top_p (`float`, *optional*): Sample among the best tokens with this total probability.

    Returns:
        `GenerationConfig`: The model's configuration.
    """
    config: GenerationConfig = model.generation_config
    # The length of an answer is limited, not that of the conversation.
    config.max_length = None
    if max_new_tokens is not None:
        config.max_new_tokens = max_new_tokens
    if temperature or top_p is not None:
        config.do_sample = True
        config.temperature = config.temperature if temperature is None else temperature
        config.top_p = config.top_p if top_p is None else top_p
    elif temperature == 0:
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return config


__all__ = ["chat", "generation_config"]
