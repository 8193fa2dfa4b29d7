"""Save a small model as a model folder in half precision; see `slime.mk` and `video.mk`."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModel, AutoProcessor

import mgllava  # noqa: F401  # registers the families

_CARD = "README.md"


def bundle_model(model: Path, output: Path) -> None:
    """Write a complete model folder, with the code of the model; an existing `output` is replaced, but for its card.

    `python -m small_world.refresh_code` updates the code later.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        written = Path(folder) / "model"
        AutoModel.from_pretrained(model, dtype=torch.float16).save_pretrained(written)
        AutoProcessor.from_pretrained(model).save_pretrained(written)
        if (output / _CARD).exists():
            shutil.copyfile(output / _CARD, written / _CARD)
        shutil.rmtree(output, ignore_errors=True)
        written.rename(output)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model with its processor.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Save the model in half precision."""
    bundle_model(model, output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    typer.echo(f"Wrote {output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
