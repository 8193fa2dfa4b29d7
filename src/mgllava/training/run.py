"""A training from a recipe."""

import dataclasses
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from rich.console import Console
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler, set_seed

from mgllava.box_files import detection_settings, open_detector
from mgllava.folder_lock import FolderLock
from mgllava.modeling import MGLlavaForConditionalGeneration
from mgllava.processing import MGLlavaProcessor
from mgllava.quantization import quantization_config

from .account import (
    PARTIAL,
    check_same_training,
    note_parts,
    refuse_other_files,
    same_parts,
    samples_digest,
    write_end,
    write_start,
)
from .checkpoints import last_complete_checkpoint
from .collator import MGLlavaDataCollator
from .dataset import ConversationDataset, SampleSource, open_source, stream_samples
from .errors import TrainingError
from .lora import has_parameters, lora_config
from .loss_plot import plot_losses
from .recipe import DataOptions, DetectorOptions, ModelOptions, Recipe, checked_recipe
from .starting_model import write_starting_model
from .trainable import check_trained, describe_trained, freeze_all_but, part_of
from .trainer import MGLlavaTrainer

logger = logging.getLogger(__name__)

_START = "start"
# What every training here needs, whatever the recipe says.
_FIXED = {"remove_unused_columns": False, "label_names": ["labels"]}
# Of the command lines that other scripts make of these arguments.
_WITHOUT_EFFECT = {
    "do_eval": "Set `training.eval_strategy`.",
    "do_predict": "Leave it out.",
    "do_train": "Leave it out.",
    "resume_from_checkpoint": "Pass --resume.",
}
_DEFAULTS = {"ddp_find_unused_parameters": False, "report_to": "none"}


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train as a recipe says; in every process of the group, if there are several.

    Args:
        recipe (`Recipe`): The recipe.
        resume (`bool`): Whether to resume from the last checkpoint in `output_dir` that is whole; without one the
            training starts. The recipe must be that of the start, but for what does not change what is learned.

    Returns:
        `Path`: `output_dir`, with the trained model (or adapters) and its processor (with the detector that the recipe
        names), `recipe.yaml`, `trainer_state.json` and `loss.png`.

    Raises:
        TrainingError: If the recipe or its data cannot be used, `output_dir` holds something else, a training is
            resumed by another recipe, the loss is NaN, or nothing was learned from.
        FolderLockedError: If another training writes to `output_dir`.
        BoxFileError: If boxes are those of another detector.
        OSError: If a file cannot be read or written.
        ConversionError: If a starting model cannot be put together from its parts.
        ImportError: If a package of the extra `train` is not installed.
        ValueError: If the model or its processor cannot be loaded.
    """
    recipe = checked_recipe(recipe)
    args = training_arguments(recipe)
    output = Path(str(args.output_dir))
    # The first process writes for all.
    lock = FolderLock(output, "training") if args.process_index == 0 else nullcontext()
    with lock:
        return _train(recipe, args, output, resume)


def _train(recipe: Recipe, args: TrainingArguments, output: Path, resume: bool) -> Path:
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None and not resume:
        raise TrainingError(
            f"`training.output_dir`: {output} has checkpoints, the last at {checkpoint.name}. Resume with --resume, "
            "or choose another folder."
        )
    set_seed(args.seed)
    start = _starting_model(recipe.model, args, output)
    processor = MGLlavaProcessor.from_pretrained(start)
    # Boxes come from files.
    processor.box_detector = None
    data = _open_data(recipe.data, processor, args, "data")
    evaluation = None if recipe.evaluation is None else _open_data(recipe.evaluation, processor, args, "evaluation")
    if checkpoint is None:
        refuse_other_files(output)
    samples = _samples_digest(recipe, data)
    changes: list[str] = []
    if checkpoint is not None:
        changes = check_same_training(recipe, samples, output, checkpoint.name)
    _name_detector(processor, recipe.data.detector)
    model = load_model(recipe, start, args)
    try:
        trainer = MGLlavaTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=evaluation,
            data_collator=_collator(recipe.data, processor),
            eval_data_collator=None if recipe.evaluation is None else _collator(recipe.evaluation, processor),
            processing_class=processor,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Of a logger that is not installed, for example.
        raise TrainingError(f"`training` cannot be used: {error}") from error
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise TrainingError("`training.deepspeed` was left out by accelerate. Start with `accelerate launch`.")
    if args.should_log:
        Console(file=sys.stderr).print(describe_trained(model))
    if isinstance(data, ConversationDataset) and len(trainer.get_train_dataloader()) == 0:
        raise TrainingError(
            f"Nothing would be trained: {len(data)} samples are less than a batch of {args.train_batch_size} for each "
            "process, and `training.dataloader_drop_last` is true."
        )
    if args.should_save:
        write_start(recipe, samples, output, None if checkpoint is None else checkpoint.name, changes)
    result = trainer.train(str(checkpoint) if checkpoint is not None else None)
    if trainer.state.global_step == 0:
        raise TrainingError("Nothing was trained: there was not one step, because no sample was read.")
    _save(trainer, recipe.model, output)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.should_save:
        write_end(output, trainer.state.global_step)
        try:
            plot_losses(trainer.state.log_history, output / "loss.png")
        except ImportError as error:
            logger.warning("No picture of the loss: %s", error)
    return output


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Make transformers' arguments from a recipe.

    Args:
        recipe (`Recipe`): The recipe.

    Returns:
        `TrainingArguments`: With what every training here needs, and batches accumulated to `global_batch_size`.

    Raises:
        TrainingError: If the recipe has no `output_dir`, or arguments that cannot be used.
    """
    given = {**_DEFAULTS, **recipe.training}
    if not given.get("output_dir"):
        raise TrainingError("`training.output_dir` must say where to write, e.g. training.output_dir=stage-1.")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise TrainingError(f"`training.{name}` must be {value}, got {given[name]}. Leave it out.")
    for name, advice in _WITHOUT_EFFECT.items():
        if name in given:
            raise TrainingError(f"`training.{name}` has no effect here. {advice}")
    given |= _FIXED
    evaluates = given.get("eval_strategy", "no") != "no" or bool(given.get("eval_on_start"))
    if evaluates and recipe.evaluation is None:
        raise TrainingError("`training.eval_strategy` needs samples to evaluate on: evaluation.samples=FILE.")
    if recipe.evaluation is not None and not evaluates:
        raise TrainingError(
            "`evaluation` would not be used: `training.eval_strategy` is no. Set it to steps or epoch, or write "
            "evaluation=null."
        )
    if recipe.global_batch_size is not None and given.get("auto_find_batch_size"):
        raise TrainingError("`training.auto_find_batch_size` would change `global_batch_size`. Leave one of them out.")
    if given.get("dataloader_num_workers", 0) == 0:
        # PyTorch refuses both without workers, and recipes of the package set them for theirs.
        for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
            if given.pop(name, None):
                logger.warning("`training.%s` is left out: there are no workers (dataloader_num_workers=0).", name)
    if recipe.data.streaming:
        # Otherwise the first process would cut batches up by rows, of which images have another number.
        given["accelerator_config"] = {**(given.get("accelerator_config") or {}), "dispatch_batches": False}
        if given.get("train_sampling_strategy", "random") == "group_by_length":
            raise TrainingError(
                "`data.streaming` must be false where `training.train_sampling_strategy` is group_by_length: a stream "
                "does not know its lengths. Set it to sequential."
            )
    sharding = given.get("fsdp_config")
    if recipe.lora is not None and isinstance(sharding, dict) and sharding.get("activation_checkpointing"):
        # accelerate would wrap the modules that peft saves whole, and peft then does not find their weights.
        given["fsdp_config"] = {**sharding, "activation_checkpointing": False}
        given["gradient_checkpointing"] = True
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if "gradient_checkpointing" in given and "activation_checkpointing" in known:
        # Its name in newer releases.
        given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    if recipe.global_batch_size is not None:
        given["gradient_accumulation_steps"] = _accumulation(recipe.global_batch_size, given)
    try:
        args = TrainingArguments(**given)
    except Exception as error:  # what is wrong with them is found in many places
        raise TrainingError(f"`training` cannot be used: {' '.join(str(error).split())}") from error
    _check_sharding(args)
    _check_optimizer(args)
    if args.n_gpu > 1:
        logger.warning("One of %d GPUs is used. For all: accelerate launch -m mgllava.cli train …", args.n_gpu)
        # DataParallel would cut batches up by rows, of which images have another number.
        args._n_gpu = 1
    return args


