"""A training from a recipe."""

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments, set_seed

from mgllava.atomic_files import replacing
from mgllava.box_files import detection_settings, open_detector
from mgllava.modeling import MGLlavaForConditionalGeneration, quantization_config
from mgllava.processing import MGLlavaProcessor

from .checkpoints import last_complete_checkpoint
from .collator import MGLlavaDataCollator
from .dataset import ConversationDataset, SampleSource, open_source, stream_samples
from .errors import TrainingError
from .lora import has_parameters, lora_config
from .loss_plot import plot_losses
from .recipe import DataOptions, ModelOptions, Recipe
from .starting_model import write_starting_model
from .trainable import check_trained, describe_trained, freeze_all_but, part_of
from .trainer import MGLlavaTrainer

logger = logging.getLogger(__name__)

_START = "start"
# What every training here needs, whatever the recipe says.
_FIXED = {"remove_unused_columns": False, "label_names": ["labels"]}
_DEFAULTS = {"ddp_find_unused_parameters": False, "report_to": "none"}


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train as a recipe says; in every process of the group, if there are several.

    Args:
        recipe (`Recipe`): The recipe.
        resume (`bool`): Whether to go on from the last checkpoint in `output_dir` that is whole; without one the
            training starts.

    Returns:
        `Path`: `output_dir`, with the trained model (or adapters) and its processor, `recipe.yaml`,
        `trainer_state.json` and `loss.png`.

    Raises:
        TrainingError: If the recipe or its data cannot be used, or the loss is NaN.
        BoxFileError: If boxes are those of another detector.
        OSError: If a file cannot be read or written.
    """
    args = training_arguments(recipe)
    output = Path(str(args.output_dir))
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None and not resume:
        raise TrainingError(
            f"`training.output_dir`: {output} has checkpoints, the last at {checkpoint.name}. Go on with --resume, or "
            "choose another folder."
        )
    set_seed(args.seed)
    start = _starting_model(recipe.model, args, output)
    processor = MGLlavaProcessor.from_pretrained(start)
    # Boxes come from files.
    processor.box_detector = None
    data = _open_data(recipe.data, processor, args, "data")
    evaluation = None if recipe.evaluation is None else _open_data(recipe.evaluation, processor, args, "evaluation")
    model = load_model(recipe, start, args)
    trainer = MGLlavaTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=evaluation,
        data_collator=MGLlavaDataCollator(
            processor,
            recipe.data.max_text_length,
            on_bad_sample=recipe.data.on_bad_sample,  # type: ignore[arg-type]  # checked
            missing_boxes=recipe.data.missing_boxes,  # type: ignore[arg-type]  # checked
            return_sample_ids=True,
        ),
        processing_class=processor,
    )
    if args.should_log:
        Console(file=sys.stderr).print(describe_trained(model))
    if args.should_save:
        with replacing(output / "recipe.yaml") as partial:
            partial.write_text(recipe.to_yaml(), encoding="utf-8")
    result = trainer.train(str(checkpoint) if checkpoint is not None else None)
    _save(trainer, recipe.model, output)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.should_save:
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
    given = {**_DEFAULTS, **(recipe.training or {})}
    if not given.get("output_dir"):
        raise TrainingError("`training.output_dir` must say where to write, e.g. training.output_dir=stage-1.")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise TrainingError(f"`training.{name}` must be {value}, got {given[name]}. Leave it out.")
    given |= _FIXED
    if recipe.data.streaming:
        # Otherwise the first process would cut batches up by rows, of which images have another number.
        given["accelerator_config"] = {**(given.get("accelerator_config") or {}), "dispatch_batches": False}
        if given.get("train_sampling_strategy", "random") == "group_by_length":
            raise TrainingError(
                "`data.streaming` must be false where `training.train_sampling_strategy` is group_by_length: a stream "
                "does not know its lengths. Set it to sequential."
            )
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if "gradient_checkpointing" in given and "activation_checkpointing" in known:
        # Its name in newer releases.
        given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    if recipe.global_batch_size is not None:
        given["gradient_accumulation_steps"] = _accumulation(recipe.global_batch_size, given)
    try:
        args = TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"`training` cannot be used: {error}") from error
    if args.n_gpu > 1:
        logger.warning("One of %d GPUs is used. For all: accelerate launch -m mgllava.cli train …", args.n_gpu)
        # DataParallel would cut batches up by rows, of which images have another number.
        args._n_gpu = 1
    return args


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
    with args.main_process_first(local=not args.save_on_each_node, desc="putting the model together"):
        if not start.is_dir():
            given = {name: getattr(parts, name) for name in names}
            write_starting_model(start, **given, dtype=getattr(torch, options.dtype), **parts.config)
    return str(start)


def _open_data(options: DataOptions, processor: MGLlavaProcessor, args: TrainingArguments, section: str) -> Any:
    for name, choices in (("missing_boxes", ("error", "empty")), ("on_bad_sample", ("error", "skip"))):
        if getattr(options, name) not in choices:
            raise TrainingError(f"`{section}.{name}` must be {' or '.join(choices)}, got {getattr(options, name)}.")
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
    """
    options = recipe.model
    dtype = getattr(torch, options.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TrainingError(f"`model.dtype` must be float32, bfloat16 or float16, got {options.dtype}.")
    if not recipe.train:
        raise TrainingError("`train` must name the modules that are trained.")
    if options.bits is not None and recipe.lora is None:
        raise TrainingError(f"`model.bits` needs `lora`: {options.bits} bits cannot be trained themselves.")
    model: Any = MGLlavaForConditionalGeneration.from_pretrained(
        start,
        dtype=dtype,
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
        model = get_peft_model(model, lora_config(model, **{"modules_to_save": saved, **recipe.lora}))
    check_trained(model, recipe.train, lora=recipe.lora is not None)
    if (args.bf16 or args.fp16) and not (args.deepspeed or args.fsdp):
        # Small steps would be lost in 16 bits. DeepSpeed and FSDP keep 32 bits of their own.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _save(trainer: MGLlavaTrainer, options: ModelOptions, output: Path) -> None:
    """Save the result in the dtype of the recipe: what was trained in 32 bits may be in it."""
    model = trainer.model
    if isinstance(model, PreTrainedModel) and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        model.to(getattr(torch, options.dtype))
    trainer.save_model(str(output))


__all__ = ["load_model", "train", "training_arguments"]
