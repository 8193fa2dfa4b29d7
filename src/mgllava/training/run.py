"""Train from a recipe: load the model and the samples that it names, train, and save the result."""

import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments, set_seed

from mgllava.families import resolve, takes_boxes
from mgllava.folder_lock import FolderLock

from .arguments import training_arguments
from .checkpoints import last_complete_checkpoint
from .dataset import ConversationDataset
from .errors import TrainingError
from .loss_plot import plot_losses
from .recipe import ModelOptions, Recipe, checked_recipe
from .recipe_data import digest_of_samples, make_collator, name_detector, open_data, refuse_boxes
from .recipe_model import START, family_of_recipe, load_model, starting_model
from .run_record import PARTIAL, check_same_training, refuse_other_files, write_end, write_start
from .trainable import describe_trained
from .trainer import MGLlavaTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train from a recipe; with several processes, each of them calls this.

    Args:
        recipe (`Recipe`): The recipe.
        resume (`bool`, *optional*, defaults to `False`): Whether to resume from the last complete checkpoint in
            `output_dir`; if there is none, the training starts from scratch. The recipe must not have changed, except
            for keys that do not affect what is learned.

    Returns:
        `Path`: `output_dir`, with the trained model (or adapters) and its processor (with the box detector that the
        recipe names), `recipe.yaml`, `trainer_state.json` and `loss.png`.

    Raises:
        TrainingError: If the recipe or its data cannot be used, `output_dir` has other contents, the recipe of a
            resumed training has changed, the loss is NaN, or nothing was learned.
        FolderLockedError: If another training writes to `output_dir`.
        BoxFileError: If another detector found the boxes.
        OSError: If a file cannot be read or written.
        ConversionError: If a starting model cannot be built from its parts.
        ImportError: If a package of the extra `train` is not installed.
        ValueError: If the model or its processor cannot be loaded.
        RuntimeError: If this release of transformers insists on using all GPUs in one process.
    """
    recipe = checked_recipe(recipe)
    args = training_arguments(recipe)
    output = Path(str(args.output_dir))
    # Only the first process writes, so only it takes the lock.
    with FolderLock(output, "training") if args.process_index == 0 else nullcontext():
        return _train(recipe, args, output, resume)


def _train(recipe: Recipe, args: TrainingArguments, output: Path, resume: bool) -> Path:
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None and not resume:
        raise TrainingError(
            f"`training.output_dir`: {output} has checkpoints up to {checkpoint.name}. Pass `resume` to resume that "
            "training, or choose another folder."
        )
    if checkpoint is None and recipe.model.parts is not None and not (output / START).is_dir():
        refuse_other_files(output)  # before the starting model is written there
    set_seed(args.seed)
    start = starting_model(recipe.model, args, output)
    family = family_of_recipe(recipe.model, start)
    processor = resolve(str(family.processor)).from_pretrained(start)
    if takes_boxes(processor):
        processor.box_detector = None  # boxes come from files
    else:
        refuse_boxes(recipe, family)
    data, data_processor = open_data(recipe.data, processor, family, args, "data")
    evaluation = eval_processor = None
    if recipe.evaluation is not None:
        evaluation, eval_processor = open_data(recipe.evaluation, processor, family, args, "evaluation")
    if checkpoint is None:
        refuse_other_files(output)
    samples = digest_of_samples(recipe, data)
    changes: list[str] = []
    if checkpoint is not None:
        changes = check_same_training(recipe, samples, output, checkpoint.name)
    name_detector(processor, recipe.data.detector)
    model = load_model(recipe, start, args, family)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        trainer = MGLlavaTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=evaluation,
            data_collator=make_collator(recipe.data, data_processor, positions),
            eval_data_collator=recipe.evaluation and make_collator(recipe.evaluation, eval_processor, positions),
            processing_class=processor,
            learning_rates=recipe.learning_rates,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # For example, a package that `report_to` names is not installed.
        raise TrainingError(f"`training` cannot be used: {error}") from error
    if args.should_log:
        _describe(model, recipe)
    _check_trainer(trainer, data)
    if args.should_save:
        write_start(recipe, samples, output, None if checkpoint is None else checkpoint.name, changes)
    result = trainer.train(str(checkpoint) if checkpoint is not None else None)
    _save(trainer, recipe.model, output)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.should_save:
        write_end(output, trainer.state.global_step)
        try:
            plot_losses(trainer.state.log_history, output / "loss.png")
        except ImportError as error:
            logger.warning("The loss was not plotted: %s", error)
    return output


def _describe(model: Any, recipe: Recipe) -> None:
    console = Console(file=sys.stderr)
    console.print(describe_trained(model))
    if recipe.model.config:
        values = ", ".join(f"{name}={value}" for name, value in recipe.model.config.items())
        console.print(f"Set in the model's configuration, and saved with the result: {values}")


def _check_trainer(trainer: MGLlavaTrainer, data: Any) -> None:
    """Refuse settings that would be ignored, and data that fill no batch."""
    args = trainer.args
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise TrainingError("`training.deepspeed` was ignored by accelerate. Start with `accelerate launch`.")
    if isinstance(data, ConversationDataset) and len(trainer.get_train_dataloader()) == 0:
        raise TrainingError(
            f"Nothing would be trained: {len(data)} samples do not fill a batch of {args.train_batch_size} for each "
            "process, and `training.dataloader_drop_last` is true."
        )


def _save(trainer: MGLlavaTrainer, options: ModelOptions, output: Path) -> None:
    """Save the result in the dtype of the recipe, which may differ from that of the trained modules.

    Files are moved to `output` when all of them are written, so a killed process does not leave a partial model there.
    """
    model = trainer.model
    if isinstance(model, PreTrainedModel) and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        model.to(getattr(torch, options.dtype))
    partial = output / PARTIAL
    if trainer.args.should_save and partial.exists():
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    for path in sorted(partial.iterdir()):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()


__all__ = ["train"]
