"""Train one part.

    python -m small_world.parts high-res-tower --data small-world/train --data small-world/crowded \
        --test small-world/test --output parts

Parts: `tokenizer`, `language-model`, `vision-tower`, `high-res-tower`, `detector`, `tagger`. The first comes first,
since the second and the third need it; the last needs the third. `OUTPUT/PART` gets the part,
`OUTPUT/PART-checkpoints` what an interrupted training goes on from.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch.utils.data import ConcatDataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mgllava.conversion.vocabulary import load_tokenizer
from small_world.frames import Frame, centered_frame, cornered_frame, squeezed_frame
from small_world.pictures import Pictures
from small_world.texts import conversation_texts
from small_world.told import ToldScenes, collate_told

from .architecture import DETECTOR_IMAGE_SIZE, IMAGE_SIZE, TAGGER_IMAGE_SIZE
from .detector import DetectorTraining
from .language_model import LanguageModelTraining
from .tagger import TaggerTraining
from .tokenizer import train_tokenizer
from .towers import HighResTowerTraining, VisionTowerTraining
from .training import collate_pictures, train_part


class Part(str, Enum):
    """What can be trained."""

    TOKENIZER = "tokenizer"
    LANGUAGE_MODEL = "language-model"
    VISION_TOWER = "vision-tower"
    HIGH_RES_TOWER = "high-res-tower"
    DETECTOR = "detector"
    TAGGER = "tagger"


# Learning rate, samples in a step.
_SETTINGS = {
    Part.LANGUAGE_MODEL: (2.5e-3, 16),
    Part.VISION_TOWER: (1e-3, 128),
    Part.HIGH_RES_TOWER: (6e-3, 32),
    Part.DETECTOR: (2e-3, 32),
    Part.TAGGER: (1e-3, 32),
}

_TOLD_STEPS = 4000
_TOLD_TESTS = 200


def main(
    part: Annotated[Part, typer.Argument(help="What to train.")],
    data: Annotated[list[Path], typer.Option(help="Data sets to train on, see small_world.dataset.")],
    test: Annotated[Path, typer.Option(help="Data set to test on.")],
    output: Annotated[Path, typer.Option(help="Folder of the parts.")],
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 5,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs.")] = -1,
) -> None:
    """Train one part of the small model on the small world; a run that was interrupted goes on."""
    if part is Part.TOKENIZER:
        train_tokenizer(text for folder in data for text in conversation_texts(folder)).save_pretrained(
            output / part.value
        )
        return
    learning_rate, batch_size = _SETTINGS[part]
    arguments: dict[str, Any] = {
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
    }
    module: Any
    samples: Any
    tests: Any
    if part is Part.LANGUAGE_MODEL:
        tokenizer = load_tokenizer(_part_folder(output, Part.TOKENIZER))
        module, collator = LanguageModelTraining(tokenizer), collate_told
        steps = max_steps if max_steps > 0 else _TOLD_STEPS
        samples = ToldScenes(tokenizer, "train", batch_size * steps, growing=0.12)
        tests = ToldScenes(tokenizer, "test", _TOLD_TESTS)
        arguments |= {
            "label_names": ["labels"],
            "eval_strategy": "steps",
            "eval_steps": 250,
            "num_train_epochs": 1,
            "max_steps": steps,
            # Scenes grow.
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "warmup_stable_decay",
            "warmup_steps": 50,
            "lr_scheduler_kwargs": {"num_decay_steps": int(0.4 * steps), "decay_type": "linear"},
            "adam_beta2": 0.98,
            "weight_decay": 0.01,
        }
    else:
        module, frame = _picture_part(part, output)
        tokenizer = _tokenizer(output) if part is Part.VISION_TOWER else None
        collator = collate_pictures
        samples = ConcatDataset([Pictures(folder, frame, tokenizer) for folder in data])
        tests = Pictures(test, frame, tokenizer)
        arguments["label_names"] = ["attributes"]
    train_part(module, samples, tests, collator, output / f"{part.value}-checkpoints", **arguments)
    module.save(output / part.value)
    if part is Part.LANGUAGE_MODEL:
        _tokenizer(output).save_pretrained(output / part.value)


def _picture_part(part: Part, output: Path) -> tuple[Any, Frame]:
    """Make what is trained on pictures, and say how it sees them."""
    if part is Part.DETECTOR:
        return DetectorTraining(), cornered_frame(DETECTOR_IMAGE_SIZE)
    if part is Part.TAGGER:
        return TaggerTraining(_part_folder(output, Part.VISION_TOWER), _tokenizer(output)), squeezed_frame(
            TAGGER_IMAGE_SIZE
        )
    kind = VisionTowerTraining if part is Part.VISION_TOWER else HighResTowerTraining
    return kind(), centered_frame(IMAGE_SIZE)


def _tokenizer(output: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(_part_folder(output, Part.TOKENIZER))


def _part_folder(output: Path, part: Part) -> Path:
    folder = output / part.value
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no {folder}: train this part first", param_hint="--output")
    return folder


if __name__ == "__main__":
    typer.run(main)
