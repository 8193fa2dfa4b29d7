"""Train from a recipe: load the model and the samples that it names, train, and save the result."""

import copy
import difflib
import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, PreTrainedModel, TrainingArguments, set_seed

from mgllava.box_files import detection_settings, open_detector
from mgllava.families import FAMILIES, Family, family_of, resolve, takes_boxes, takes_videos
from mgllava.folder_lock import FolderLock
from mgllava.quantization import quantization_of

from .arguments import training_arguments
from .checkpoints import last_complete_checkpoint
from .collator import MGLlavaDataCollator
from .dataset import ConversationDataset, SampleSource, open_source, stream_samples
from .errors import TrainingError
from .lora import has_parameters, lora_config
from .loss_plot import plot_losses
from .recipe import DEFAULT_FAMILY, DataOptions, DetectorOptions, ModelOptions, Recipe, checked_recipe, merge
from .run_record import (
    PARTIAL,
    check_same_training,
    note_parts,
    refuse_other_files,
    same_parts,
    samples_digest,
    write_end,
    write_start,
)
from .samples import frames_of_a_video, labels_of
from .starting_model import write_starting_model
from .trainable import check_trained, describe_trained, freeze_all_but, matching_pattern, part_of
from .trainer import MGLlavaTrainer

logger = logging.getLogger(__name__)

_START = "start"


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
    if checkpoint is None and recipe.model.parts is not None and not (output / _START).is_dir():
        refuse_other_files(output)  # before the starting model is written there
    set_seed(args.seed)
    start = _starting_model(recipe.model, args, output)
    family = _family(recipe.model, start)
    processor = resolve(str(family.processor)).from_pretrained(start)
    if takes_boxes(processor):
        processor.box_detector = None  # boxes come from files
    else:
        _refuse_boxes(recipe, family)
    if recipe.data.num_frames is not None:  # saved with the model
        _sample_frames(processor, recipe.data.num_frames, family, "data")
    data_processor = _with_template(processor, recipe.data, family, "data")
    data = _open_data(recipe.data, data_processor, args, "data")
    evaluation = eval_processor = None
    if recipe.evaluation is not None:
        eval_processor = _with_template(processor, recipe.evaluation, family, "evaluation")
        if recipe.evaluation.num_frames is not None:
            eval_processor = copy.copy(eval_processor)
            _sample_frames(eval_processor, recipe.evaluation.num_frames, family, "evaluation")
        evaluation = _open_data(recipe.evaluation, eval_processor, args, "evaluation")
    if checkpoint is None:
        refuse_other_files(output)
    samples = _samples_digest(recipe, data)
    changes: list[str] = []
    if checkpoint is not None:
        changes = check_same_training(recipe, samples, output, checkpoint.name)
    _name_detector(processor, recipe.data.detector)
    model = load_model(recipe, start, args, family)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        trainer = MGLlavaTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=evaluation,
            data_collator=_collator(recipe.data, data_processor, positions),
            eval_data_collator=recipe.evaluation and _collator(recipe.evaluation, eval_processor, positions),
            processing_class=processor,
            learning_rates=recipe.learning_rates,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # For example, a package that `report_to` names is not installed.
        raise TrainingError(f"`training` cannot be used: {error}") from error
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise TrainingError("`training.deepspeed` was ignored by accelerate. Start with `accelerate launch`.")
    if args.should_log:
        console = Console(file=sys.stderr)
        console.print(describe_trained(model))
        if recipe.model.config:
            values = ", ".join(f"{name}={value}" for name, value in recipe.model.config.items())
            console.print(f"Set in the model's configuration, and saved with the result: {values}")
    if isinstance(data, ConversationDataset) and len(trainer.get_train_dataloader()) == 0:
        raise TrainingError(
            f"Nothing would be trained: {len(data)} samples do not fill a batch of {args.train_batch_size} for each "
            "process, and `training.dataloader_drop_last` is true."
        )
    if args.should_save:
        write_start(recipe, samples, output, None if checkpoint is None else checkpoint.name, changes)
    result = trainer.train(str(checkpoint) if checkpoint is not None else None)
    if trainer.state.global_step == 0:
        raise TrainingError("Nothing was trained: no sample was read, so there was no step.")
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


