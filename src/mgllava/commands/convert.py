"""The commands `mgllava convert` and `mgllava convert-ram-plus`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import errors_as_messages, progress_bars


class PromptTemplate(str, Enum):
    """Chat templates, one for each family of language models."""

    VICUNA = "vicuna"
    LLAMA3 = "llama3"
    PHI3 = "phi3"
    YI = "yi"


# Options that both converters have.
DtypeOption = Annotated[str, typer.Option(help="auto (as in the checkpoint), float32, float16 or bfloat16.")]
ShardSizeOption = Annotated[str, typer.Option(help="Size of the largest weight file.")]
TrustPickleOption = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read a checkpoint that holds pickled objects beside the weights. The objects are skipped; no code of "
        "theirs is run even then.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")]


def convert(
    checkpoint: Annotated[
        str,
        typer.Option(help="XTuner checkpoint: a .pth file or a DeepSpeed folder. With --to-xtuner: a repository."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write. With --to-xtuner: the .pth file to write.")],
    llm: Annotated[str | None, typer.Option(help="Language model: folder or Hub id.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="CLIP: folder or Hub id.")] = None,
    high_res_tower: Annotated[
        str | None, typer.Option(help="open_clip ConvNeXt: folder, Hub id, or open_clip's architecture:tag.")
    ] = None,
    prompt_template: Annotated[
        PromptTemplate | None, typer.Option(help="Chat template of the language model.")
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = "5GB",
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
    towers = {
        "--llm": llm,
        "--vision-tower": vision_tower,
        "--high-res-tower": high_res_tower,
        "--prompt-template": prompt_template,
    }
    with errors_as_messages():
        from mgllava.conversion import ConversionError, convert_checkpoint, export_xtuner

        if to_xtuner:
            superfluous = [name for name, value in towers.items() if value is not None]
            if superfluous:
                raise ConversionError(
                    f"--to-xtuner takes --checkpoint and --output only, got {', '.join(superfluous)}."
                )
            written = export_xtuner(checkpoint, output, overwrite=overwrite)
            Console().print(f"Wrote {written}", soft_wrap=True, markup=False)
            return
        if llm is None or vision_tower is None or high_res_tower is None or prompt_template is None:
            absent = [name for name, value in towers.items() if value is None]
            raise ConversionError(f"A conversion needs {', '.join(absent)}.")
        with progress_bars() as progress:
            written = convert_checkpoint(
                checkpoint,
                llm,
                vision_tower,
                high_res_tower,
                prompt_template.value,
                output,
                dtype=dtype,
                max_shard_size=max_shard_size,
                trust_pickle=trust_pickle,
                lora_alpha=lora_alpha,
                overwrite=overwrite,
                progress=progress,
            )
        _say_how_to_load(written, processor="AutoProcessor", model="AutoModelForImageTextToText")


def convert_ram_plus(
    checkpoint: Annotated[Path, typer.Option(help="Original checkpoint: ram_plus_swin_large_14m.pth.")],
    tag_list: Annotated[Path, typer.Option(help="Text file with one tag per line.")],
    thresholds: Annotated[Path, typer.Option(help="Text file with one number per line, those of the tags.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    swin_config: Annotated[
        Path | None, typer.Option(help="JSON file with the sizes of the backbone. By default Swin-L at 384 pixels.")
    ] = None,
    decoder_config: Annotated[
        Path | None, typer.Option(help="JSON file with the sizes of the decoder. By default the released ones.")
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    trust_pickle: TrustPickleOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a RAM++ checkpoint, the image tagger, into a repository for `from_pretrained`."""
    with errors_as_messages():
        from mgllava import conversion

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
    Console().print(text, soft_wrap=True, markup=False)


__all__ = ["PromptTemplate", "convert", "convert_ram_plus"]
