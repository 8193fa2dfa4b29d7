"""Select the trained parameters by name, check them, and print them as a table."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from torch import nn

from .errors import TrainingError


def part_of(name: str) -> str:
    """Return the part (`fusion`, `lm_head`, …) of a parameter, also in a model that peft or FSDP has wrapped."""
    return next(piece for piece in name.split(".") if piece not in ("module", "base_model", "model", "_orig_mod"))


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make the parameters that match a pattern trainable, and freeze all others.

    Args:
        model (`PreTrainedModel`): The model, with its heads.
        patterns (`Sequence[str]`): Names of modules, such as `fusion` or `language_model.layers.3*`, without the
            leading `model.`; `*` matches anything. The name of a module that this variant of the model lacks is
            ignored.

    Raises:
        TrainingError: If a pattern matches nothing.
    """
    inner: Any = model.model
    parts = {name for module in (model, inner) for name, _ in module.named_children()} - {"model"}
    absent = {name for name, value in vars(inner).items() if value is None}
    used = set()
    for name, parameter in model.named_parameters():
        short = name.removeprefix("model.")
        matching = [pattern for pattern in patterns if _matches(short, pattern)]
        parameter.requires_grad_(bool(matching))
        used.update(matching)
    for pattern in patterns:
        # A variant of the model may lack a module, or have one without parameters.
        if pattern not in used and pattern not in parts | absent:
            near = difflib.get_close_matches(pattern, sorted(parts))
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TrainingError(
                f"`train` must name modules of the model ({', '.join(sorted(parts))}), got {pattern!r}, "
                f"which matches no parameter.{hint}"
            )


def short_name(name: str) -> str:
    """Return the name of a parameter as `train` has it, also in a model that peft or DistributedDataParallel wrapped.

    Names of adapters keep their `lora_A` and the like.
    """
    wrappers = ("base_model", "modules_to_save", "module", "_orig_mod")
    short = ".".join(piece for piece in name.split(".") if piece not in wrappers).replace(".default.", ".")
    while short.startswith("model."):
        short = short.removeprefix("model.")
    return short


def matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that the name of a parameter matches, whatever wraps the model."""
    return next((pattern for pattern in patterns if _matches(short_name(name), pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def check_trained(model: nn.Module, patterns: Sequence[str], lora: bool = False) -> None:
    """Check that exactly the declared parameters are trained.

    Args:
        model (`torch.nn.Module`): The model that is passed to the trainer.
        patterns (`Sequence[str]`): See [`freeze_all_but`].
        lora (`bool`, *optional*, defaults to `False`): Whether adapters of the language model are trained instead of
            its own weights.

    Raises:
        TrainingError: If an undeclared parameter is trained, or a declared one is frozen.
    """
    wrong = []
    for name, parameter in model.named_parameters():
        short = short_name(name)
        if "original_module" in name:
            declared = False
        elif lora and short.startswith(("language_model.", "lm_head.")):
            declared = ".lora_" in name
        else:
            declared = any(_matches(short, pattern) for pattern in patterns)
        if declared != parameter.requires_grad:
            wrong.append(f"{name} ({'frozen' if declared else 'trained'})")
    if wrong:
        raise TrainingError(
            f"{len(wrong)} parameters differ from what `train` declares ({', '.join(patterns)}): "
            f"{', '.join(wrong[:5])}."
        )


def trained_parameters(model: nn.Module) -> list[tuple[str, int, int, str]]:
    """Return name, number of trained parameters, number of all parameters, and dtypes of each part."""
    counts: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        # A parameter that ZeRO-3 has sharded is empty here; a 4-bit one has two values in a byte.
        size = getattr(parameter, "ds_numel", parameter.numel())
        if (quantization := getattr(parameter, "quant_state", None)) is not None:
            size = quantization.shape.numel()
        count = counts.setdefault(part_of(name), [0, 0, {}])
        count[0] += size if parameter.requires_grad else 0
        count[1] += size
        count[2][str(parameter.dtype).removeprefix("torch.")] = None
    return [(name, trained, total, ", ".join(dtypes)) for name, (trained, total, dtypes) in counts.items()]


def describe_trained(model: nn.Module) -> Table:
    """Return a table of the trained parameters, with a row for each part of the model, and the sums.

    Args:
        model (`nn.Module`): A model, with or without adapters of PEFT.

    Returns:
        `rich.table.Table`: The table.
    """
    rows = trained_parameters(model)
    table = Table("part", "dtype", title="Trained parameters", show_footer=True)
    sums = (sum(trained for _, trained, _, _ in rows), sum(total for _, _, total, _ in rows))
    for heading, number in zip(("trained", "parameters"), sums, strict=True):
        table.add_column(heading, justify="right", footer=f"{number:,}")
    for name, trained, total, dtypes in rows:
        table.add_row(
            name, dtypes, f"{trained:,}" if trained else "-", f"{total:,}", style="bold" if trained else "dim"
        )
    return table


__all__ = [
    "check_trained",
    "describe_trained",
    "freeze_all_but",
    "matching_pattern",
    "part_of",
    "short_name",
    "trained_parameters",
]
