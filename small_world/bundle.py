"""Save the small model with its tagger and its detector as one model folder, in half precision; see `Makefile`."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
)

from mgllava import BoxDetector

# The language model that both stages start from; the one in the shipped model was tuned in stage 2.
LANGUAGE_MODEL = Path(__file__).parent / "language_model"


def bundle(model: Path, tagger: Path, detector: Path, output: Path) -> None:
    """Write a complete model folder, with the code of the model; an existing `output` is replaced.

    `python -m small_world.refresh_code` updates the code later.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        in_half_precision = Path(folder) / "tagger", Path(folder) / "detector"
        for source, target, kind, processor in (
            (tagger, in_half_precision[0], AutoModel, AutoImageProcessor),
            (detector, in_half_precision[1], AutoModelForZeroShotObjectDetection, AutoProcessor),
        ):
            kind.from_pretrained(source, dtype=torch.float16).save_pretrained(target)
            processor.from_pretrained(source).save_pretrained(target)
        written = Path(folder) / "model"
        AutoModel.from_pretrained(model, dtype=torch.float16).save_pretrained(written)
        complete = AutoProcessor.from_pretrained(model)
        complete.box_detector = BoxDetector(*in_half_precision, mode="clean")
        complete.box_detector.embed_vocabulary()
        complete.save_pretrained(written)
        shutil.rmtree(output, ignore_errors=True)
        written.rename(output)


def write_language_model(source: Path, output: Path) -> None:
    """Write a language model and its tokenizer in half precision; an existing `output` is replaced."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        written = Path(folder) / "model"
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(written)
        AutoTokenizer.from_pretrained(source).save_pretrained(written)
        shutil.rmtree(output, ignore_errors=True)
        written.rename(output)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model with its processor.")],
    tagger: Annotated[Path, typer.Option(help="Folder of the tagger.")],
    detector: Annotated[Path, typer.Option(help="Folder of the detector.")],
    language_model: Annotated[Path, typer.Option(help="Folder of the language model that both stages start from.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Save model, tagger and detector as one model folder, and the language model as another."""
    bundle(model, tagger, detector, output)
    write_language_model(language_model, LANGUAGE_MODEL)
    for folder in (output, LANGUAGE_MODEL):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        typer.echo(f"Wrote {folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
