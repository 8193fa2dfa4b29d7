"""Take the shipped model apart, for those who want to train its two stages and not its parts.

    python -m small_world.unbundle small_world/model --output small-world/parts

Towers, tagger and detector come out where `small_world.parts` writes them, in float32 again but rounded to half
precision. Stage 2 tunes the language model, so as it was before it saw pictures it is shipped beside the model, in
`small_world/language_model`. Of CLIP only what the model uses was kept: its text model is missing, and the last layer
of its vision tower, which nobody reads, is drawn anew.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mgllava import MGLlavaForConditionalGeneration

from .bundle import LANGUAGE_MODEL
from .parts.towers import save_high_res_tower


def unbundle(model: Path, output: Path, language_model: Path = LANGUAGE_MODEL) -> None:
    """Write the parts of a bundle; a part that is there already is kept.

    Args:
        model (`Path`): Folder that [`small_world.bundle`] wrote.
        output (`Path`): Folder of the parts.
        language_model (`Path`, *optional*): The language model that both stages start from.
    """
    whole = MGLlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).model
    boxes = model / "box_detector"
    parts: dict[str, Callable[[Path], object]] = {
        "language-model": lambda folder: shutil.copytree(language_model, folder),
        "vision-tower": lambda folder: _clip(whole.vision_tower).save_pretrained(folder),
        "high-res-tower": lambda folder: save_high_res_tower(whole.high_res_vision_tower, folder),
        "tagger": lambda folder: shutil.copytree(boxes / "tagger", folder),
        "detector": lambda folder: shutil.copytree(boxes / "detector", folder),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, write in parts.items():
        folder = output / name
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output) as partial:
                write(Path(partial) / name)
                (Path(partial) / name).rename(folder)


def _clip(tower: nn.Module) -> CLIPVisionModel:
    """Give a vision tower the layer back that the model leaves out."""
    used = tower.config.num_hidden_layers
    config = CLIPVisionConfig(**{**tower.config.to_dict(), "num_hidden_layers": used + 1})
    clip = CLIPVisionModel(config)
    absent, unexpected = clip.load_state_dict(tower.state_dict(), strict=False)
    not_kept = (f"encoder.layers.{used}.", "post_layernorm.")
    assert not unexpected and all(name.startswith(not_kept) for name in absent)
    return clip


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    output: Annotated[Path, typer.Option(help="Folder of the parts.")] = Path("small-world/parts"),
) -> None:
    """Take the shipped model apart."""
    unbundle(model, output)


if __name__ == "__main__":
    typer.run(main)
