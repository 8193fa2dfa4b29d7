"""The command `mgllava train`."""

from typing import Annotated

import typer

from .console import errors_as_messages, is_main_process, say


@errors_as_messages(ValueError, ImportError)
def train(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml [MORE.yaml|KEY=VALUE]...",
            help="Recipes (files, or names of the package's recipes) and changes to them; later ones win.",
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last complete checkpoint; start if there is none.")
    ] = False,
) -> None:
    """Train a model from a recipe.

    For example: mgllava train stage_1_vicuna_7b.yaml data.samples=llava.json
    data.images=images data.boxes=boxes.parquet data.detector.tagger=ram-plus

    Several GPUs: accelerate launch -m mgllava train …
    """
    from mgllava import training

    written = training.train(training.load_recipe(*recipe), resume=resume)
    if is_main_process():
        say(f"Wrote {written}")


__all__ = ["train"]
