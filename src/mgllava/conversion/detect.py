"""Find a checkpoint and its source format."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mgllava.families import FAMILIES, resolve
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.staging import read_model_type
from mgllava.model_files.torch_files import open_torch_file

from .fetch import fetch_checkpoint
from .source_format import SourceFormat

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def source_formats() -> list[SourceFormat]:
    """List the source formats of all families."""
    return [resolve(name) for family in FAMILIES.values() for name in family.source_formats]


def prompt_templates() -> list[str]:
    """List the names of the chat templates of all families."""
    tables = [resolve(family.chat_templates) for family in FAMILIES.values() if family.chat_templates]
    return sorted({name for templates in tables for name in templates})


def presets() -> dict[str, Mapping[str, str]]:
    """Return the presets of all source formats."""
    return {name: arguments for one in source_formats() for name, arguments in one.presets.items()}


def find_source(
    checkpoint: str | Path, formats: Sequence[SourceFormat], options: Mapping[str, Any], trust_pickle: bool
) -> tuple[Path, SourceFormat]:
    """Find or download a checkpoint, and return its path and its format."""

    def check(fitting: Sequence[SourceFormat], folder: Path | None) -> None:
        convertible = [one for one in fitting if options.keys() >= set(one.needs)]
        if folder is not None and not any(one.recognizes(folder) for one in fitting):
            raise ConversionError(_unknown(folder, formats, trust_pickle))
        if len(convertible) == 1:
            _check_options(convertible[0], f"{checkpoint} can only be {convertible[0].title}", options)

    if not Path(checkpoint).exists():
        check([one for one in formats if one.find([PurePosixPath(checkpoint)])], None)
    path = fetch_checkpoint(checkpoint, formats, options, check)
    if not path.is_file() and not path.is_dir():
        raise ConversionError(f"`checkpoint` must be a file or a folder, but {path} is neither.")
    if len(formats) == 1:  # its reader reports what is wrong with other checkpoints
        _check_options(formats[0], f"{path} is read as {formats[0].title}", options)
        return path, formats[0]
    for source_format in formats:
        if (found := source_format.recognizes(path)) is not None:
            _check_options(source_format, f"{path} is {found}", options)
            return path, source_format
    raise ConversionError(_unknown(path, formats, trust_pickle))


def _check_options(source_format: SourceFormat, found: str, options: Mapping[str, Any]) -> None:
    if not options.keys() >= set(source_format.needs):
        raise ConversionError(f"`checkpoint`: {found}, which `{source_format.convert}` converts.")
    missing = [f"`{name}`" for name in source_format.needs if options[name] is None]
    if missing:
        raise ConversionError(
            f"`checkpoint`: {found}, whose conversion needs {', '.join(missing)}. {source_format.advice}".rstrip()
        )
    accepted = {*source_format.needs, *source_format.takes}
    refused = [f"`{name}`" for name, value in options.items() if value is not None and name not in accepted]
    if refused:
        raise ConversionError(f"`checkpoint`: {found}, whose conversion does not take {', '.join(refused)}.")


def tensor_names(path: Path) -> list[str] | None:
    """List the names in a torch file, under `state_dict` or `model` if it has either; `None` for other files."""
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix not in _TORCH_SUFFIXES and start not in (b"PK", b"\x80\x02"):
        return None
    # Objects in the file become placeholders. Whether they are accepted is decided where the tensors are read.
    content = open_torch_file(path, trust_pickle=True)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return [name for name in content if isinstance(name, str)] if isinstance(content, dict) else []


def _unknown(path: Path, formats: Sequence[SourceFormat], trust_pickle: bool) -> str:
    """Describe a path that no format recognizes: what was looked for, and what it holds."""
    model_type = read_model_type(path) if path.is_dir() else None
    if model_type in FAMILIES:
        return f"`checkpoint`: {path} is a model folder of this package already. Load it with `from_pretrained`."
    if model_type is not None and model_type.startswith("llava"):
        return (
            f"`checkpoint`: {path} is a LLaVA model (model type {model_type!r}), which this package does not convert. "
            "transformers loads LLaVA itself from the repositories of llava-hf, such as llava-hf/llava-1.5-7b-hf, "
            "with `LlavaForConditionalGeneration`."
        )
    looked_for = "".join(f"\n  {one.title}: {one.looked_for}" for one in formats)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        holds = f"the folder holds {', '.join(names[:10]) or 'nothing'}" + (" and more" if len(names) > 10 else "")
        if model_type is not None:
            holds += f", with model type {model_type!r}"
    else:
        found = tensor_names(path)
        if found is None:
            holds = "it is not a file of `torch.save`"
        else:
            content = open_torch_file(path, trust_pickle)  # raises for pickled objects, which may hide the weights
            listed = ", ".join(found[:5]) or f"a {type(content).__name__}"
            holds = f"it holds {listed}" + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return f"`checkpoint`: {path} is not a checkpoint that can be converted: {holds}. Looked for:{looked_for}"


__all__ = ["find_source", "presets", "prompt_templates", "source_formats", "tensor_names"]
