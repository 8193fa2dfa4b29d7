"""LoRA checkpoints: names of PEFT taken apart, low-rank updates merged into the base weights."""

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.tensor_files import LazyTensor

_WRAPPER = "llm.base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight$")


@dataclass
class LoraState:
    """The language model's tensors of a checkpoint, with PEFT's wrapping undone.

    Args:
        plain (`dict[str, LazyTensor]`): Tensors stored whole, as XTuner names them without LoRA.
        factors (`dict[str, dict[str, LazyTensor]]`): For each weight that has an update, its factors `"A"` and `"B"`.
        dropped (`dict[str, str]`): Names in the checkpoint that are not used, and why.
        has_base (`bool`): Whether the base weights are in the checkpoint as well.
    """

    plain: dict[str, LazyTensor] = field(default_factory=dict)
    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    has_base: bool = False


def split_lora(state: dict[str, LazyTensor]) -> LoraState:
    """Take PEFT's names apart.

    Args:
        state (`dict[str, LazyTensor]`): A checkpoint; names without PEFT's wrapping stay as they are.

    Returns:
        `LoraState`: Its parts.

    Raises:
        ConversionError: If two names belong to one tensor.
    """
    result = LoraState()
    keys: dict[str, str] = {}

    def add(name: str, key: str, tensor: LazyTensor) -> None:
        if name in keys:
            raise ConversionError(
                f"The checkpoint has two tensors for {name}: {keys[name]} and {key}. Remove the one that is not meant."
            )
        keys[name] = key
        result.plain[name] = tensor

    for key, tensor in state.items():
        if not key.startswith(_WRAPPER):
            add(key, key, tensor)
            continue
        name = "llm." + key[len(_WRAPPER) :]
        if match := _LOW_RANK.fullmatch(name):
            result.factors.setdefault(f"{match['module']}.weight", {})[match["factor"]] = tensor
        elif ".original_module." in name:
            result.dropped[key] = "replaced by the trained copy that PEFT keeps in modules_to_save"
        else:
            result.has_base |= ".base_layer." in name
            add(name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), key, tensor)
    return result


@dataclass(frozen=True)
class LoraSettings:
    """What a training config says about the LoRA of the language model.

    Args:
        alpha (`float`, *optional*): Its `lora_alpha`; `None` if the config does not say it, or two different ones.
        use_rslora (`bool`): Whether the update is rank-stabilized.
        alpha_pattern (`bool`): Whether modules have a `lora_alpha` of their own.
    """

    alpha: float | None = None
    use_rslora: bool = False
    alpha_pattern: bool = False


def read_lora_settings(config_text: str) -> LoraSettings:
    """Find the settings of LoRA in the text of a training config, which is parsed and never executed.

    Args:
        config_text (`str`): Python source as mmengine stores it in the checkpoint's meta.

    Returns:
        `LoraSettings`: Those of `llm_lora`; without it, those of the only LoRA that is not the vision encoder's.
    """
    tree = _parse(config_text)
    if tree is None:
        return LoraSettings()
    constants = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found = [(owner, items) for owner, items in _dictionaries(tree, ()) if _ABOUT_LORA & items.keys()]
    of_llm = [items for owner, items in found if any("llm" in name for name in owner)]
    # A variable that `llm_lora` names, or the only one that there is.
    others = [items for owner, items in found if not any("visual" in name or "llm" in name for name in owner)]
    chosen = of_llm or others

    def value(node: ast.expr | None) -> object:
        if isinstance(node, ast.Name):
            node = constants.get(node.id)
        try:
            return ast.literal_eval(node) if node is not None else None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None

    alphas = {value(items.get("lora_alpha")) for items in chosen if _is_number(value(items.get("lora_alpha")))}
    unclear = [items for items in chosen if "lora_alpha" in items and not _is_number(value(items["lora_alpha"]))]
    alpha = alphas.pop() if len(alphas) == 1 and not unclear else None
    return LoraSettings(
        float(alpha) if isinstance(alpha, int | float) else None,
        any(value(items.get("use_rslora")) is True for items in chosen),
        any(_is_filled(items.get("alpha_pattern"), value) for items in chosen),
    )


_ABOUT_LORA = {"lora_alpha", "use_rslora", "alpha_pattern"}


def _parse(text: str) -> ast.AST | None:
    # A config, or the arguments of one call.
    for source in (text, f"dict({text})"):
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
    return None


