"""A new MG-LLaVA model from its parts, and its processor."""

from pathlib import Path
from typing import Any

from mgllava.model_files.processors import make_processor
from mgllava.model_files.sources import clip_config, language_model_config
from mgllava.model_files.vocabulary import generation_config, load_tokenizer
from mgllava.modeling import MGLlavaForConditionalGeneration
from mgllava.processing.text_chunks_common import IMAGE_TOKEN


def build_mgllava(
    *,
    llm: str | Path,
    vision_tower: str | Path,
    high_res_tower: str | Path,
    prompt_template: str,
    dtype: Any,
    **config: Any,
) -> tuple[Any, Any]:
    """Build the model, with random fusion and projectors, and its processor; see [`write_starting_model`]."""
    text_config, llm_folder = language_model_config(llm)
    _, image_settings = clip_config(vision_tower)
    tokenizer = load_tokenizer(llm_folder)
    model = MGLlavaForConditionalGeneration.from_pretrained_parts(
        llm,
        vision_tower,
        high_res_tower,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype=dtype,
        **config,
    )
    model.generation_config = generation_config(
        llm_folder, text_config, tokenizer, prompt_template, model.config.unused_token_ids
    )
    return model, make_processor(model.config, tokenizer, image_settings, prompt_template)


__all__ = ["build_mgllava"]
