"""The command line: `mgllava …`. Heavy imports happen inside the commands, so that help is quick."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class PromptTemplate(str, Enum):
    """Chat templates, one for each family of language models."""

    VICUNA = "vicuna"
    LLAMA3 = "llama3"
    PHI3 = "phi3"
    YI = "yi"


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
    dtype: Annotated[
        str,
        typer.Option(help="auto (as in the checkpoint), float32, float16 or bfloat16."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weight file.")] = "5GB",
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle",
            help="Read checkpoints that hold pickled objects beside the weights. The objects are skipped; no code of "
            "theirs is run even then.",
        ),
    ] = False,
    lora_alpha: Annotated[
        float | None, typer.Option(help="lora_alpha of a LoRA checkpoint whose config text does not say it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")] = False,
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
        console = Console()
        console.print(f"Wrote {written}", soft_wrap=True, markup=False)
        console.print(
            "Load it:\n  import mgllava\n  from transformers import AutoModelForImageTextToText, AutoProcessor"
        )
        for name in ("AutoProcessor", "AutoModelForImageTextToText"):
            variable = "processor" if name == "AutoProcessor" else "model"
            console.print(f'  {variable} = {name}.from_pretrained("{written}")', soft_wrap=True, markup=False)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Print what went wrong in one message, and exit with 1."""
    from mgllava.conversion import ConversionError

    try:
        yield
    except (ConversionError, OSError) as error:
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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
