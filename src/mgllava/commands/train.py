"""The command `mgllava train`."""

import os
from typing import Annotated

import typer
from rich.console import Console

from .console import errors_as_messages


def train(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml [MORE.yaml|KEY=VALUE]...",
            help="Recipes (files, or recipes of the package) and changes to them; later ones win.",
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint; start if there is none.")
    ] = False,
) -> None:
    """Train a model as a recipe says.

    For example: mgllava train stage_1_vicuna_7b.yaml data.samples=llava.json data.images=images
    data.boxes=boxes.parquet data.detector.tagger=ram-plus. Several GPUs: accelerate launch -m mgllava.cli train …
    """
    with errors_as_messages(ValueError, ImportError):
        from mgllava import training

        written = training.train(training.load_recipe(*recipe), resume=resume)
    if os.environ.get("RANK", "0") == "0":
        Console().print(f"Wrote {written}", soft_wrap=True, markup=False)


__all__ = ["train"]
