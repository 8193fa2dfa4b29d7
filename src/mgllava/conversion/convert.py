"""Convert checkpoints to model folders, and model folders to checkpoints of the original layout."""

from pathlib import Path

import torch

from mgllava.families import FAMILIES
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.shard_writer import Progress
from mgllava.model_files.staging import read_model_type

from .detect import prompt_templates, source_formats
from .lora import check_lora_alpha
from .pipeline import DEFAULT_SHARD_SIZE, run_conversion
from .ram_plus import RAM_PLUS


def convert_checkpoint(
    checkpoint: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    high_res_tower: str | Path | None = None,
    prompt_template: str | None = None,
    output: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    trust_pickle: bool = False,
    lora_alpha: float | None = None,
    max_positions: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint into a model folder that `from_pretrained` loads.

    The source format is detected. The error names arguments that the format needs or does not take.

    Weights are streamed: one tensor is in memory at a time. The output gets its name when it is complete; an
    interrupted run leaves `OUTPUT.incomplete`, which the same call resumes.

    Args:
        checkpoint (`str` or `Path`): Of MG-LLaVA an mmengine `.pth` file or a DeepSpeed ZeRO folder, fine-tuned, from
            the pretrain stage, or LoRA. Of SliME a release, a LoRA release, or `mm_projector.bin` and `sampler.bin`,
            one of them or the folder. Or a Hub id: `owner/name`, or `owner/name/path` if the repository has several.
            A tower that the checkpoint holds is used instead of `vision_tower` or `high_res_tower`.
        llm (`str` or `Path`, *optional*): Folder or Hub id of the language model: tokenizer, config and, for
            pretrain-stage and LoRA checkpoints, the weights. [`PRESETS`] has this and the next three arguments for
            each size of the paper.
        vision_tower (`str` or `Path`, *optional*): Folder or Hub id of the CLIP model. Checkpoints of SliME name one.
        high_res_tower (`str` or `Path`, *optional*): Folder, Hub id or open_clip name of the ConvNeXt CLIP.
        prompt_template (`str`, *optional*): `"vicuna"`, `"llama3"`, `"phi3"` or `"yi"`; of SliME `"v1"`, `"llama3"` or
            `"plain"`, by default that of the tokenizer.
        output (`str` or `Path`): Folder to write. Required.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of all weights. `"auto"`: tensors of
            the checkpoint keep theirs, all others get the language model's.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Size of the largest weight file.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read checkpoints that hold pickled objects next to
            the weights. The objects are skipped; their code is not run.
        lora_alpha (`float`, *optional*): `lora_alpha` of a LoRA checkpoint whose config text does not say it.
        max_positions (`int`, *optional*): Longest prompt with its answer, in tokens: `max_position_embeddings` of the
            language model. For checkpoints that were trained on longer prompts than their `llm`, such as videos. By
            default that of `llm`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model folder of the same family at `output`.
            Files there that no conversion writes stay, and so does the processor's box detector.
        progress (`Callable[[str, int, int], None]`, *optional*): Called with the stage, bytes just done and bytes
            in total.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If anything is missing, damaged, left over, of the wrong shape, or in the way.
        ValueError: If the language model's tokenizer cannot hold the placeholder.
    """
    arguments = locals()
    if output is None:
        raise ConversionError("`output` must be the folder to write, got None.")
    known = prompt_templates()
    if prompt_template is not None and prompt_template not in known:
        raise ConversionError(f"`prompt_template` must be one of {known}, got {prompt_template!r}.")
    check_lora_alpha(lora_alpha)
    return run_conversion(source_formats(), **arguments)


def convert_ram_plus(
    checkpoint: str | Path,
    tag_list: str | Path,
    thresholds: str | Path,
    output: str | Path,
    *,
    swin_config: str | Path | None = None,
    decoder_config: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    trust_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert an original checkpoint of RAM++ into a model folder that `from_pretrained` loads.

    Weights are streamed: one tensor is in memory at a time, and an optimizer's state in the file is not read. The
    output gets its name when it is complete; an interrupted run leaves `OUTPUT.incomplete`, which the same call
    resumes.

    Args:
        checkpoint (`str` or `Path`): The `.pth` file with the state dict, which may be under the key `model`; or a
            Hub id: `owner/name`, or `owner/name/path` if the repository has several.
        tag_list (`str` or `Path`): UTF-8 text with one tag per line, in the order of their indices, or its URL. That
            of the released model is `ram/data/ram_tag_list.txt` of github.com/xinyu1205/recognize-anything.
        thresholds (`str` or `Path`): Text whose lines have the thresholds of the tags in the same lines of `tag_list`,
            or its URL (`ram/data/ram_tag_list_threshold.txt`). Tags after its last line get 0.68.
        output (`str` or `Path`): Folder to write.
        swin_config (`str` or `Path`, *optional*): The original's JSON file with the sizes of the backbone. By default
            those of the released model, Swin-L at 384 pixels.
        decoder_config (`str` or `Path`, *optional*): The original's JSON file with the sizes of the tag decoder. By
            default those of the released model.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of all weights; `"auto"` keeps the
            checkpoint's.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Size of the largest weight file.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read a checkpoint that holds pickled objects next to
            the weights. The objects are skipped; their code is not run.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a RAM++ model folder at `output`. Files there
            that no conversion writes stay.
        progress (`Callable[[str, int, int], None]`, *optional*): Called with the stage, bytes just done and bytes
            in total.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If anything is missing, damaged, left over, of the wrong shape, or in the way.
    """
    return run_conversion([RAM_PLUS], **locals())


def export_original(model: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Convert a model folder to a checkpoint that the original code loads.

    Args:
        model (`str` or `Path`): A model folder.
        output (`str` or `Path`): The file to write; of SliME the folder.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint at `output`.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If `model` is not a model folder of a family that has such a checkpoint, or the file cannot be
            written.
    """
    writers = {one.model_type: one.export for one in source_formats() if one.export is not None}
    model_type = read_model_type(Path(model))
    if model_type not in writers:
        expected = " or ".join(FAMILIES[name].title for name in writers)
        found = f"has model type {model_type!r}" if model_type else "has no config.json with a model type"
        raise ConversionError(f"`checkpoint` must be the folder of an {expected} model, but {model} {found}.")
    return writers[model_type](model, output, overwrite=overwrite)


__all__ = ["convert_checkpoint", "convert_ram_plus", "export_original"]