def _dictionaries(node: ast.AST, owner: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, ast.expr]]]:
    """List all calls with keywords, dicts, and the variables of the file, each with the names that it is bound to."""
    if isinstance(node, ast.Module):
        variables = [entry for entry in node.body if isinstance(entry, ast.Assign)]
        names = {entry.targets[0].id: entry.value for entry in variables if isinstance(entry.targets[0], ast.Name)}
        yield owner, names
        for name, value in names.items():
            yield from _dictionaries(value, (*owner, name))
        for statement in node.body:
            if isinstance(statement, ast.Expr):
                yield from _dictionaries(statement.value, owner)
        return
    items: dict[str, ast.expr] = {}
    if isinstance(node, ast.Call):
        items = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                items[key.value] = value
    if items:
        yield owner, items
    bound = {id(value) for value in items.values()}
    for name, value in items.items():
        yield from _dictionaries(value, (*owner, name))
    for child in ast.iter_child_nodes(node):
        if id(child) not in bound and not isinstance(child, ast.keyword):
            yield from _dictionaries(child, owner)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_filled(node: ast.expr | None, value: Callable[[ast.expr | None], object]) -> bool:
    if node is None:
        return False
    if isinstance(node, ast.Call):
        return bool(node.args or node.keywords)
    known = value(node)
    return bool(known) or not isinstance(node, ast.Constant | ast.Dict)


def check_lora_alpha(alpha: float | None) -> None:
    """Check what a user gives as `lora_alpha`.

    Args:
        alpha (`float`, *optional*): The value.

    Raises:
        ConversionError: If it is not a positive, finite number.
    """
    if alpha is not None and not _is_number(alpha):
        raise ConversionError(f"`lora_alpha` must be a positive number, got {alpha!r}.")


def lora_scaling(alpha: float | None, rank: int, config_text: str) -> float:
    """Compute the factor of the low-rank update.

    Args:
        alpha (`float`, *optional*): `lora_alpha` as the user gives it; else it is read from the config text.
        rank (`int`): Rank of the update.
        config_text (`str`): Text of the training config.

    Returns:
        `float`: `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilized LoRA.

    Raises:
        ConversionError: If `lora_alpha` is neither given nor found, is not a positive number, or differs between
            modules.
    """
    check_lora_alpha(alpha)
    settings = read_lora_settings(config_text)
    if settings.alpha_pattern:
        raise ConversionError(
            "The checkpoint was trained with `alpha_pattern` (a lora_alpha for each module), which is not supported. "
            "Merge the adapter with peft first."
        )
    if alpha is None:
        alpha = settings.alpha
    if alpha is None:
        raise ConversionError(
            "The checkpoint holds LoRA weights, and its config text does not say one `lora_alpha` for the language "
            "model. Pass --lora-alpha (lora_alpha=…), the value of the training config."
        )
    if rank < 1:
        raise ConversionError("The checkpoint has LoRA weights of rank 0.")
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def merge_lora(base: LazyTensor, low_a: LazyTensor, low_b: LazyTensor, scaling: float) -> LazyTensor:
    """Add a low-rank update to a weight: `W + scaling * B @ A`, computed in fp32, in the dtype of `W`.

    Args:
        base (`LazyTensor`): `W` of shape `(out, in)`.
        low_a (`LazyTensor`): `A` of shape `(rank, in)`.
        low_b (`LazyTensor`): `B` of shape `(out, rank)`.
        scaling (`float`): Factor of the update.

    Returns:
        `LazyTensor`: The merged weight.

    Raises:
        ConversionError: If the shapes do not fit.
    """
    if (
        len(low_a.shape) != 2
        or len(low_b.shape) != 2
        or (low_b.shape[0], low_a.shape[1]) != base.shape
        or low_a.shape[0] != low_b.shape[1]
    ):
        raise ConversionError(
            f"LoRA factors of shapes {low_b.shape} and {low_a.shape} ({low_a.origin}) do not fit the base weight "
            f"{base.origin} of shape {base.shape}. Is --llm the model that the adapter was trained on?"
        )

    def load() -> torch.Tensor:
        update = low_b.load().float() @ low_a.load().float()
        return base.load().float().add(update, alpha=scaling).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, f"{base.origin} + {scaling:g} * LoRA of {low_a.origin}", load)


__all__ = [
    "LoraSettings",
    "LoraState",
    "check_lora_alpha",
    "lora_scaling",
    "merge_lora",
    "read_lora_settings",
    "split_lora",
]
