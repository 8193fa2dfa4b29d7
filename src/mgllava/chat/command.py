"""Implementation of `mgllava chat`: load a model, then answer questions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, set_seed

from mgllava.box_files import read_boxes

from .loading import load
from .session import ChatError, ChatSession, read_picture
from .terminal import ChatTerminal

# Logits are divided by the temperature in float32: below this range they overflow, above it all tokens are equally
# likely.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-6, 1e4
_PICTURE_FOLDER = Path("chat-boxes")


def chat(
    model: str,
    images: Sequence[str] = (),
    *,
    use_box_detector: bool = True,
    detection_threshold: float | None = None,
    num_frames: int | None = None,
    box_file: Path | None = None,
    picture_folder: Path | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Load a model and answer the questions of the standard input; the arguments are the options of the command."""
    # Loading takes minutes, so everything else is checked first.
    if num_frames is not None and num_frames < 1:
        raise ChatError(f"`num_frames` must be at least 1, got {num_frames}.")
    _check_generation_options(max_new_tokens, temperature, top_p, seed, detection_threshold)
    pictures = [(source, read_picture(source)) for source in images]
    known_boxes = None if box_file is None else read_boxes(box_file)
    loaded, processor = load(
        model,
        use_box_detector=use_box_detector,
        detection_threshold=detection_threshold,
        box_file=box_file,
        picture_folder=picture_folder,
        **options,
    )
    session = ChatSession(
        loaded,
        processor,
        system=system,
        generation_config=generation_config(loaded, max_new_tokens, temperature, top_p),
        detection_threshold=detection_threshold,
        num_frames=num_frames,
    )
    if seed is not None:
        set_seed(seed)
    ChatTerminal(session, picture_folder or _PICTURE_FOLDER, known_boxes).run(pictures)


def _check_generation_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None = None,
    detection_threshold: float | None = None,
) -> None:
    """Refuse values that generation would ignore, or would refuse only at the first question."""
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
    """Return a model's own generation config with the options that are given; `generate` completes it.

    A temperature of 0 means greedy; a higher one, or `top_p`, means to sample.
    """
    config: GenerationConfig = model.generation_config
    # `max_new_tokens` limits the answer; `max_length` would limit the whole conversation.
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
