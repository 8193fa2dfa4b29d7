"""The record of a training in its output folder: the recipe, a digest of the samples, and whether it finished."""

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgllava.atomic_files import replacing
from mgllava.errors import shorten

from .errors import TrainingError
from .recipe import Recipe, load_recipe

RECIPE = "recipe.yaml"
RUN = "run.json"
# The result is saved in this folder and moved up when it is complete. `Trainer` does not upload names that start
# with `_`.
PARTIAL = "_saving.incomplete"
_RESUMED = "# Resumed from "

# Keys that may change when a training is resumed, because they do not affect what is learned.
_HARMLESS = (
    "data.allow_other_boxes",
    "data.processes",
    "evaluation*",
    "training.activation_checkpointing*",
    "training.dataloader_in_order",
    "training.dataloader_multiprocessing_context",
    "training.dataloader_num_workers",
    "training.dataloader_persistent_workers",
    "training.dataloader_pin_memory",
    "training.dataloader_prefetch_factor",
    "training.ddp_timeout",
    "training.disable_tqdm",
    "training.eval_*",
    "training.gradient_checkpointing*",
    "training.hub_*",
    "training.include_num_input_tokens_seen",
    "training.log_*",
    "training.logging_*",
    "training.output_dir",
    "training.per_device_eval_batch_size",
    "training.project",
    "training.push_to_hub",
    "training.report_to",
    "training.run_name",
    "training.save_*",
    "training.skip_memory_metrics",
    "training.torch_empty_cache_steps",
    "training.trackio_*",
)
# These may change if the learning rate is constant; other schedules depend on the length of the training.
_LENGTH = ("training.max_steps", "training.num_train_epochs")
# This may change if `global_batch_size` is given, because batches of any size are accumulated to it.
_MICRO_BATCH = "training.per_device_train_batch_size"
# What a training that was killed before its first checkpoint may leave.
_LEFT_BY_A_START = ("start", "start.incomplete", "start.lock", RECIPE, RUN, PARTIAL, "runs")


def refuse_other_files(output: Path) -> None:
    """Refuse an output folder that contains anything but what an earlier start of a training left."""
    if output.exists() and not output.is_dir():
        raise TrainingError(f"`training.output_dir`: {output} is a file. Choose another folder.")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [
        name
        for name in names
        if not (name in _LEFT_BY_A_START or name.endswith(".partial") or fnmatch.fnmatch(name, "checkpoint-*"))
    ]
    if others:
        what = "a finished training" if _read_run(output).get("finished") else "other files"
        raise TrainingError(
            f"`training.output_dir`: {output} contains {what} ({', '.join(others[:3])}{', …' * (len(others) > 3)}), "
            "which would be overwritten. Choose another folder, or move these files."
        )


def check_same_training(recipe: Recipe, samples: str | None, output: Path, checkpoint: str) -> list[str]:
    """Refuse to resume a training with another recipe or other samples, and return the differences that do not matter.

    `samples` is the digest of the samples, or `None` if they are streamed. A difference is a line such as
    `training.logging_steps: 10 -> 1`.
    """
    try:
        before = _flat(load_recipe(output / RECIPE))
    except (TrainingError, OSError) as error:
        raise TrainingError(
            f"The training in {output} cannot be resumed, because its recipe cannot be read: {error}"
        ) from error
    now = _flat(recipe)
    harmless = list(_HARMLESS)
    if before.get("training.lr_scheduler_type") == now.get("training.lr_scheduler_type") == "constant":
        harmless += _LENGTH
    if before.get("global_batch_size") == now.get("global_batch_size") is not None:
        harmless.append(_MICRO_BATCH)
    allowed: list[str] = []
    refused: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            may_change = any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
            difference = f"{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}"
            (allowed if may_change else refused).append(difference)
    known = _read_run(output).get("samples")
    if known is not None and samples is not None and known != samples:
        refused.append("the contents of the files of samples or boxes")
    if refused:
        raise TrainingError(
            f"`resume`: {output / checkpoint} was trained with another recipe: {'; '.join(refused)}. Resume with the "
            f"old values (all of them are in {output / RECIPE}), or start in another `training.output_dir`."
        )
    return allowed


def write_start(recipe: Recipe, samples: str | None, output: Path, resumed: str | None, changes: list[str]) -> None:
    """Write the recipe and the digest of the samples, and how a resumed training differs from its first start."""
    path, comments = output / RECIPE, []
    if resumed is not None:
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(_RESUMED)]
        comments.append(f"{_RESUMED}{resumed}{', with ' + '; '.join(changes) if changes else ''}")
    with replacing(path) as partial:
        partial.write_text("\n".join([*comments, recipe.to_yaml()]), encoding="utf-8")
    _write_run(output, {"samples": samples})


def write_end(output: Path, steps: int) -> None:
    """Record that a training finished and that everything is saved."""
    _write_run(output, {**_read_run(output), "finished": True, "steps": steps})


def samples_digest(samples: str, files: list[Path]) -> str:
    """Return the SHA-256, in hexadecimal, of the digest of the samples and the contents of the box files."""
    content = hashlib.sha256(json.dumps([samples]).encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def same_parts(start: Path, parts: Mapping[str, Any]) -> bool:
    """Return whether the model in a folder was built from these parts."""
    try:
        noted = json.loads((start / "parts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted == json.loads(json.dumps(parts)))


def note_parts(start: Path, parts: Mapping[str, Any]) -> None:
    """Record the parts that the model in a folder was built from."""
    with replacing(start / "parts.json") as partial:
        partial.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")


def _read_run(output: Path) -> dict[str, Any]:
    try:
        content = json.loads((output / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_run(output: Path, content: dict[str, Any]) -> None:
    with replacing(output / RUN) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe by their dotted names, with the defaults of the keys that it does not set."""
    from transformers import TrainingArguments

    values = dataclasses.asdict(recipe)
    values["training"] = {**_defaults(TrainingArguments), **values["training"]}
    if values["lora"] is not None:
        from peft import LoraConfig

        values["lora"] = {**_defaults(LoraConfig), **values["lora"]}
    flat: dict[str, Any] = {}

    def flatten(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                flatten(below, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = value

    flatten(values, "")
    return flat


def _defaults(kind: Any) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    return {field.name: getattr(field.default, "value", field.default) for field in fields}


def _shown(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


__all__ = [
    "PARTIAL",
    "RECIPE",
    "check_same_training",
    "note_parts",
    "refuse_other_files",
    "same_parts",
    "samples_digest",
    "write_end",
    "write_start",
]
