"""The commands `mgllava convert` and `mgllava convert-ram-plus`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mgllava import conversion
from mgllava.conversion import PRESETS, convert_checkpoint, export_original
from mgllava.conversion.pipeline import DEFAULT_SHARD_SIZE
from mgllava.conversion.ram_plus import TAG_LIST_URL, THRESHOLDS_URL
from mgllava.model_files.errors import ConversionError

from .console import errors_as_messages, progress_bars, say
from .options import Dtype, MaxShardSize, Output, Overwrite, TrustPickle


class PromptTemplate(str, Enum):
    """Chat templates, one for each family of language models."""

    VICUNA = "vicuna"
    LLAMA3 = "llama3"
    PHI3 = "phi3"
    YI = "yi"


class Preset(str, Enum):
    """Published models, by their language models."""

    PHI3_MINI = "phi3-mini"
    VICUNA_7B = "vicuna-7b"
    VICUNA_13B = "vicuna-13b"
    LLAMA3_8B = "llama3-8b"
    YI_34B = "yi-34b"


@errors_as_messages()
def convert(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Original checkpoint: a .pth file, a DeepSpeed folder, or a Hub id (owner/name, or "
            "owner/name/path if it has several). With --to-original: a model folder."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write. With --to-original: the .pth file to write.")],
    preset: Annotated[
        Preset | None,
        typer.Option(help="Published model: fills the next four options, as far as they are not given."),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="Language model: folder or Hub id.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="CLIP: folder or Hub id.")] = None,
    high_res_tower: Annotated[
        str | None, typer.Option(help="open_clip ConvNeXt: folder, Hub id, or open_clip's architecture:tag.")
    ] = None,
    prompt_template: Annotated[
        PromptTemplate | None, typer.Option(help="Chat template of the language model.")
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickle = False,
    lora_alpha: Annotated[
        float | None, typer.Option(help="lora_alpha of a LoRA checkpoint whose config text does not say it.")
    ] = None,
    overwrite: Overwrite = False,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="The way back: from a model folder to an original checkpoint (.pth).")
    ] = False,
) -> None:
    """Convert an original (XTuner) checkpoint into a model folder for `from_pretrained`, or back."""
    given = {
        "llm": llm,
        "vision_tower": vision_tower,
        "high_res_tower": high_res_tower,
        "prompt_template": None if prompt_template is None else prompt_template.value,
    }
    parts = {name: value for name, value in given.items() if value is not None}
    if to_original:
        others = {
            "preset": preset is not None,
            **dict.fromkeys(parts, True),
            "dtype": dtype != "auto",
            "max_shard_size": max_shard_size != DEFAULT_SHARD_SIZE,
            "trust_pickle": trust_pickle,
            "lora_alpha": lora_alpha is not None,
        }
        superfluous = [f"`{name}`" for name, is_given in others.items() if is_given]
        if superfluous:
            raise ConversionError(
                f"`to_original` takes `checkpoint` and `output` only (and `overwrite`), got {', '.join(superfluous)}."
            )
        say(f"Wrote {export_original(checkpoint, output, overwrite=overwrite)}")
        return
    parts = {**(PRESETS[preset.value] if preset is not None else {}), **parts}
    with progress_bars() as progress:
        written = convert_checkpoint(
            checkpoint,
            **parts,
            output=output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_pickle=trust_pickle,
            lora_alpha=lora_alpha,
            overwrite=overwrite,
            progress=progress,
        )
    _say_how_to_load(written, processor="AutoProcessor", model="AutoModelForImageTextToText")


@errors_as_messages()
def convert_ram_plus(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Original checkpoint: ram_plus_swin_large_14m.pth, or a Hub id: "
            "xinyu1205/recognize-anything-plus-model."
        ),
    ],
    output: Output,
    tag_list: Annotated[
        str | None, typer.Option(help="Text file with one tag per line, or its URL.", show_default=False)
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Text file with one number per line, those of the tags, or its URL.", show_default=False),
    ] = None,
    swin_config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the sizes of the backbone.", show_default="Swin-L at 384 pixels"),
    ] = None,
    decoder_config: Annotated[
        Path | None, typer.Option(help="JSON file with the sizes of the decoder.", show_default="the released ones")
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of RAM++, the image tagger, into a model folder for `from_pretrained`."""
    if tag_list is None or thresholds is None:
        raise ConversionError(
            "A conversion needs `tag_list` and `thresholds`: files of the original git repository, or their URLs. "
            f"Those of the released model: --tag-list {TAG_LIST_URL} --thresholds {THRESHOLDS_URL}"
        )
    with progress_bars() as progress:
        written = conversion.convert_ram_plus(
            checkpoint,
            tag_list,
            thresholds,
            output,
            swin_config=swin_config,
            decoder_config=decoder_config,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_pickle=trust_pickle,
            overwrite=overwrite,
            progress=progress,
        )
    _say_how_to_load(written, image_processor="AutoImageProcessor", model="AutoModel")


def _say_how_to_load(folder: Path, **auto_classes: str) -> None:
    """Print the lines that load what was written; `auto_classes` by the names of the variables."""
    lines = ["import mgllava", f"from transformers import {', '.join(sorted(auto_classes.values()))}"]
    lines += [f'{variable} = {name}.from_pretrained("{folder}")' for variable, name in auto_classes.items()]
    say("\n  ".join([f"Wrote {folder}\nLoad it:", *lines]))


__all__ = ["Preset", "PromptTemplate", "convert", "convert_ram_plus"]
