"""The command line: `mgllava …`. Every command imports what it needs itself."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class PromptTemplate(str, Enum):
    """Chat templates, one for each family of language models."""

    VICUNA = "vicuna"
    LLAMA3 = "llama3"
    PHI3 = "phi3"
    YI = "yi"


class DetectionMode(str, Enum):
    """What boxes a detector gives."""

    FAITHFUL = "faithful"
    CLEAN = "clean"


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


@app.callback()
def _mgllava() -> None:
    """MG-LLaVA for transformers."""


@app.command()
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
    with _errors_as_messages():
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
        with _progress_bars() as progress:
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


@app.command()
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
    with _errors_as_messages():
        from mgllava import conversion

        with _progress_bars() as progress:
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


@app.command()
def detect(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES_OR_DATASET",
            help="A folder of images, image files, questions (.jsonl), LLaVA samples (.json), or a dataset: the "
            "folder of save_to_disk, or Parquet with images.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Box file to write: .parquet, or .json as the original reads it.")],
    processor: Annotated[
        str | None, typer.Option(help="MG-LLaVA repository with a box detector: folder or Hub id.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Zero-shot detector: folder or Hub id.", show_default="OWLv2-L")
    ] = None,
    tagger: Annotated[
        str | None, typer.Option(help="Image tagger: folder or Hub id; coco80 for the labels of COCO.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="What to look for, without a tagger: cup,spoon or a file with a label per line.")
    ] = None,
    mode: Annotated[
        DetectionMode | None,
        typer.Option(help="faithful: boxes as the published weights expect. clean: clipped to the image."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Scores must be greater.")] = 0.2,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    image_folder: Annotated[
        Path | None, typer.Option(help="Where the paths of a JSON list start.", show_default="its folder")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Folder to draw the images with their boxes in.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted job; start if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again and replace the output.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts (from 0), for arrays of cluster jobs.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images per shard; processes share out shards.")] = 512,
    workers: Annotated[int, typer.Option(help="Threads that read images.")] = 4,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of repositories that bring their own.")
    ] = False,
) -> None:
    """Find the boxes of images and write them to a box file.

    A job that was interrupted goes on with --resume. Several GPUs: accelerate launch -m mgllava.cli detect …
    """
    from mgllava.box_files import BoxFileError, detect_images, open_detector
    from mgllava.box_files.arguments import parse_array_task, parse_labels

    with _errors_as_messages(BoxFileError, ImportError), _image_bar() as progress:
        summary = detect_images(
            list(inputs) if len(inputs) > 1 else inputs[0],
            output,
            open_detector(processor, detector, tagger, mode and mode.value, trust_remote_code),
            labels=parse_labels(labels),
            threshold=threshold,
            batch_size=batch_size,
            image_folder=image_folder,
            resume=resume,
            overwrite=overwrite,
            array_task=parse_array_task(shard),
            shard_size=shard_size,
            show=show,
            workers=workers,
            progress=progress,
        )
    if summary is not None:
        Console().print(str(summary), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _errors_as_messages(*kinds: type[Exception]) -> Iterator[None]:
    """Print what went wrong in one message, and exit with 1."""
    from mgllava.conversion import ConversionError

    expected: tuple[type[Exception], ...] = (ConversionError, OSError, *kinds)
    try:
        yield
    except expected as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield progress


@contextmanager
def _image_bar() -> Iterator[Callable[[int, int], None]]:
    """Show one bar, that of the main process, which has as much to do as any other."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=os.environ.get("RANK", "0") != "0") as bars:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        task = bars.add_task("images" if processes == 1 else f"images (process 1 of {processes})", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, advance=done, total=total)

        yield progress


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
