"""Train one part.

    python -m small_world.parts high-res-tower --data small-world/train --data small-world/crowded \
        --test small-world/test --output parts

The language model and the vision tower need the tokenizer, and the tagger needs the language model. The language model
needs no data set: its samples are generated in memory. The part is written to `OUTPUT/PART`, and its checkpoints, from
which an interrupted training is resumed, to `OUTPUT/PART-checkpoints`.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mgllava.model_files.vocabulary import load_tokenizer
from small_world.frames import Frame, centered_frame, cornered_frame, squeezed_frame
from small_world.oracle_scenes import LESSONS, OracleScenes, collate_oracle_scenes
from small_world.pictures import Pictures
from small_world.texts import conversation_texts

from . import Part
from .architecture import DETECTOR_IMAGE_SIZE, IMAGE_SIZE, TAGGER_IMAGE_SIZE
from .detector import DetectorTraining
from .language_model import LanguageModelTraining
from .tagger import TaggerTraining
from .tile_tower import TileTowerTraining, Views
from .tokenizer import train_tokenizer
from .towers import HighResTowerTraining, VisionTowerTraining
from .training import collate_pictures, train_part

_SETTINGS: dict[Part, dict[str, Any]] = {
    Part.LANGUAGE_MODEL: {"learning_rate": 7e-4, "per_device_train_batch_size": 16},
    Part.VISION_TOWER: {"learning_rate": 1e-3, "per_device_train_batch_size": 128},
    Part.TILE_TOWER: {"learning_rate": 1e-3, "per_device_train_batch_size": 16},
    Part.HIGH_RES_TOWER: {"learning_rate": 6e-3, "per_device_train_batch_size": 32},
    Part.DETECTOR: {"learning_rate": 2e-3, "per_device_train_batch_size": 32},
    Part.TAGGER: {"learning_rate": 5e-3, "per_device_train_batch_size": 32},
}
_LANGUAGE_MODEL_STEPS = 6000
_LANGUAGE_MODEL_TESTS = 100


def main(
    part: Annotated[Part, typer.Argument(help="Part to train.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Data sets to train on, see small_world.dataset. Not for the language model."),
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Data set to test on, for the parts that see pictures.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the parts.")] = Path("parts"),
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 5,
    max_steps: Annotated[int, typer.Option(help="Number of steps, instead of epochs.")] = -1,
) -> None:
    """Train one part of the small model on the small world, or resume a training that was interrupted."""
    if part is Part.LANGUAGE_MODEL:
        _train_language_model(output, max_steps if max_steps > 0 else _LANGUAGE_MODEL_STEPS)
        return
    if not data:
        raise typer.BadParameter(f"{part.value} is trained on data sets: name at least one", param_hint="--data")
    if part is Part.TOKENIZER:
        texts = (text for folder in data for text in conversation_texts(folder))
        train_tokenizer(texts).save_pretrained(output / part.value)
        return
    if test is None:
        raise typer.BadParameter(f"{part.value} is tested on a data set: name one", param_hint="--test")
    module: Any
    if part is Part.TILE_TOWER:
        module, dataset = TileTowerTraining(_part_folder(output, Part.VISION_TOWER)), Views
    else:
        module, frame = _picture_part(part, output)
        tokenizer = _tokenizer(output) if part is Part.VISION_TOWER else None
        dataset = partial(Pictures, frame=frame, tokenizer=tokenizer)
    metrics = train_part(
        module,
        ConcatDataset([dataset(folder) for folder in data]),
        dataset(test),
        collate_pictures,
        output / f"{part.value}-checkpoints",
        label_names=["attributes"],
        num_train_epochs=epochs,
        max_steps=max_steps,
        **_SETTINGS[part],
    )
    module.save(output / part.value)
    _report(part, metrics)


def _train_language_model(output: Path, steps: int) -> None:
    """Train on scenes with oracle tokens, which are generated on the fly."""
    part = Part.LANGUAGE_MODEL
    tokenizer = load_tokenizer(_part_folder(output, Part.TOKENIZER))
    module = LanguageModelTraining(tokenizer)
    metrics = train_part(
        module,
        OracleScenes(tokenizer, "train", steps * _SETTINGS[part]["per_device_train_batch_size"], LESSONS),
        OracleScenes(tokenizer, "test", _LANGUAGE_MODEL_TESTS),
        collate_oracle_scenes,
        output / f"{part.value}-checkpoints",
        label_names=["labels"],
        max_steps=steps,
        train_sampling_strategy="sequential",  # lessons have an order
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(0.4 * steps), "decay_type": "linear"},
        warmup_steps=50,
        adam_beta2=0.98,
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=200,
        dataloader_num_workers=1,
        **_SETTINGS[part],
    )
    module.save(output / part.value)
    _tokenizer(output).save_pretrained(output / part.value)
    _report(part, metrics)


def _report(part: Part, metrics: dict[str, float]) -> None:
    """Print the metrics of a part."""
    shares = [f"{name} {100 * share:.1f} %" for name, share in metrics.items() if name != "loss"]
    text = ", ".join([f"loss {metrics['loss']:.3f}", *shares])
    Console().print(f"{part.value}, on new samples: {text}", highlight=False)


def _picture_part(part: Part, output: Path) -> tuple[Any, Frame]:
    """Return the module that trains a part on pictures, and the frame of the part's pictures."""
    if part is Part.DETECTOR:
        return DetectorTraining(), cornered_frame(DETECTOR_IMAGE_SIZE)
    if part is Part.TAGGER:
        language_model = AutoModelForCausalLM.from_pretrained(_part_folder(output, Part.LANGUAGE_MODEL))
        return TaggerTraining(language_model, _tokenizer(output)), squeezed_frame(TAGGER_IMAGE_SIZE)
    kind = VisionTowerTraining if part is Part.VISION_TOWER else HighResTowerTraining
    return kind(), centered_frame(IMAGE_SIZE)


def _tokenizer(output: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(_part_folder(output, Part.TOKENIZER))


def _part_folder(output: Path, part: Part) -> Path:
    folder = output / part.value
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} does not exist: train this part first", param_hint="--output")
    return folder


if __name__ == "__main__":
    typer.run(main)
