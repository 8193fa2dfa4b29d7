"""The model of a recipe: build or find the one to start from, load it, and select what is trained."""

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments

from mgllava.families import FAMILIES, Family, family_of, resolve
from mgllava.quantization import quantization_of

from .errors import TrainingError
from .lora import has_parameters, lora_config
from .recipe import DEFAULT_FAMILY, ModelOptions, Recipe, merge
from .run_record import note_parts, same_parts
from .starting_model import write_starting_model
from .trainable import check_trained, freeze_all_but, matching_pattern, part_of

# Folder of the starting model in the output.
START = "start"


def starting_model(options: ModelOptions, args: TrainingArguments, output: Path) -> str:
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
    start = output / START
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


def family_of_recipe(options: ModelOptions, start: str) -> Family:
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
            near = difflib.get_close_matches(name, values)
            raise TrainingError(
                f"`model.config.{name}` is not in the configuration of {start}."
                + (f" Did you mean `model.config.{near[0]}`?" if near else "")
            )
    merge(values, changes)
    try:
        return kind.from_dict(values)
    except Exception as error:  # configurations raise errors of many types
        raise TrainingError(f"`model.config` cannot be used: {' '.join(str(error).split())}") from error


__all__ = ["START", "family_of_recipe", "load_model", "starting_model"]
