"""Write the model that the training of the video model starts from: the small model without its box detector.

python -m small_world.video_start small_world/model --output small-video/start
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModel, AutoProcessor

import mgllava


def write_start(model: Path, output: Path) -> None:
    """Let a model take videos, and write it and its processor in float32."""
    loaded, processor = AutoModel.from_pretrained(model, dtype=torch.float32), AutoProcessor.from_pretrained(model)
    mgllava.add_videos(loaded, processor)
    processor.box_detector_config = None
    loaded.save_pretrained(output)
    processor.save_pretrained(output)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the small model.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("small-video/start"),
) -> None:
    """Write the model that training starts from."""
    write_start(model, output)


if __name__ == "__main__":
    typer.run(main)
