"""The command `mgllava detect`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import errors_as_messages, image_bar


class DetectionMode(str, Enum):
    """What boxes a detector gives."""

    FAITHFUL = "faithful"
    CLEAN = "clean"


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

    with errors_as_messages(BoxFileError, ImportError), image_bar() as progress:
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


__all__ = ["DetectionMode", "detect"]
