"""Recipes: YAML that says what a training is made of."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .collator import MAX_TEXT_LENGTH
from .errors import TrainingError

_EXTENDS = "extends"


@dataclass
class Parts:
    """The trained parts that a model is put together from: folders or Hub ids."""

    llm: str | None = None
    vision_tower: str | None = None
    high_res_tower: str | None = None
    # vicuna, llama3, phi3 or yi
    prompt_template: str | None = None
    # Arguments of MGLlavaConfig, such as fusion_type.
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelOptions:
    """The model to start from: a repository (`name`), or `parts`."""

    name: str | None = None
    parts: Parts | None = None
    dtype: str = "bfloat16"
    attn_implementation: str | None = None
    # 4 or 8: the language model is quantized (QLoRA).
    bits: int | None = None


@dataclass
class DetectorOptions:
    """The detector that must have made the boxes, in the words of `mgllava detect`."""

    tagger: str | None = None
    detector: str | None = None
    labels: list[str] | None = None
    mode: str = "faithful"
    threshold: float = 0.2


@dataclass
class DataOptions:
    """Samples, images and boxes; each may be a list, of files that belong together by their position."""

    samples: str | list[str] | None = None
    images: str | list[str] | None = None
    boxes: str | list[str] | None = None
    # None: the one of the model's processor.
    detector: DetectorOptions | None = None
    allow_other_boxes: bool = False
    missing_boxes: str = "error"
    on_bad_sample: str = "error"
    max_text_length: int = MAX_TEXT_LENGTH
    streaming: bool = False
    # Processes that read and tokenize before the training starts.
    processes: int | None = None


@dataclass
class Recipe:
    """Everything that a training is made of.

    Args:
        model (`ModelOptions`): What to start from.
        train (`list[str]`): Modules that are trained.
        data (`DataOptions`): What to learn.
        evaluation (`DataOptions`, *optional*): What to evaluate on.
        lora (`dict`, *optional*): Arguments of `peft.LoraConfig`; `None`: no adapters.
        global_batch_size (`int`, *optional*): Samples of a step over all devices: accumulation follows from it.
        training (`dict`): Arguments of `transformers.TrainingArguments`.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    train: list[str] = field(default_factory=list)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: DataOptions | None = None
    lora: dict[str, Any] | None = None
    global_batch_size: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Write the recipe as it was put together."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number, and `no` as a word, as YAML 1.2 does."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def recipe_names() -> list[str]:
    """List the recipes that the package has.

    Returns:
        `list[str]`: File names.
    """
    return sorted(entry.name for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def _shipped() -> Any:
    return resources.files("mgllava.training") / "recipes"


def load_recipe(*arguments: str | Path) -> Recipe:
    """Read recipes and changes to them.

    Args:
        *arguments (`str` or `Path`): YAML files, files of the package by their names, and changes `key=value`, such as
            `training.learning_rate=1e-5`; later ones win.

    Returns:
        `Recipe`: The recipe.

    Raises:
        TrainingError: If there is no such recipe, or a key is unknown; the message names the nearest known one.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        text = str(argument)
        key, equals, value = text.partition("=")
        if equals and not key.endswith((".yaml", ".yml")):
            _merge(values, _nested(key.split("."), _parse(value, text)))
        else:
            _merge(values, _read(Path(text), None, ()))
    return _build(values)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise TrainingError(f"{where} is no YAML ({error}).") from error


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    result: dict[str, Any] = value
    return result


def _read(path: Path, beside: Path | None, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read a file with those that it extends; a name is looked for beside it, here, and in the package."""
    candidates = [path] if beside is None else [beside / path, path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    shipped = _shipped() / path.name
    if found is None and path.name == str(path) and shipped.is_file():
        text, folder = shipped.read_text(encoding="utf-8"), None
    elif found is not None:
        text, folder = found.read_text(encoding="utf-8"), found.parent
    else:
        near = difflib.get_close_matches(path.name, recipe_names(), n=3)
        raise TrainingError(
            f"There is no recipe {path}. The package has {', '.join(near or recipe_names())}"
            f"{' and others' if near else ''}; a change is written key=value."
        )
    if str(path) in chain:
        raise TrainingError(f"Recipes extend each other: {' -> '.join([*chain, str(path)])}.")
    content = _parse(text, str(path)) or {}
    if not isinstance(content, dict):
        raise TrainingError(f"{path} must hold keys and values, got {type(content).__name__}.")
    extended = content.pop(_EXTENDS, [])
    values: dict[str, Any] = {}
    for name in [extended] if isinstance(extended, str) else extended:
        _merge(values, _read(Path(name), folder, (*chain, str(path))))
    _merge(values, content)
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


_SECTIONS: dict[str, type] = {"model": ModelOptions, "data": DataOptions, "evaluation": DataOptions}
_SUBSECTIONS: dict[type, dict[str, type]] = {
    ModelOptions: {"parts": Parts},
    DataOptions: {"detector": DetectorOptions},
}


def _build(values: dict[str, Any]) -> Recipe:
    _check_keys(values, _fields(Recipe), "")
    for name, kind in _SECTIONS.items():
        if values.get(name) is not None:
            values[name] = _section(values[name], kind, f"{name}.")
    from transformers import TrainingArguments

    _check_keys(values.get("training") or {}, _fields(TrainingArguments), "training.")
    if values.get("lora") is not None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("`lora` needs peft: pip install 'mgllava[train]'.") from error
        _check_keys(values["lora"], _fields(LoraConfig), "lora.")
    return Recipe(**values)


def _section(values: Any, kind: type, prefix: str) -> Any:
    _check_keys(values, _fields(kind), prefix)
    built = {}
    for name, value in values.items():
        below = _SUBSECTIONS.get(kind, {}).get(name)
        built[name] = value if below is None or value is None else _section(value, below, f"{prefix}{name}.")
    return kind(**built)


def _fields(kind: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]


def _check_keys(values: Any, known: Sequence[str], prefix: str) -> None:
    if not isinstance(values, dict):
        raise TrainingError(f"`{prefix.rstrip('.')}` must hold keys and values, got {values!r}.")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean `{prefix}{near[0]}`?" if near else f"Known are {', '.join(sorted(known)[:20])}."
            raise TrainingError(f"`{prefix}{key}` is no key of a recipe. {hint}")


__all__ = ["DataOptions", "DetectorOptions", "ModelOptions", "Parts", "Recipe", "load_recipe", "recipe_names"]