def _starting_model(options: ModelOptions, args: TrainingArguments, output: Path) -> str:
    """Return the folder or Hub id of the model to start from; if the recipe names parts, build it first."""
    if (options.name is None) == (options.parts is None):
        raise TrainingError(
            "Set either `model.name`, the model folder or Hub id of the model to start from, or `model.parts`."
        )
    if options.parts is None:
        return str(options.name)
    family = options.family or DEFAULT_FAMILY
    given = {name: value for name, value in options.parts.items() if name != "config"}
    if missing := [
        f"`model.parts.{name}`" for name in (*FAMILIES[family].parts, "prompt_template") if not given[name]
    ]:
        raise TrainingError(f"{', '.join(missing)} must be given.")
    start = output / _START
    described = {**options.parts, "dtype": options.dtype}
    with args.main_process_first(local=not args.save_on_each_node, desc="building the starting model"):
        if not start.is_dir():
            dtype = getattr(torch, options.dtype)
            write_starting_model(start, family=family, dtype=dtype, **given, **options.parts["config"])
            note_parts(start, described)
    if not same_parts(start, described):
        raise TrainingError(
            f"`model.parts`: {start} was built from other or unknown parts. Delete it, or choose another "
            "`training.output_dir`."
        )
    return str(start)


def _family(options: ModelOptions, start: str) -> Family:
    """Return the family of the model to start from."""
    if Path(start, "adapter_config.json").exists() and not Path(start, "config.json").exists():
        raise TrainingError(
            f"`model.name`: {start} has only adapters. Merge them into their model and save it (see LoRA in "
            "docs/training.md)."
        )
    config = AutoConfig.from_pretrained(start, trust_remote_code=False)
    try:
        family = family_of(config)
    except ValueError as error:
        raise TrainingError(f"`model.name`: {start} cannot be trained. {error}") from error
    wanted = options.family or (None if options.parts is None else DEFAULT_FAMILY)
    if wanted not in (None, config.model_type):
        raise TrainingError(f"`model.family` must be {config.model_type}, that of {start}, got {wanted}.")
    return family


def _refuse_boxes(recipe: Recipe, family: Family) -> None:
    """Refuse settings of boxes for a model that takes none."""
    for section, options in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        for name in ("boxes", "detector", "allow_other_boxes", "missing_boxes"):
            if options is not None and getattr(options, name) != getattr(DataOptions, name):
                raise TrainingError(f"`{section}.{name}` must not be set: {family.title} takes no boxes.")


def _with_template(processor: Any, options: DataOptions, family: Family, section: str) -> Any:
    """Return a processor that renders samples by the template of the recipe; the given one is saved with the model."""
    if options.prompt_template is None:
        return processor
    templates = resolve(family.chat_templates) if family.chat_templates else {}
    if options.prompt_template not in templates:
        raise TrainingError(
            f"`{section}.prompt_template` must be null or a template of {family.title} ({', '.join(templates)}), got "
            f"{options.prompt_template!r}."
        )
    processor = copy.copy(processor)
    processor.chat_template = templates[options.prompt_template]
    return processor


def _samples_digest(recipe: Recipe, data: Any) -> str | None:
    """Return a digest of samples and boxes, so that a resumed training notices if the files have changed."""
    if not isinstance(data, ConversationDataset):
        return None  # a stream is read only once
    return samples_digest(data.digest, [Path(path) for path in _as_list(recipe.data.boxes)])


