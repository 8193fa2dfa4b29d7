"""Recipes: YAML that says what a training is made of."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .collator import MAX_TEXT_LENGTH
from .errors import TrainingError
from .values import WrongValueError, read_value

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
    """Reads `1e-3` as a number, and `no` as a word, as YAML 1.2 does, and refuses a key that occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary of a mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} occurs twice{node.start_mark}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

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
        TrainingError: If there is no such recipe, a key is unknown, or a value is not what its key takes: one line
            for each, with the nearest known key.
        ImportError: If the recipe has adapters and peft is not installed.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        text = str(argument)
        key, equals, value = text.partition("=")
        if equals and not key.endswith((".yaml", ".yml")):
            if not value.strip():
                raise TrainingError(f"`{text}` has no value. Write null for none, or leave it out for the default.")
            _merge(values, _nested(key.split("."), _parse(value, text)))
        else:
            _merge(values, _read(Path(text), None, ()))
    return _build(values)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise TrainingError(f"{where} is not YAML ({' '.join(str(error).split())}).") from error


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
# These may be null: there is none then.
_OPTIONAL = ("evaluation", "lora", "parts", "detector")


def checked_recipe(recipe: Recipe) -> Recipe:
    """Check the values of a recipe that was made in Python, and read them by the types of their fields.

    Args:
        recipe (`Recipe`): The recipe.

    Returns:
        `Recipe`: The recipe, of plain values.

    Raises:
        TrainingError: If a value is not what its field takes; one line for each such value.
        ImportError: If it has adapters and peft is not installed.
    """
    return _build(dataclasses.asdict(recipe))


def _build(values: dict[str, Any]) -> Recipe:
    problems: list[str] = []
    known = {**typing.get_type_hints(Recipe), **_SECTIONS}
    values = _read_fields(values, known, "", problems)
    for name, kind in _SECTIONS.items():
        if name in values:
            values[name] = _section(values[name], kind, name, problems)
    from transformers import TrainingArguments

    arguments: dict[str, type] = {"training": TrainingArguments}
    if values.get("lora") is not None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("`lora` needs peft: pip install 'mgllava[train]'.") from error
        arguments["lora"] = LoraConfig
    for name, kind in arguments.items():
        if name in values:
            values[name] = _read_fields(values[name], typing.get_type_hints(kind), name, problems)
    if problems:
        raise TrainingError("\n".join(problems))
    return Recipe(**values)


def _section(values: Any, kind: type, prefix: str, problems: list[str]) -> Any:
    if values is None and prefix.rpartition(".")[2] in _OPTIONAL:
        return None
    below = _SUBSECTIONS.get(kind, {})
    built = _read_fields(values, {**typing.get_type_hints(kind), **below}, prefix, problems)
    for name in below:
        if name in built:
            built[name] = _section(built[name], below[name], f"{prefix}.{name}", problems)
    return kind(**built)


def _read_fields(values: Any, types: Mapping[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """Read the values of a section by the types of its fields; sections in it are left for later."""
    if not isinstance(values, dict):
        problems.append(f"`{prefix}` must hold keys and values, got {values!r}.")
        return {}
    known = {name: kind for name, kind in types.items() if not name.startswith("_")}
    sections = {*_SECTIONS, *(name for below in _SUBSECTIONS.values() for name in below), "training", "lora"}
    read = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            path = f"{prefix}." if prefix else ""
            hint = f"Did you mean `{path}{near[0]}`?" if near else f"Known are {', '.join(sorted(known)[:20])}."
            problems.append(f"`{name}` is not a key of a recipe. {hint}")
        elif key in sections and prefix not in ("training", "lora"):
            read[key] = value
        else:
            try:
                read[key] = read_value(value, known[key], name)
            except WrongValueError as problem:
                problems.append(f"`{name}` {problem}" + "." * (not str(problem).endswith("?")))
    return read


__all__ = [
    "DataOptions",
    "DetectorOptions",
    "ModelOptions",
    "Parts",
    "Recipe",
    "checked_recipe",
    "load_recipe",
    "recipe_names",
]
