"""The commands `mgllava convert` and `mgllava convert-ram-plus`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import errors_as_messages, printable, progress_bars


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


# The converters' own default, which is not imported here, as that is slow.
DEFAULT_SHARD_SIZE = "5GB"

# Options that both converters have.
DtypeOption = Annotated[str, typer.Option(help="auto (as in the checkpoint), float32, float16 or bfloat16.")]
ShardSizeOption = Annotated[str, typer.Option(help="Size of the largest weight file.")]
TrustPickleOption = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read a checkpoint that holds pickled objects next to the weights. The objects are skipped; no code of "
        "theirs is run even then.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what an earlier conversion wrote; other files there stay."),
]


def convert(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="XTuner checkpoint: a .pth file, a DeepSpeed folder, or a Hub id (owner/name, or owner/name/path if "
            "it has several). With --to-xtuner: a repository."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write. With --to-xtuner: the .pth file to write.")],
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
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickleOption = False,
    lora_alpha: Annotated[
        float | None, typer.Option(help="lora_alpha of a LoRA checkpoint whose config text does not say it.")
    ] = None,
    overwrite: OverwriteOption = False,
    to_xtuner: Annotated[
        bool, typer.Option("--to-xtuner", help="The way back: from a repository to an XTuner .pth file.")
    ] = False,
) -> None:
    """Convert an XTuner checkpoint into a repository for `from_pretrained`, or back."""
    given = {
        "llm": llm,
        "vision_tower": vision_tower,
        "high_res_tower": high_res_tower,
        "prompt_template": None if prompt_template is None else prompt_template.value,
    }
    parts = {name: value for name, value in given.items() if value is not None}
    with errors_as_messages():
        from mgllava.conversion import PRESETS, ConversionError, convert_checkpoint, export_xtuner

        if to_xtuner:
            others = {
                "preset": preset is not None,
                **dict.fromkeys(parts, True),
                "dtype": dtype != "auto",
                "max_shard_size": max_shard_size != DEFAULT_SHARD_SIZE,
                "trust_pickle": trust_pickle,
                "lora_alpha": lora_alpha is not None,
            }
            superfluous = [_option(name) for name, is_given in others.items() if is_given]
            if superfluous:
                raise ConversionError(
                    "--to-xtuner takes --checkpoint and --output only (and --overwrite), got "
                    f"{', '.join(superfluous)}."
                )
            written = export_xtuner(checkpoint, output, overwrite=overwrite)
            Console().print(printable(f"Wrote {written}"), soft_wrap=True, markup=False)
            return
        parts = {**(PRESETS[preset.value] if preset is not None else {}), **parts}
        absent = [_option(name) for name in given if name not in parts]
        if absent:
            raise ConversionError(f"A conversion needs {', '.join(absent)}, or --preset for a published model.")
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


def _option(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def convert_ram_plus(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Original checkpoint: ram_plus_swin_large_14m.pth, or a Hub id: "
            "xinyu1205/recognize-anything-plus-model."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tag_list: Annotated[
        str | None, typer.Option(help="Text file with one tag per line, or its URL.", show_default=False)
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Text file with one number per line, those of the tags, or its URL.", show_default=False),
    ] = None,
    swin_config: Annotated[
        Path | None, typer.Option(help="JSON file with the sizes of the backbone. By default Swin-L at 384 pixels.")
    ] = None,
    decoder_config: Annotated[
        Path | None, typer.Option(help="JSON file with the sizes of the decoder. By default the released ones.")
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickleOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a RAM++ checkpoint, the image tagger, into a repository for `from_pretrained`."""
    with errors_as_messages():
        from mgllava import conversion
        from mgllava.conversion.convert_ram_plus import TAG_LIST_URL, THRESHOLDS_URL

        if tag_list is None or thresholds is None:
            raise conversion.ConversionError(
                "A conversion needs --tag-list and --thresholds: files of the original's repository, or their URLs. "
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


def _say_how_to_load(repository: Path, **auto_classes: str) -> None:
    """Print the lines that load what was written; `auto_classes` by the names of the variables."""
    lines = ["import mgllava", f"from transformers import {', '.join(sorted(auto_classes.values()))}"]
    lines += [f'{variable} = {name}.from_pretrained("{repository}")' for variable, name in auto_classes.items()]
    text = "\n  ".join([f"Wrote {repository}\nLoad it:", *lines])
    Console().print(printable(text), soft_wrap=True, markup=False)


__all__ = ["Preset", "PromptTemplate", "convert", "convert_ram_plus"]