def _sample_frames(processor: Any, num_frames: int, family: Family, section: str) -> None:
    """Make a processor sample as many frames as the recipe says."""
    if not takes_videos(processor):
        raise TrainingError(f"`{section}.num_frames` must not be set: this model of {family.title} takes no videos.")
    processor.video_processor = copy.copy(processor.video_processor)
    processor.video_processor.num_frames, processor.video_processor.fps = num_frames, None


def _collator(options: DataOptions, processor: Any, max_length: int | None) -> MGLlavaDataCollator:
    return MGLlavaDataCollator(
        processor,
        options.max_text_length,
        on_bad_sample=options.on_bad_sample,  # type: ignore[arg-type]  # checked
        missing_boxes=options.missing_boxes,  # type: ignore[arg-type]  # checked
        return_sample_ids=True,
        original_labels=options.original_labels,
        max_length=max_length,
    )


def _name_detector(processor: Any, given: DetectorOptions | None) -> None:
    """Give the processor the box detector that the recipe names, so that it is saved with the model."""
    if given is None or (given.tagger is None and given.labels is None):
        return  # the processor keeps its own
    tagger, labels = given.tagger, given.labels
    named = open_detector(detector=given.detector, tagger=None if labels else tagger, mode=given.mode)
    processor.box_detector_config = {**named.config, **({"tagger": list(labels)} if labels else {})}
    processor.box_detector = None  # it does not run here
    if given.threshold != DetectorOptions.threshold:
        logger.warning(
            "The boxes were found with a threshold of %s, which cannot be saved with the processor: pass threshold=%s "
            "to `processor.detect`.",
            given.threshold,
            given.threshold,
        )


def _open_data(options: DataOptions, processor: Any, args: TrainingArguments, section: str) -> Any:
    given = (options.samples, options.images, options.boxes, options.videos)
    samples, images, boxes, videos = map(_as_list, given)
    if not samples:
        raise TrainingError(f"`{section}.samples` must name a file of samples, e.g. {section}.samples=llava.json.")
    for name, values in (("images", images), ("boxes", boxes), ("videos", videos)):
        if values and len(values) not in (1, len(samples)):
            raise TrainingError(
                f"`{section}.{name}` must have one entry, or one for each of {len(samples)} files, got {len(values)}."
            )
    sources = [
        open_source(path, _at(images, number), _at(boxes, number), _at(videos, number), section=section)
        for number, path in enumerate(samples)
    ]
    _check_detector(options, processor, sources, section)
    try:
        labels_of(processor, must_be_known=options.original_labels)
    except ValueError as error:
        raise TrainingError(f"`{section}`: {error}") from error
    if options.streaming:
        if args.max_steps <= 0:
            raise TrainingError("`training.max_steps` must be given if `data.streaming` is true.")
        return stream_samples(sources, frames_of_a_video(processor))
    with args.main_process_first(desc="measuring samples"):
        return ConversationDataset(
            sources,
            processor,
            options.max_text_length,
            options.on_bad_sample,  # type: ignore[arg-type]  # checked
            options.missing_boxes,  # type: ignore[arg-type]  # checked
            options.processes,
            options.original_labels,
        )


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _at(values: list[str], number: int) -> str | None:
    return None if not values else values[number] if len(values) > 1 else values[0]


def _check_detector(options: DataOptions, processor: Any, sources: list[SampleSource], section: str) -> None:
    """Refuse boxes that were not found by the detector with which the model will be used."""
    files = [source.boxes for source in sources if source.boxes is not None]
    if options.allow_other_boxes or not files:
        return
    given = options.detector
    if given is not None and given.tagger is None and given.labels is None:
        raise TrainingError(
            f"`{section}.detector.tagger` must be the tagger with which {files[0].name} was made: the model folder of "
            f"RAM++, or coco80. `{section}.allow_other_boxes=true` accepts any boxes."
        )
    config = processor.locate_box_detector()
    if given is not None:
        config = open_detector(detector=given.detector, tagger=given.tagger, mode=given.mode).config
    if config is None:
        raise TrainingError(
            f"`{section}.detector` must name the box detector that made {files[0].name}, because the model has none. "
            f"`{section}.allow_other_boxes=true` accepts any boxes."
        )
    labels, threshold = (None, 0.2) if given is None else (given.labels, given.threshold)
    for file in files:
        # Files with boxes of videos say how their frames were sampled.
        num_frames = frames_of_a_video(processor) if "frames" in (file.settings or ()) else None
        expected = detection_settings(config, labels, threshold, num_frames=num_frames)
        try:
            file.check_settings(expected)
        except ValueError as error:
            raise TrainingError(
                f"{error} In a recipe, `{section}.allow_other_boxes=true` accepts any boxes."
            ) from error