def _check_sharding(args: TrainingArguments) -> None:
    """Refuse FSDP where accelerate would leave it out without a word."""
    state = PartialState()
    # `accelerate launch` asks for it by a variable.
    wanted = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        processes = f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device.type}"
        raise TrainingError(
            f"`training.fsdp` shards among several processes with a GPU each, got {processes}, which would each hold "
            "the whole model. Start with `accelerate launch -m mgllava.cli train …`, or leave it (fsdp2.yaml) out."
        )


def _check_optimizer(args: TrainingArguments) -> None:
    """Find out before anything is loaded whether optimizer and schedule take their options."""
    try:
        optimizer: Any = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        # Some optimizers are made of the model's parts.
        if args.optim_args is None and args.optim_target_modules is None and str(args.optim).startswith("adamw_torch"):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind([torch.zeros(1)], **options)
        schedule: dict[str, Any] = {"num_warmup_steps": 0, "num_training_steps": 10}
        schedule["scheduler_specific_kwargs"] = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, **schedule)
    except Exception as error:
        raise TrainingError(
            f"`training.optim` or `training.lr_scheduler_type` cannot be used with their options: {error}"
        ) from error


def _accumulation(global_batch_size: int, given: dict[str, Any]) -> int:
    """Say how many batches make a step, so that it has as many samples on any number of devices."""
    if "gradient_accumulation_steps" in given:
        raise TrainingError("Give either `global_batch_size` or `training.gradient_accumulation_steps`.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_a_time = processes * int(given.get("per_device_train_batch_size", 8))
    if global_batch_size % at_a_time:
        raise TrainingError(
            f"`global_batch_size` must be a multiple of what {processes} processes take at a time, {at_a_time}, got "
            f"{global_batch_size}. Change it or `training.per_device_train_batch_size`."
        )
    return global_batch_size // at_a_time


def _starting_model(options: ModelOptions, args: TrainingArguments, output: Path) -> str:
    if (options.name is None) == (options.parts is None):
        raise TrainingError("Give either `model.name`, a repository to start from, or `model.parts`.")
    if options.parts is None:
        return str(options.name)
    parts = options.parts
    names = ("llm", "vision_tower", "high_res_tower", "prompt_template")
    if absent := [f"`model.parts.{name}`" for name in names if not getattr(parts, name)]:
        raise TrainingError(f"{', '.join(absent)} must be given.")
    start = output / _START
    described = {**dataclasses.asdict(parts), "dtype": options.dtype}
    with args.main_process_first(local=not args.save_on_each_node, desc="putting the model together"):
        if not start.is_dir():
            given = {name: getattr(parts, name) for name in names}
            write_starting_model(start, **given, dtype=getattr(torch, options.dtype), **parts.config)
            note_parts(start, described)
    if not same_parts(start, described):
        raise TrainingError(
            f"`model.parts`: {start} was put together from other parts, or does not say from which. Delete it, or "
            "choose another `training.output_dir`."
        )
    return str(start)


def _samples_digest(recipe: Recipe, data: Any) -> str | None:
    """Identify samples and boxes, so that a training is not resumed with others under the same name."""
    if not isinstance(data, ConversationDataset):
        return None  # streamed: nobody has read them
    return samples_digest([data.digest], [Path(path) for path in _as_list(recipe.data.boxes)])


def _collator(options: DataOptions, processor: MGLlavaProcessor) -> MGLlavaDataCollator:
    return MGLlavaDataCollator(
        processor,
        options.max_text_length,
        on_bad_sample=options.on_bad_sample,  # type: ignore[arg-type]  # checked
        missing_boxes=options.missing_boxes,  # type: ignore[arg-type]  # checked
        return_sample_ids=True,
    )


def _name_detector(processor: MGLlavaProcessor, given: DetectorOptions | None) -> None:
    """Give the processor the detector that the recipe names: what the model learned with, it is used with."""
    if given is None or (given.tagger is None and given.labels is None):
        return  # the model's own, if it has one
    tagger, labels = given.tagger, given.labels
    named = open_detector(detector=given.detector, tagger=None if labels else tagger, mode=given.mode)
    processor.box_detector_config = {**named.config, **({"tagger": list(labels)} if labels else {})}
    # It is saved, but it does not run here.
    processor.box_detector = None
    if given.threshold != DetectorOptions.threshold:
        logger.warning(
            "The boxes were found with scores above %s, but a processor's detector has no threshold of its own: pass "
            "threshold=%s to `processor.detect`.",
            given.threshold,
            given.threshold,
        )


def _open_data(options: DataOptions, processor: MGLlavaProcessor, args: TrainingArguments, section: str) -> Any:
    samples, images, boxes = (_as_list(value) for value in (options.samples, options.images, options.boxes))
    if not samples:
        raise TrainingError(f"`{section}.samples` must name a file of samples, e.g. {section}.samples=llava.json.")
    for name, values in (("images", images), ("boxes", boxes)):
        if values and len(values) not in (1, len(samples)):
            raise TrainingError(
                f"`{section}.{name}` must have one entry, or one for each of {len(samples)} files, got {len(values)}."
            )
    sources = [open_source(path, _at(images, number), _at(boxes, number)) for number, path in enumerate(samples)]
    _check_detector(options, processor, sources, section)
    if options.streaming and section == "data":
        if args.max_steps <= 0:
            raise TrainingError("`training.max_steps` must be given where `data.streaming` is true.")
        return stream_samples(sources)
    with args.main_process_first(desc="measuring samples"):
        return ConversationDataset(
            sources,
            processor,
            options.max_text_length,
            options.on_bad_sample,  # type: ignore[arg-type]  # checked
            options.missing_boxes,  # type: ignore[arg-type]  # checked
            options.processes,
        )


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _at(values: list[str], number: int) -> str | None:
    return None if not values else values[number] if len(values) > 1 else values[0]


def _check_detector(
    options: DataOptions, processor: MGLlavaProcessor, sources: list[SampleSource], section: str
) -> None:
    """Refuse boxes of another detector than the one that the model will be used with."""
    files = [source.boxes for source in sources if source.boxes is not None]
    if options.allow_other_boxes or not files:
        return
    given = options.detector
    if given is not None and given.tagger is None and given.labels is None:
        raise TrainingError(
            f"`{section}.detector.tagger` must name what {files[0].name} was made with: the folder of RAM++, or "
            f"coco80. `{section}.allow_other_boxes=true` takes the boxes as they are."
        )
    config = processor.locate_box_detector()
    if given is not None:
        config = open_detector(detector=given.detector, tagger=given.tagger, mode=given.mode).config
    if config is None:
        raise TrainingError(
            f"Nothing says which detector must have made {files[0].name}: the model has none. Name it in "
            f"`{section}.detector`, or take the boxes as they are: `{section}.allow_other_boxes=true`."
        )
    labels, threshold = (None, 0.2) if given is None else (given.labels, given.threshold)
    expected = detection_settings(config, labels, threshold)
    for file in files:
        try:
            file.check_settings(expected)
        except ValueError as error:
            advice = f"`{section}.allow_other_boxes=true` takes them all the same."
            raise TrainingError(f"{error} In a recipe, {advice}") from error


def load_model(recipe: Recipe, start: str, args: TrainingArguments) -> Any:
    """Load the model of a recipe, and choose what is trained.

    Args:
        recipe (`Recipe`): The recipe.
        start (`str`): Folder or Hub id of the model.
        args (`TrainingArguments`): Made before: ZeRO-3 shares weights out while they are loaded.

    Returns:
        [`MGLlavaForConditionalGeneration`] or `peft.PeftModel`: The model.

    Raises:
        TrainingError: If `train` names something else than modules of the model, or what is quantized is to be
            trained.
        ValueError: If the model cannot be put together from its parts.
    """
    options = recipe.model
    if not recipe.train:
        raise TrainingError("`train` must name the modules that are trained.")
    if options.bits is not None and recipe.lora is None:
        raise TrainingError(f"`model.bits` needs `lora`: {options.bits} bits cannot be trained themselves.")
    model: Any = MGLlavaForConditionalGeneration.from_pretrained(
        start,
        dtype=getattr(torch, options.dtype),
        **({} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}),
        **({} if options.bits is None else {"quantization_config": quantization_config(options.bits)}),
    )
    freeze_all_but(model, recipe.train)
    if recipe.lora is not None:
        from peft import get_peft_model

        if whole := [name for name in recipe.train if part_of(name) in ("language_model", "lm_head")]:
            raise TrainingError(
                f"`train` must not name {', '.join(whole)} where `lora` is given: adapters learn in their place."
            )
        saved = [name for name in recipe.train if has_parameters(model, name)]
        try:
            model = get_peft_model(model, lora_config(model, **{"modules_to_save": saved, **recipe.lora}))
        except Exception as error:  # peft finds what is wrong in many places
            raise TrainingError(f"`lora` cannot be used: {' '.join(str(error).split())}") from error
    check_trained(model, recipe.train, lora=recipe.lora is not None)
    if (args.bf16 or args.fp16) and not (args.deepspeed or args.fsdp):
        # Small steps would be lost in 16 bits. DeepSpeed and FSDP keep 32 bits of their own.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _save(trainer: MGLlavaTrainer, options: ModelOptions, output: Path) -> None:
    """Save the result in the dtype of the recipe: what was trained in 32 bits may be in it.

    A process that is killed while it saves leaves no half model: files appear in `output` when all are written.
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


__all__ = ["load_model", "train", "training_arguments"]
