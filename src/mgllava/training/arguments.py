"""Build transformers' `TrainingArguments` from a recipe."""

import dataclasses
import logging
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments, get_scheduler

from .errors import TrainingError
from .recipe import Recipe

logger = logging.getLogger(__name__)

# A recipe must not set these to anything else.
_FIXED = {"remove_unused_columns": False, "label_names": ["labels"]}
# Only transformers' example scripts read these, `Trainer` does not; each with what to do instead.
_WITHOUT_EFFECT = {
    "do_eval": "Set `training.eval_strategy`.",
    "do_predict": "Remove it.",
    "do_train": "Remove it.",
    "resume_from_checkpoint": "Pass `resume` when you start the training.",
}
_DEFAULTS = {"ddp_find_unused_parameters": False, "report_to": "none"}


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Build the arguments of a training, with gradients accumulated to the recipe's `global_batch_size`."""
    given = {**_DEFAULTS, **recipe.training}
    if not given.get("output_dir"):
        raise TrainingError("`training.output_dir` must say where to write, e.g. training.output_dir=stage-1.")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise TrainingError(f"`training.{name}` must be {value}, got {given[name]}. Remove it.")
    for name, advice in _WITHOUT_EFFECT.items():
        if name in given:
            raise TrainingError(f"`training.{name}` has no effect here. {advice}")
    given |= _FIXED
    if recipe.evaluation is not None and recipe.evaluation.streaming:
        raise TrainingError("`evaluation.streaming` must be false: only `data` can be streamed.")
    evaluates = given.get("eval_strategy", "no") != "no" or bool(given.get("eval_on_start"))
    if evaluates and recipe.evaluation is None:
        raise TrainingError("`training.eval_strategy` needs samples to evaluate on: evaluation.samples=FILE.")
    if recipe.evaluation is not None and not evaluates:
        raise TrainingError(
            "`evaluation` would not be used: `training.eval_strategy` is no. Set it to steps or epoch, or write "
            "evaluation=null."
        )
    if recipe.global_batch_size is not None and given.get("auto_find_batch_size"):
        raise TrainingError("`training.auto_find_batch_size` would change `global_batch_size`. Remove one of them.")
    if given.get("dataloader_num_workers", 0) == 0:
        # PyTorch refuses these without workers, and the recipes of this package set them for their own workers.
        for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
            if given.pop(name, None):
                logger.warning("`training.%s` is ignored: there are no workers (dataloader_num_workers=0).", name)
    if recipe.data.streaming:
        # Otherwise accelerate would split a batch by rows, but `pixel_values` has another number of rows.
        given["accelerator_config"] = {**(given.get("accelerator_config") or {}), "dispatch_batches": False}
        if given.get("train_sampling_strategy", "random") == "group_by_length":
            raise TrainingError(
                "`data.streaming` must be false if `training.train_sampling_strategy` is group_by_length, because the "
                "lengths of a stream are not known. Set the strategy to sequential."
            )
    checkpointing = _rename_checkpointing(given)
    sharding = given.get("fsdp_config")
    if recipe.lora is not None and isinstance(sharding, dict) and sharding.get("activation_checkpointing"):
        # accelerate would wrap the modules that peft saves as a whole, and peft would not find their weights.
        given["fsdp_config"] = {**sharding, "activation_checkpointing": False}
        given[checkpointing] = True
    if recipe.global_batch_size is not None:
        given["gradient_accumulation_steps"] = _accumulation(recipe.global_batch_size, given)
    try:
        args = TrainingArguments(**given)
    except Exception as error:  # transformers raises errors of many types
        raise TrainingError(f"`training` cannot be used: {' '.join(str(error).split())}") from error
    _check_sharding(args)
    _check_optimizer(args)
    if args.n_gpu > 1:
        logger.warning("Using 1 of %d GPUs. To use all: accelerate launch -m mgllava train …", args.n_gpu)
        # DataParallel would split a batch by rows, but `pixel_values` has another number of rows.
        args._n_gpu = 1  # private, so the result is checked
        if args.n_gpu != 1:
            raise RuntimeError(
                "This release of transformers uses all GPUs in one process, which is not supported here. Start with "
                "`accelerate launch -m mgllava train …`."
            )
    return args


def _rename_checkpointing(given: dict[str, Any]) -> str:
    """Rename activation checkpointing to its name in the installed release of transformers, and return that name."""
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if new not in {entry.name for entry in dataclasses.fields(TrainingArguments)}:
        return old
    if old in given:
        value = given.pop(old)
        if given.setdefault(new, value) != value:
            raise TrainingError(
                f"`training.{old}` and `training.{new}` are two names of one option, got {value} and {given[new]}. "
                f"Set `training.{old}` only, as the recipes of this package do."
            )
    return new


def _check_sharding(args: TrainingArguments) -> None:
    """Refuse FSDP in the cases in which accelerate would silently train without it."""
    state = PartialState()
    # `accelerate launch` requests it with a variable.
    wanted = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        processes = f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device.type}"
        raise TrainingError(
            f"`training.fsdp` needs several processes with a GPU each, got {processes}: nothing would be sharded. "
            "Start with `accelerate launch -m mgllava train …`, or remove `training.fsdp` (fsdp2.yaml)."
        )


def _check_optimizer(args: TrainingArguments) -> None:
    """Check, before the model is loaded, that the optimizer and the schedule accept their options."""
    try:
        optimizer: Any = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        # Other optimizers cannot be built without the model.
        if args.optim.startswith("adamw_torch"):
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
    """Return the number of batches that make a step of `global_batch_size` samples on any number of devices."""
    if "gradient_accumulation_steps" in given:
        raise TrainingError("Give either `global_batch_size` or `training.gradient_accumulation_steps`.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_a_time = processes * int(given.get("per_device_train_batch_size", 8))
    if global_batch_size % at_a_time:
        raise TrainingError(
            f"`global_batch_size` must be a multiple of {at_a_time} (processes: {processes}, times "
            f"`training.per_device_train_batch_size`), got {global_batch_size}."
        )
    return global_batch_size // at_a_time


__all__ = ["training_arguments"]