def load_model(recipe: Recipe, start: str, args: TrainingArguments, family: Family) -> Any:
    """Load the model of a recipe, add its adapters, and select the trained parameters.

    Under ZeRO-3, `args` must exist before the model is loaded: they make `from_pretrained` shard the weights.
    """
    options = recipe.model
    if not recipe.train:
        raise TrainingError("`train` must name the modules that are trained.")
    if options.bits is not None and recipe.lora is None:
        raise TrainingError(f"`model.bits` needs `lora`: weights in {options.bits} bits cannot be trained.")
    given: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    if options.attn_implementation is not None:
        given["attn_implementation"] = options.attn_implementation
    if options.bits is not None:
        given["quantization_config"] = quantization_of(options.bits)
    kind = resolve(family.model)
    model: Any
    if options.config:
        config = _changed_config(options.config, start, family)
        try:
            model, loaded = kind.from_pretrained(start, config=config, output_loading_info=True, **given)
        except RuntimeError as error:  # of other shapes
            raise TrainingError(
                f"`model.config` does not fit the weights of {start}: {' '.join(str(error).split())}"
            ) from error
        if unfit := sorted([*loaded["missing_keys"], *loaded["unexpected_keys"]]):
            raise TrainingError(
                f"`model.config` does not fit the weights of {start}: {len(unfit)} weights are missing or unused, "
                f"such as {unfit[0]}. Change only values on which no weights depend."
            )
    else:
        model = kind.from_pretrained(start, **given)
    freeze_all_but(model, recipe.train)
    if recipe.lora is not None:
        from peft import get_peft_model

        if whole := [name for name in recipe.train if part_of(name) in ("language_model", "lm_head")]:
            raise TrainingError(
                f"`train` must not name {', '.join(whole)} if `lora` is given: adapters are trained instead."
            )
        saved = [name for name in recipe.train if has_parameters(model, name)]
        try:
            model = get_peft_model(model, lora_config(model, **{"modules_to_save": saved, **recipe.lora}))
        except Exception as error:  # peft raises errors of many types
            raise TrainingError(f"`lora` cannot be used: {' '.join(str(error).split())}") from error
    check_trained(model, recipe.train, lora=recipe.lora is not None)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in recipe.learning_rates or ():
        if not any(matching_pattern(name, [pattern]) for name in trained):
            raise TrainingError(f"`learning_rates.{pattern}` matches no parameter that is trained.")
    if (args.bf16 or args.fp16) and not (args.deepspeed or args.fsdp):
        # Small updates would be lost in 16 bits. DeepSpeed and FSDP keep a float32 copy themselves.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _changed_config(changes: dict[str, Any], start: str, family: Family) -> Any:
    """Change the configuration of the model to start from as the recipe says."""
    kind = resolve(family.config)
    values = kind.from_pretrained(start).to_dict()
    for name in changes:
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            raise TrainingError(
                f"`model.config.{name}` is not in the configuration of {start}."
                + f" Did you mean `model.config.{near[0]}`?" * len(near)
            )
    merge(values, changes)
    try:
        return kind.from_dict(values)
    except Exception as error:  # configurations raise errors of many types
        raise TrainingError(f"`model.config` cannot be used: {' '.join(str(error).split())}") from error


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


__all__ = ["load_model", "train"]
