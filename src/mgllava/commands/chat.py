"""The command `mgllava chat`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import errors_as_messages
from .options import (
    SAVE_BOXES_HELP,
    THRESHOLD_HELP,
    AttnImplementation,
    Bits,
    Device,
    Dtype,
    Model,
    Revision,
    TrustRemoteCode,
    UseBoxDetector,
)


@errors_as_messages(ValueError, ImportError)
def chat(
    model: Model,
    images: Annotated[
        list[str] | None, typer.Option("--image", help="Path or URL of an image; can be given several times.")
    ] = None,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
    use_box_detector: UseBoxDetector = True,
    detection_threshold: Annotated[
        float | None, typer.Option("--threshold", help=THRESHOLD_HELP, show_default="the detector's")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames that are sampled from each video.", show_default="the model's")
    ] = None,
    box_file: Annotated[
        Path | None,
        typer.Option("--boxes", help="Box file of `mgllava detect`; the box detector is used for other images only."),
    ] = None,
    picture_folder: Annotated[
        Path | None, typer.Option("--save-boxes", help=SAVE_BOXES_HELP, show_default="chat-boxes")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of an answer, in tokens.", show_default="the model's, or 512")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: always take the most probable token; above: sample.", show_default="the model's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable tokens whose probabilities add up to this.",
            show_default="the model's",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.", show_default="random")] = None,
) -> None:
    """Talk with a model about images and videos.

    Answers appear as they are generated.
    /image PATH shows another image, /video PATH a video, /reset starts over, /exit quits.
    Questions may also come from a pipe; only answers go to stdout.
    """
    options = {**locals(), "images": images or []}
    from mgllava.chat.command import chat as run_chat

    run_chat(**options)


__all__ = ["chat"]
