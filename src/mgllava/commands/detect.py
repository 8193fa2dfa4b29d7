"""The command `mgllava detect`."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from mgllava.box_files import BoxFileError, detect_images, open_detector

from .console import errors_as_messages, image_bar, say
from .options import SAVE_BOXES_HELP, THRESHOLD_HELP, TrustRemoteCode


class DetectionMode(str, Enum):
    """Which boxes a box detector returns."""

    FAITHFUL = "faithful"
    CLEAN = "clean"


@errors_as_messages(ImportError)
def detect(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES_OR_DATASET",
            help="A folder of images and videos, such files, questions (.jsonl), LLaVA samples (.json), or a dataset: "
            "the folder of save_to_disk, or Parquet with images.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Box file to write: .parquet, or .json as the original reads it.")],
    processor: Annotated[
        str | None, typer.Option(help="MG-LLaVA model with a box detector: folder or Hub id.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Zero-shot object detector: folder or Hub id.", show_default="OWLv2-L")
    ] = None,
    tagger: Annotated[
        str | None, typer.Option(help="Image tagger: folder or Hub id; coco80 for the labels of COCO.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Labels, instead of a tagger: cup,spoon or a file with a label per line."),
    ] = None,
    mode: Annotated[
        DetectionMode | None,
        typer.Option(help="faithful: boxes as the published weights expect. clean: clipped to the image."),
    ] = None,
    threshold: Annotated[float, typer.Option(help=THRESHOLD_HELP)] = 0.2,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that the paths in a JSON list start from.", show_default="its own")
    ] = None,
    video_folder: Annotated[
        Path | None,
        typer.Option(help="Folder that the paths of videos in a JSON list start from.", show_default="--image-folder"),
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Frames that are sampled from each video.")] = 8,
    show: Annotated[Path | None, typer.Option("--save-boxes", help=SAVE_BOXES_HELP)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted job; start if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over and replace the output.")] = False,
    array_task: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/N", help="Run as array task I of N (from 0) of a cluster's job array."),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images in a slice: processes take one slice after another.")] = 512,
    workers: Annotated[int, typer.Option(help="Threads that read images.")] = 4,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the boxes of images and of frames of videos, and write them to a box file.

    --resume continues an interrupted job.

    Several GPUs: accelerate launch -m mgllava detect …
    """
    # The progress bars of loading tagger and object detector would interrupt the one of the images.
    logging.disable_progress_bar()
    with image_bar() as progress:
        summary = detect_images(
            list(inputs) if len(inputs) > 1 else inputs[0],
            output,
            open_detector(processor, detector, tagger, mode and mode.value, trust_remote_code),
            labels=parse_labels(labels),
            threshold=threshold,
            batch_size=batch_size,
            image_folder=image_folder,
            video_folder=video_folder,
            num_frames=num_frames,
            resume=resume,
            overwrite=overwrite,
            array_task=parse_array_task(array_task),
            shard_size=shard_size,
            show=show,
            workers=workers,
            progress=progress,
        )
    if summary is not None:
        say(str(summary))


def parse_labels(text: str | None) -> list[str] | None:
    """Read labels: `cup,spoon`, or the name of a file with a label per line."""
    if text is None:
        return None
    is_file = Path(text).is_file()
    pieces = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    labels = [piece.strip() for piece in pieces if piece.strip()]
    if not labels:
        raise BoxFileError(f"`labels` must have at least one label, got {text!r}.")
    return labels


def parse_array_task(text: str | None) -> tuple[int, int]:
    """Read `I/N`; `None` is the only task of one."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise BoxFileError(f"`array_task` must be I/N with 0 <= I < N, such as 0/16, got {text!r}.")
    return int(match[1]), int(match[2])


__all__ = ["DetectionMode", "detect", "parse_array_task", "parse_labels"]
