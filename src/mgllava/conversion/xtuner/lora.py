"""LoRA in XTuner checkpoints: the names of PEFT, and the settings in the text of the training config."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mgllava.conversion.lora import check_lora_alpha, is_positive_number, scaling_of
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor

_WRAPPER = "llm.base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight$")


@dataclass
class LoraState:
    """The language model's tensors of a checkpoint, with PEFT's wrapping undone.

    Attributes:
        plain: Tensors that are not LoRA factors, by XTuner's names without LoRA.
        factors: For each weight with an update, its factors `"A"` and `"B"`.
        dropped: Unused names in the checkpoint, with reasons.
        has_base: Whether the checkpoint holds the base weights.
    """

    plain: dict[str, LazyTensor] = field(default_factory=dict)
    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    has_base: bool = False


def split_lora(state: dict[str, LazyTensor]) -> LoraState:
    """Sort the tensors of a language model by PEFT's names; other names are kept."""
    result = LoraState()
    keys: dict[str, str] = {}

    def add(name: str, key: str, tensor: LazyTensor) -> None:
        if name in keys:
            raise ConversionError(
                f"The checkpoint has two tensors for {name}: {keys[name]} and {key}. Remove one of them."
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
    """LoRA settings of the language model in a training config.

    Attributes:
        alpha: `lora_alpha`; `None` if the config has none, or several different ones.
        use_rslora: Whether the update is rank-stabilized.
        alpha_pattern: Whether some modules have a `lora_alpha` of their own.
    """

    alpha: float | None = None
    use_rslora: bool = False
    alpha_pattern: bool = False


def read_lora_settings(config_text: str) -> LoraSettings:
    """Read the settings of `llm_lora`, or of the only LoRA that is not the vision encoder's.

    The text is Python source, which is parsed and never executed.
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
    # LoRA settings that are not written inside `llm_lora`, such as a variable that it refers to.
    others = [items for owner, items in found if not any("visual" in name or "llm" in name for name in owner)]
    chosen = of_llm or others

    def value(node: ast.expr | None) -> object:
        if isinstance(node, ast.Name):
            node = constants.get(node.id)
        try:
            return ast.literal_eval(node) if node is not None else None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None

    alphas = {value(items.get("lora_alpha")) for items in chosen if is_positive_number(value(items.get("lora_alpha")))}
    unclear = [
        items for items in chosen if "lora_alpha" in items and not is_positive_number(value(items["lora_alpha"]))
    ]
    alpha = alphas.pop() if len(alphas) == 1 and not unclear else None
    return LoraSettings(
        float(alpha) if isinstance(alpha, int | float) else None,
        any(value(items.get("use_rslora")) is True for items in chosen),
        any(_is_filled(items["alpha_pattern"]) for items in chosen if "alpha_pattern" in items),
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
    """List the variables of the file, all calls with keywords and all dicts, each with the names it is bound to."""
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


def _is_filled(node: ast.expr) -> bool:
    """Tell whether a dictionary has entries; also if it cannot be read without running the text."""
    if isinstance(node, ast.Call):
        return bool(node.args or node.keywords)
    return bool(node.keys) if isinstance(node, ast.Dict) else not isinstance(node, ast.Constant) or bool(node.value)


def lora_scaling(alpha: float | None, rank: int, config_text: str) -> float:
    """Compute the factor of the update; without `alpha`, it is read from the text of the training config."""
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
            "model. Pass `lora_alpha`, the value of the training config."
        )
    return scaling_of(alpha, rank, settings.use_rslora)


__all__ = ["LoraSettings", "LoraState", "lora_scaling", "read_lora_settings", "split_lora"]
