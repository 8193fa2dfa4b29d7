"""Put the small model into one folder with its tagger and its detector, in half precision.

See `Makefile` in this folder for how it is called.
"""

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

# What both stages start from is shipped beside the model, whose own was tuned.
LANGUAGE_MODEL = Path(__file__).parent / "language_model"


def bundle(model: Path, tagger: Path, detector: Path, output: Path) -> None:
    """Write one folder that loads by itself, with its code.

    `python -m small_world.refresh_code` brings the code up to date later.

    Args:
        model (`Path`): Folder of the model with its processor.
        tagger (`Path`): Folder of the small RAM++.
        detector (`Path`): Folder of the small OWLv2.
        output (`Path`): Folder to write; what is there is replaced.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        halves = Path(folder) / "tagger", Path(folder) / "detector"
        for source, half, kind, processor in (
            (tagger, halves[0], AutoModel, AutoImageProcessor),
            (detector, halves[1], AutoModelForZeroShotObjectDetection, AutoProcessor),
        ):
            kind.from_pretrained(source, dtype=torch.float16).save_pretrained(half)
            processor.from_pretrained(source).save_pretrained(half)
        written = Path(folder) / "model"
        AutoModel.from_pretrained(model, dtype=torch.float16).save_pretrained(written)
        complete = AutoProcessor.from_pretrained(model)
        complete.box_detector = BoxDetector(*halves, mode="clean")
        complete.box_detector.embed_vocabulary()
        complete.save_pretrained(written)
        shutil.rmtree(output, ignore_errors=True)
        written.rename(output)


def write_language_model(source: Path, output: Path) -> None:
    """Write a language model and its tokenizer in half precision.

    Args:
        source (`Path`): Folder of the language model.
        output (`Path`): Folder to write; what is there is replaced.
    """
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
    """Put model, tagger and detector into one folder, and the language model into another."""
    bundle(model, tagger, detector, output)
    write_language_model(language_model, LANGUAGE_MODEL)
    for folder in (output, LANGUAGE_MODEL):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        typer.echo(f"Wrote {folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
