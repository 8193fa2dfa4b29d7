"""The commands `mgllava convert` and `mgllava convert-ram-plus`."""

from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from mgllava import conversion
from mgllava.conversion import convert_checkpoint, export_original
from mgllava.conversion.detect import presets, prompt_templates
from mgllava.conversion.pipeline import DEFAULT_SHARD_SIZE
from mgllava.conversion.ram_plus import TAG_LIST_URL, THRESHOLDS_URL
from mgllava.families import FAMILIES
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.staging import read_model_type

from .console import errors_as_messages, progress_bars, say
from .options import Dtype, MaxShardSize, Output, Overwrite, TrustPickle


def _one_of(names: Callable[[], Iterable[str]]) -> Callable[[str | None], str | None]:
    """Refuse values that are not in a list; it is evaluated late, because families may be added after the import."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names():
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, names()))}.")
        return value

    return check


@errors_as_messages()
def convert(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Original checkpoint: a .pth or .bin file, a folder, or a Hub id (owner/name, or "
            "owner/name/path if it has several). With --to-original: a model folder."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write. With --to-original: a .pth file; of SliME a folder.")],
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(presets()),
            callback=_one_of(presets),
            help="Size of the paper's models: sets the options of its parts and its prompt template, unless given.",
        ),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="Language model: folder or Hub id.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Vision tower (CLIP): folder or Hub id.")] = None,
    high_res_tower: Annotated[
        str | None,
        typer.Option(
            help="High-resolution vision tower (ConvNeXt of open_clip): folder, Hub id, or open_clip's "
            "architecture:tag."
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(prompt_templates()),
            callback=_one_of(prompt_templates),
            help="Chat template of the language model.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickle = False,
    lora_alpha: Annotated[
        float | None, typer.Option(help="lora_alpha of a LoRA checkpoint whose config text does not have it.")
    ] = None,
    max_positions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest prompt with its answer, in tokens, if the checkpoint was trained on longer ones than its "
            "language model, such as videos.",
            show_default="that of the language model",
        ),
    ] = None,
    overwrite: Overwrite = False,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="Convert a model folder to the original layout (.pth).")
    ] = False,
) -> None:
    """Convert an original checkpoint into a model folder for `from_pretrained`, or a model folder to a checkpoint."""
    options = locals()
    if to_original:
        defaults = {name: parameter.default for name, parameter in signature(convert).parameters.items()}
        accepted = ("checkpoint", "output", "overwrite", "to_original")
        superfluous = [
            f"`{name}`" for name, value in options.items() if name not in accepted and value != defaults[name]
        ]
        if superfluous:
            raise ConversionError(
                f"`to_original` takes `checkpoint` and `output` only (and `overwrite`), got {', '.join(superfluous)}."
            )
        say(f"Wrote {export_original(checkpoint, output, overwrite=overwrite)}")
        return
    del options["preset"], options["to_original"]
    if preset is not None:
        options |= {name: value for name, value in presets()[preset].items() if options[name] is None}
    with progress_bars() as progress:
        _say_how_to_load(convert_checkpoint(**options, progress=progress))


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
        typer.Option(help="Text file with the threshold of one tag per line, or its URL.", show_default=False),
    ] = None,
    swin_config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the sizes of the backbone.", show_default="Swin-L at 384 pixels"),
    ] = None,
    decoder_config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the sizes of the decoder.", show_default="the released model's"),
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = DEFAULT_SHARD_SIZE,
    trust_pickle: TrustPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of RAM++, the image tagger, into a model folder for `from_pretrained`."""
    options = locals()
    if tag_list is None or thresholds is None:
        raise ConversionError(
            "A conversion needs `tag_list` and `thresholds`: files of the original git repository, or their URLs. "
            f"Those of the released model: --tag-list {TAG_LIST_URL} --thresholds {THRESHOLDS_URL}"
        )
    with progress_bars() as progress:
        _say_how_to_load(conversion.convert_ram_plus(**options, progress=progress))


def _say_how_to_load(folder: Path) -> None:
    """Print the lines that load a model folder."""
    if FAMILIES[read_model_type(folder) or ""].processor:
        classes = {"processor": "AutoProcessor", "model": "AutoModelForImageTextToText"}
    else:
        classes = {"image_processor": "AutoImageProcessor", "model": "AutoModel"}
    lines = ["import mgllava", f"from transformers import {', '.join(sorted(classes.values()))}"]
    lines += [f'{variable} = {name}.from_pretrained("{folder}")' for variable, name in classes.items()]
    say("\n  ".join([f"Wrote {folder}\nLoad it:", *lines]))


__all__ = ["convert", "convert_ram_plus"]
