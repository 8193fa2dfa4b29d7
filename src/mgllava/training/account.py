"""The record in a training's folder: its recipe and samples, and whether it finished."""

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgllava.atomic_files import replacing

from .errors import TrainingError
from .recipe import Recipe, load_recipe

RECIPE = "recipe.yaml"
RUN = "run.json"
# The result is written here and moved when it is complete. `Trainer` does not upload names that start with `_`.
PARTIAL = "_saving.incomplete"
_RESUMED = "# Resumed from "

# These may change when a training is resumed, because what is learned does not depend on them.
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
# The learning rates depend on the length of a training, unless they are constant.
_LENGTH = ("training.max_steps", "training.num_train_epochs")
# If `global_batch_size` is given, batches of any size are accumulated to it.
_MICRO_BATCH = "training.per_device_train_batch_size"
_LEFT_BY_A_START = ("start", "start.incomplete", "start.lock", RECIPE, RUN, PARTIAL, "runs")


def refuse_other_files(output: Path) -> None:
    """Refuse a folder that has more in it than a training leaves before its first checkpoint."""
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
            f"`training.output_dir`: {output} holds {what} ({', '.join(others[:3])}{', …' * (len(others) > 3)}), "
            "which would be overwritten. Choose another folder, or move these."
        )


def check_same_training(recipe: Recipe, samples: str | None, output: Path, checkpoint: str) -> list[str]:
    """Refuse to resume a training by another recipe, or with other samples.

    `samples` is their digest, `None` if it is not known. The result lists the differences that do not matter, such as
    `training.logging_steps: 10 -> 1`.
    """
    try:
        before = _flat(load_recipe(output / RECIPE))
    except (TrainingError, OSError) as error:
        raise TrainingError(
            f"{output} cannot be resumed, because the recipe that it was run with cannot be read: {error}"
        ) from error
    now = _flat(recipe)
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    harmless = list(_HARMLESS)
    if before.get("training.lr_scheduler_type") == now.get("training.lr_scheduler_type") == "constant":
        harmless += _LENGTH
    if before.get("global_batch_size") == now.get("global_batch_size") is not None:
        harmless.append(_MICRO_BATCH)
    described = {name: f"{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}" for name in changed}
    matter = [name for name in changed if not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)]
    found = [described[name] for name in matter]
    known = _read_run(output).get("samples")
    if known is not None and samples is not None and known != samples:
        found.append("the contents of the files of samples or boxes")
    if found:
        raise TrainingError(
            f"`resume`: {output / checkpoint} was trained by another recipe: {'; '.join(found)}. Resume with the old "
            f"values ({output / RECIPE} has them all), or start in another `training.output_dir`."
        )
    return [described[name] for name in changed if name not in matter]


def write_start(recipe: Recipe, samples: str | None, output: Path, resumed: str | None, changes: list[str]) -> None:
    """Record what a training is run with, and the checkpoint that it is resumed from, with changes of the recipe."""
    path, comments = output / RECIPE, []
    if resumed is not None:
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(_RESUMED)]
        comments.append(f"{_RESUMED}{resumed}{', with ' + '; '.join(changes) if changes else ''}")
    with replacing(path) as partial:
        partial.write_text("\n".join([*comments, recipe.to_yaml()]), encoding="utf-8")
    _write_run(output, {"samples": samples, "finished": False})


def write_end(output: Path, steps: int) -> None:
    """Record that a training finished and that everything is saved."""
    _write_run(output, {**_read_run(output), "finished": True, "steps": steps})


def samples_digest(samples: str, files: list[Path]) -> str:
    """Return the SHA-256, in hexadecimal, of the digest of samples and of box files."""
    content = hashlib.sha256(json.dumps([samples]).encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def same_parts(start: Path, parts: Mapping[str, Any]) -> bool:
    """Tell whether the model in a folder was built from these parts."""
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
    """Return the values of a recipe by their dotted names, with defaults for what it does not set."""
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
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


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
