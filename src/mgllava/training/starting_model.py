"""Write the model folder that stage 1 starts from: pretrained parts, connected by new modules."""

from pathlib import Path
from typing import Any

from mgllava.families import FAMILIES, resolve
from mgllava.model_files.staging import StagingFolder

from .errors import TrainingError
from .recipe import DEFAULT_FAMILY


def write_starting_model(
    output: str | Path,
    *,
    prompt_template: str,
    family: str = DEFAULT_FAMILY,
    dtype: Any = "auto",
    **parts: Any,
) -> Path:
    """Build a model from parts and save it with its processor.

    Args:
        output (`str` or `Path`): Folder to write, which must not exist. It appears when it is complete.
        prompt_template (`str`): Name of a chat template of the family; for MG-LLaVA `"vicuna"`, `"llama3"`, `"phi3"`
            or `"yi"`.
        family (`str`, *optional*, defaults to `"mgllava"`): Model type of the family.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Data type of all weights; `"auto"`: that of
            the language model.
        **parts: All parts of the family, each a folder or Hub id, and arguments of its configuration. The parts of
            MG-LLaVA are `llm`, `vision_tower` (CLIP) and `high_res_tower` (an open_clip ConvNeXt); it also takes
            `high_res_image_size`.

    Returns:
        `Path`: The output.

    Raises:
        TrainingError: If the family or the template is unknown, a part is not given, or `output` exists.
        ConversionError: If a part cannot be found, another run writes the output, or the temporary folder
            (`output` with `.incomplete`) exists and is not that of an interrupted run.
        TypeError: If the family does not know an argument.
        ValueError: If a part is of another kind.
        OSError: If a part cannot be read, or the output cannot be written.
    """
    output = Path(output)
    buildable = {name: known for name, known in FAMILIES.items() if known.build}
    if family not in buildable:
        raise TrainingError(f"`family` must be one of {sorted(buildable)}, got {family!r}.")
    described = buildable[family]
    templates = resolve(str(described.chat_templates))
    if prompt_template not in templates:
        raise TrainingError(f"`prompt_template` must be one of {sorted(templates)}, got {prompt_template!r}.")
    if missing := [f"`{name}`" for name in described.parts if not parts.get(name)]:
        raise TrainingError(f"{', '.join(missing)} must be given: {described.title} is built from them.")
    if output.exists():
        raise TrainingError(f"`output`: {output} exists.")
    model, processor = resolve(str(described.build))(prompt_template=prompt_template, dtype=dtype, **parts)
    with StagingFolder(output, False, model.config.model_type) as staging:
        staging.keep_finished({}, [])
        model.save_pretrained(staging.path)
        processor.save_pretrained(staging.path)
        return staging.publish()


__all__ = ["write_starting_model"]
