"""The command `mgllava chat`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import errors_as_messages


def chat(
    model: Annotated[str, typer.Option(help="MG-LLaVA repository: folder or Hub id.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Path or URL of an image; may be given several times.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="4 or 8: load the language model quantized.", show_default="as it is stored")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as in the repository), float32, float16 or bfloat16.")] = "auto",
    device_map: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 … as in from_pretrained.")] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 … as in from_pretrained.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of repositories that bring their own.")
    ] = False,
    no_detector: Annotated[bool, typer.Option("--no-detector", help="Do not look for objects.")] = False,
    detection_threshold: Annotated[
        float | None, typer.Option(help="Scores of objects must be greater.", show_default="the detector's")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="Box file of `mgllava detect`; the detector looks at other images only.")
    ] = None,
    save_boxes: Annotated[Path, typer.Option(help="Folder to draw the images with their boxes in.")] = Path(
        "chat-boxes"
    ),
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens.", show_default="the model's, or 512")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: always the most probable token. More: sample.", show_default="the model's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the best tokens with this probability.", show_default="the model's"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Talk with a model about images.

    Answers come as they are made. /image PATH shows another image, /reset starts again, /exit leaves; questions may
    come through a pipe, too, and only answers go to stdout.
    """
    with errors_as_messages(ValueError, ImportError):
        from mgllava.chat.command import chat as talk

        talk(
            model,
            image or [],
            bits=bits,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_detector=not no_detector,
            detection_threshold=detection_threshold,
            box_file=boxes,
            picture_folder=save_boxes,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )


__all__ = ["chat"]
