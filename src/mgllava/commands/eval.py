"""The command `mgllava eval`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import errors_as_messages, question_bar, say
from .options import AttnImplementation, Bits, Device, Dtype, Model, Revision, TrustRemoteCode


class OnError(str, Enum):
    """What to do with rows that cannot be asked."""

    STOP = "stop"
    SKIP = "skip"


class Boxes(str, Enum):
    """Where boxes come from."""

    NONE = "none"
    FILE = "file"
    DETECTOR = "detector"
    ORACLE = "oracle"


@errors_as_messages(ValueError, ImportError)
def evaluate(
    model: Model,
    benchmark: Annotated[
        str,
        typer.Option(
            help="mmbench-dev, mmbench-test, mmbench-dev-cn, mmbench-test-cn, seed, scienceqa, ai2d, mmstar, mmmu, "
            "textvqa, docvqa, pope, hallusionbench, mme, gqa, vqav2, llava-wild, mmvet, mathvista, mmvp, msvd-qa, "
            "msrvtt-qa; for own files multiple-choice, exact-match or video-qa."
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Its file (.tsv, .csv, .json, .jsonl, .parquet) or folder; can be given several times, such as for "
            "the three files of POPE."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for answers, scores and the report.")],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder that paths of images and videos start from.", show_default="that of --data"),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="File with the answers of TextVQA, VQAv2, GQA, MSVD-QA or MSRVTT-QA.")
    ] = None,
    boxes: Annotated[
        Boxes | None,
        typer.Option(
            help="Source of the boxes. oracle: true boxes, in the column `boxes` or in --box-file; all of them get "
            "tokens.",
            show_default="file with --box-file, else detector if the model has one",
        ),
    ] = None,
    box_file: Annotated[Path | None, typer.Option(help="Box file of `mgllava detect`.")] = None,
    box_key: Annotated[
        str | None, typer.Option(help="Column with the ids of --box-file.", show_default="the questions' ids")
    ] = None,
    drop_boxes: Annotated[float, typer.Option(metavar="P", help="Drop each box with this probability.")] = 0.0,
    shift_boxes: Annotated[
        float, typer.Option(metavar="PX", help="Move each box by so many pixels, in a random direction.")
    ] = 0.0,
    shuffle_boxes: Annotated[
        bool, typer.Option("--shuffle-boxes", help="Give each image the boxes of another one.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed for the changes of boxes.")] = 0,
    on_error: Annotated[
        OnError,
        typer.Option(help="Rows that cannot be asked (no image or video, no options, no boxes): stop or skip them."),
    ] = OnError.STOP,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer, in tokens; the original has 50 for its 13B model.")
    ] = 100,
    limit: Annotated[int | None, typer.Option(help="Number of rows to read.", show_default="all")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted evaluation; start if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over and replace the output.")] = False,
    workers: Annotated[int, typer.Option(help="Threads that read images and videos.")] = 4,
    num_frames: Annotated[
        int | None,
        typer.Option(help="Frames that are sampled from each video.", show_default="8, as in the original"),
    ] = None,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a model the questions of a benchmark, as the original does, and score the answers.

    For example: mgllava eval MODEL --benchmark mmbench-dev --data MMBench_DEV_EN.tsv --output mmbench

    Several GPUs: accelerate launch -m mgllava eval …
    """
    options = {**locals(), "on_error": on_error.value, "boxes": boxes and boxes.value}
    from mgllava.evaluation import evaluate as run

    with question_bar() as progress:
        result = run(**options, progress=progress)
    if result is not None:
        say(str(result))


__all__ = ["evaluate"]
