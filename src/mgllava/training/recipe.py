"""Recipes: YAML files that describe a training."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from mgllava.extras import import_extra
from mgllava.families import FAMILIES, resolve

from .errors import TrainingError
from .samples import BadSamples, MissingBoxes
from .values import WrongValueError, read_value

# The family of a new model that is built from parts.
DEFAULT_FAMILY = "mgllava"


@dataclass
class ModelOptions:
    """The model to start from: a model folder or Hub id (`name`), or `parts` that a new one is built from."""

    name: str | None = None
    # The family of the new model; None: MG-LLaVA. If `name` is given, its family is compared with this.
    family: str | None = None
    # The parts of the family (folders or Hub ids), `prompt_template`, and `config` (arguments of its configuration).
    parts: dict[str, Any] | None = None
    # Changes to the configuration of the model that is loaded.
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    # 4 or 8: the language model is quantized (QLoRA).
    bits: int | None = None


@dataclass
class DetectorOptions:
    """The box detector that must have found the boxes; fields are named like the options of `mgllava detect`."""

    tagger: str | None = None
    detector: str | None = None
    labels: list[str] | None = None
    mode: Literal["faithful", "clean"] = "faithful"
    threshold: float = 0.2


@dataclass
class DataOptions:
    """Samples, images, videos and boxes; each may be a list, and entries at the same position belong together."""

    samples: str | list[str] | None = None
    images: str | list[str] | None = None
    # None: the folder of the images.
    videos: str | list[str] | None = None
    boxes: str | list[str] | None = None
    # None: the box detector of the model's processor.
    detector: DetectorOptions | None = None
    allow_other_boxes: bool = False
    missing_boxes: MissingBoxes = "error"
    on_bad_sample: BadSamples = "error"
    # None: the limit of the model family.
    max_text_length: int | None = None
    # Frames that are sampled from each video; None: as many as the model's processor samples.
    num_frames: int | None = None
    # Name of the chat template that renders the samples; None: that of the model's processor, which is saved anyway.
    prompt_template: str | None = None
    # Learn nothing from samples whose answers the original loses, as it does.
    original_labels: bool = False
    streaming: bool = False
    # Processes that tokenize the samples before training starts.
    processes: int | None = None


@dataclass
class Recipe:
    """The settings of a training.

    Attributes:
        model: The model to start from.
        train: Modules that are trained.
        data: Samples to train on.
        evaluation: Samples to evaluate on.
        lora: Arguments of `peft.LoraConfig`; `None` for no adapters.
        learning_rates: Learning rates of modules, by names as in `train`; all others have `training.learning_rate`.
        global_batch_size: Samples of a step over all devices; gradients are accumulated to it.
        training: Arguments of `transformers.TrainingArguments`.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    train: list[str] = field(default_factory=list)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: DataOptions | None = None
    lora: dict[str, Any] | None = None
    learning_rates: dict[str, float] | None = None
    global_batch_size: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML, with the recipes that it extends and all changes."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Read `1e-3` as a number and `no` as text, as YAML 1.2 does, and refuse a key that occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a dictionary from a node."""
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
    """List the file names of the recipes of this package."""
    return sorted(entry.name for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def _shipped() -> Any:
    return resources.files("mgllava.training") / "recipes"


def load_recipe(*arguments: str | Path) -> Recipe:
    """Read a recipe from files and changes.

    Args:
        *arguments (`str` or `Path`): YAML files, names of the package's recipes, and changes `key=value`, such as
            `training.learning_rate=1e-5`; later ones win.

    Returns:
        `Recipe`: The recipe.

    Raises:
        TrainingError: If a file does not exist, a key is unknown, or a value does not fit its key. The message has one
            line for each such key.
        ImportError: If the recipe has adapters and peft is not installed.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        text = str(argument)
        key, equals, value = text.partition("=")
        if equals and not key.endswith((".yaml", ".yml")):
            if not value.strip():
                raise TrainingError(f"`{text}` has no value. Write null for none, or remove it for the default.")
            merge(values, _nested(key.split("."), _parse(value, text)))
        else:
            merge(values, _read(Path(text), None, ()))
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


def _read(path: Path, folder: Path | None, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read a file and those that it extends; a name is looked up in `folder`, the working directory and the package.

    `chain` has the names of the files that extend this one.
    """
    candidates = [path] if folder is None else [folder / path, path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    shipped = _shipped() / path.name
    if found is None and path.name == str(path) and shipped.is_file():
        text, folder = shipped.read_text(encoding="utf-8"), None
    elif found is not None:
        text, folder = found.read_text(encoding="utf-8"), found.parent
    else:
        near = difflib.get_close_matches(path.name, recipe_names())
        raise TrainingError(
            f"There is no recipe {path}. The package has {', '.join(near or recipe_names())}"
            f"{' and others' if near else ''}; a change is written key=value."
        )
    if str(path) in chain:
        raise TrainingError(f"Recipes extend each other: {' -> '.join([*chain, str(path)])}.")
    content = _parse(text, str(path)) or {}
    if not isinstance(content, dict):
        raise TrainingError(f"{path} must contain keys and values, got {type(content).__name__}.")
    extended = content.pop("extends", [])
    values: dict[str, Any] = {}
    for name in [extended] if isinstance(extended, str) else extended:
        merge(values, _read(Path(name), folder, (*chain, str(path))))
    merge(values, content)
    return values


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change nested values in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


_SECTIONS: dict[str, type] = {"model": ModelOptions, "data": DataOptions, "evaluation": DataOptions}
# Nested sections, each read by a function of its own after the section that contains it.
_READ_LATER = {
    "": {*_SECTIONS, "training", "lora"},
    "model": {"parts"},
    "data": {"detector"},
    "evaluation": {"detector"},
}


def checked_recipe(recipe: Recipe) -> Recipe:
    """Check a recipe that was made in Python, and convert its values to the types of their fields."""
    return _build(dataclasses.asdict(recipe))


def _build(values: dict[str, Any]) -> Recipe:
    problems: list[str] = []
    values = _read_fields(values, typing.get_type_hints(Recipe), "", problems)
    for name, kind in _SECTIONS.items():
        if name in values:
            values[name] = _section(values[name], kind, name, problems)
    from transformers import TrainingArguments

    arguments: dict[str, type] = {"training": TrainingArguments}
    if values.get("lora") is not None:
        arguments["lora"] = import_extra("peft", "train", "`lora`").LoraConfig
    for name, kind in arguments.items():
        if name in values:
            values[name] = _read_fields(values[name], typing.get_type_hints(kind), name, problems)
    if problems:
        raise TrainingError("\n".join(problems))
    return Recipe(**values)


def _section(values: Any, kind: type, prefix: str, problems: list[str]) -> Any:
    if values is None and prefix in ("evaluation", "data.detector", "evaluation.detector"):
        return None
    known = typing.get_type_hints(kind)
    if kind is ModelOptions:
        families = tuple(name for name, family in FAMILIES.items() if family.build)
        known["family"] = Literal[families] | None
    built = _read_fields(values, known, prefix, problems)
    if kind is DataOptions and "detector" in built:
        built["detector"] = _section(built["detector"], DetectorOptions, f"{prefix}.detector", problems)
    if built.get("parts") is not None:
        built["parts"] = _read_parts(built["parts"], built.get("family") or DEFAULT_FAMILY, problems)
    return kind(**built)


def _read_parts(values: Any, family_name: str, problems: list[str]) -> dict[str, Any]:
    """Read `model.parts`, the parts of a new model of a family; missing ones are `None`."""
    family = FAMILIES[family_name]
    templates = tuple(resolve(str(family.chat_templates)))
    types: dict[str, Any] = dict.fromkeys(family.parts, str | None)
    types |= {"prompt_template": Literal[templates] | None, "config": dict[str, Any]}
    if isinstance(values, dict):
        others = {part for other in FAMILIES.values() for part in other.parts} - types.keys()
        for name in sorted(others & values.keys()):
            problems.append(
                f"`model.parts.{name}` is not a part of {family.title}, which is built from "
                f"{' and '.join(family.parts)}. Remove it, or set `model.family`."
            )
        values = {name: value for name, value in values.items() if name not in others}
    return {**dict.fromkeys(types), "config": {}, **_read_fields(values, types, "model.parts", problems)}


def _read_fields(values: Any, types: Mapping[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """Convert the values of a section to the types of its fields; nested sections are returned unchanged."""
    if not isinstance(values, dict):
        problems.append(f"`{prefix}` must contain keys and values, got {values!r}.")
        return {}
    known = {name: kind for name, kind in types.items() if not name.startswith("_")}
    read = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, cutoff=0.5)
            path = f"{prefix}." if prefix else ""
            hint = f"Did you mean `{path}{near[0]}`?" if near else f"Known keys: {', '.join(sorted(known)[:20])}."
            problems.append(f"`{name}` is not a recipe key. {hint}")
        elif key in _READ_LATER.get(prefix, ()):
            read[key] = value
        else:
            try:
                read[key] = read_value(value, known[key], name)
            except WrongValueError as problem:
                problems.append(f"`{name}` {problem}" + "." * (not str(problem).endswith("?")))
    return read


__all__ = [
    "DEFAULT_FAMILY",
    "DataOptions",
    "DetectorOptions",
    "ModelOptions",
    "Recipe",
    "checked_recipe",
    "load_recipe",
    "merge",
    "recipe_names",
]
