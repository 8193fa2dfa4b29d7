"""The repository that stage 1 starts from: trained parts, random fusion and projectors."""

from pathlib import Path
from typing import Any

from mgllava.model_files.processors import make_processor
from mgllava.model_files.sources import clip_config, language_model_config
from mgllava.model_files.staging import StagingFolder
from mgllava.model_files.vocabulary import IMAGE_TOKEN, generation_config, load_tokenizer
from mgllava.modeling import MGLlavaForConditionalGeneration
from mgllava.processing import CHAT_TEMPLATES

from .errors import TrainingError


def write_starting_model(
    output: str | Path,
    llm: str | Path,
    vision_tower: str | Path,
    high_res_tower: str | Path,
    prompt_template: str,
    *,
    dtype: Any = "auto",
    **config: Any,
) -> Path:
    """Put a model together from parts and save it with its processor.

    Args:
        output (`str` or `Path`): Folder to write. It appears when it is complete.
        llm (`str` or `Path`): Folder or Hub id of the language model.
        vision_tower (`str` or `Path`): Folder or Hub id of the CLIP model.
        high_res_tower (`str` or `Path`): Folder or Hub id of the open_clip ConvNeXt.
        prompt_template (`str`): `"vicuna"`, `"llama3"`, `"phi3"` or `"yi"`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Of all weights.
        **config: Arguments of [`MGLlavaConfig`], and `high_res_image_size`.

    Returns:
        `Path`: The output.

    Raises:
        TrainingError: If the template is unknown, or there is something at `output`.
        ConversionError: If a part cannot be found, another run writes the output, or a folder that is not of an
            interrupted run is in the way.
        ValueError: If a part is of another kind.
        OSError: If a part cannot be read, or the output not be written.
    """
    output = Path(output)
    if prompt_template not in CHAT_TEMPLATES:
        raise TrainingError(f"`prompt_template` must be one of {sorted(CHAT_TEMPLATES)}, got {prompt_template!r}.")
    if output.exists():
        raise TrainingError(f"`output`: {output} exists.")
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
    processor = make_processor(model.config, tokenizer, image_settings, prompt_template)
    with StagingFolder(output, False, model.config.model_type) as staging:
        staging.keep_finished({}, [])
        model.save_pretrained(staging.path)
        processor.save_pretrained(staging.path)
        return staging.publish()


__all__ = ["write_starting_model"]
