"""Train one part.

    python -m small_world.parts high-res-tower --data small-world/train --test small-world/test --output parts

Parts: `tokenizer`, `language-model`, `vision-tower`, `high-res-tower`. The first comes first, since the second and the
third need it. `OUTPUT/PART` gets the part, `OUTPUT/PART-checkpoints` what an interrupted training goes on from.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from small_world.pictures import Pictures
from small_world.texts import conversation_ids, conversation_texts

from .architecture import IMAGE_SIZE
from .language_model import LanguageModelTraining
from .tokenizer import train_tokenizer
from .towers import HighResTowerTraining, VisionTowerTraining
from .training import collate_pictures, collate_texts, train_part


class Part(str, Enum):
    """What can be trained."""

    TOKENIZER = "tokenizer"
    LANGUAGE_MODEL = "language-model"
    VISION_TOWER = "vision-tower"
    HIGH_RES_TOWER = "high-res-tower"


# Learning rate, samples in a step.
_SETTINGS = {
    Part.LANGUAGE_MODEL: (3e-3, 32),
    Part.VISION_TOWER: (1e-3, 128),
    Part.HIGH_RES_TOWER: (3e-3, 32),
}


def main(
    part: Annotated[Part, typer.Argument(help="What to train.")],
    data: Annotated[Path, typer.Option(help="Data set to train on, see small_world.dataset.")],
    test: Annotated[Path, typer.Option(help="Data set to test on.")],
    output: Annotated[Path, typer.Option(help="Folder of the parts.")],
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 5,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs.")] = -1,
) -> None:
    """Train one part of the small model on the small world; a run that was interrupted goes on."""
    if part is Part.TOKENIZER:
        train_tokenizer(conversation_texts(data)).save_pretrained(output / part.value)
        return
    learning_rate, batch_size = _SETTINGS[part]
    arguments: dict[str, Any] = {
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
    }
    module: Any
    if part is Part.LANGUAGE_MODEL:
        tokenizer = _tokenizer(output)
        module, collator = LanguageModelTraining(), collate_texts
        sets = [conversation_ids(folder, tokenizer) for folder in (data, test)]
        arguments["label_names"] = ["labels"]
    else:
        module = VisionTowerTraining() if part is Part.VISION_TOWER else HighResTowerTraining()
        tokenizer = _tokenizer(output) if part is Part.VISION_TOWER else None
        collator = collate_pictures
        sets = [Pictures(folder, IMAGE_SIZE, tokenizer) for folder in (data, test)]
        arguments["label_names"] = ["attributes"]
    train_part(module, sets[0], sets[1], collator, output / f"{part.value}-checkpoints", **arguments)
    module.save(output / part.value)
    if part is Part.LANGUAGE_MODEL:
        tokenizer.save_pretrained(output / part.value)


def _tokenizer(output: Path) -> PreTrainedTokenizerFast:
    folder = output / Part.TOKENIZER.value
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no {folder}: train the tokenizer first", param_hint="--output")
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
