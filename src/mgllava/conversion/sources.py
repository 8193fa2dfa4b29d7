"""Checkpoints and the weights of the parts that complete them: language model, CLIP and open_clip."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.json_files import read_json
from mgllava.model_files.sources import fetch, fetch_weights
from mgllava.model_files.tensor_files import LazyTensor, open_safetensors, open_weights, tensors_of
from mgllava.model_files.torch_files import open_torch_file
from mgllava.modeling.vision_mgllava import trunk_sizes

from .key_mapping import CLIP_DROPS, CLIP_TO_MODEL, OPEN_CLIP_DROPS, OPEN_CLIP_TO_MODEL, drop_reason, rename

_TOWER = "model.high_res_vision_tower."
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass
class Source:
    """Tensors of one repository under the model's names.

    Args:
        tensors (`dict[str, LazyTensor]`): Tensors by the model's names.
        dropped (`dict[str, str]`): Names in the repository that have no use, and why.
        unexpected (`list[str]`): Names in the repository that no rule covers.
        files (`list[Path]`): The files read.
    """

    tensors: dict[str, LazyTensor]
    dropped: dict[str, str]
    unexpected: list[str]
    files: list[Path]


# What checkpoints of XTuner and of RAM++ are called, and the files of DeepSpeed, which lie in a folder.
_CHECKPOINT_ENDINGS = (".pth", ".pt")
_ZERO_ENDINGS = ("_model_states.pt", "_optim_states.pt")
_HUB_PATH = re.compile(
    r"(?:hf://|hf-hub:)?(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<path>[^@]+))?"
)


def fetch_checkpoint(name: str | Path, hint: str = "") -> Path:
    """Find a checkpoint on disk, or download it from the Hub.

    Args:
        name (`str` or `Path`): A file, a folder of DeepSpeed, or a Hub id: `owner/name`, or `owner/name/path` with
            the path of the checkpoint in the repository. A revision may follow the name: `owner/name@revision`.
        hint (`str`, *optional*, defaults to `""`): Words that are expected in the path of the checkpoint if there are
            several, separated by `-`: the name of a preset.

    Returns:
        `Path`: The file, or the folder.

    Raises:
        ConversionError: If there is neither such a path nor such a repository, or the repository has several
            checkpoints and it is not clear which is meant.
    """
    if str(name) and Path(name).exists():
        return Path(name)
    match = _HUB_PATH.fullmatch(str(name))
    inside = PurePosixPath(match["path"] or "") if match else PurePosixPath()
    if match is None or str(name).startswith(".") or ".." in inside.parts or inside.is_absolute():
        raise ConversionError(
            f"`checkpoint` must be a file, a folder or a Hub id (owner/name or owner/name/path), but {name} does not "
            "exist here and is not such an id."
        )
    repository, revision = match["repository"], match["revision"]
    files = _list_repository(repository, revision)
    if files is None and not inside.parts:
        # Not reachable: what was downloaded before is looked through.
        folder = fetch(repository, "checkpoint", [f"*{ending}" for ending in _CHECKPOINT_ENDINGS], revision)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if files is None:
        chosen = inside
    else:
        chosen = _choose_checkpoint(files, inside, f"{repository}{f'@{revision}' if revision else ''}", hint)
    if not chosen.parts:
        return fetch(repository, "checkpoint", ["*"], revision)
    patterns = [re.sub(r"([*?\[])", r"[\1]", text) for text in (str(chosen), f"{chosen}/")]
    found = fetch(repository, "checkpoint", [patterns[0], patterns[1] + "*"], revision) / chosen
    if not found.exists():
        raise ConversionError(f"`checkpoint`: {repository} has no {chosen}.")
    return found


def _list_repository(repository: str, revision: str | None) -> list[str] | None:
    """List the files of a repository; `None` if the Hub cannot be reached, or does not know it."""
    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings
    except Exception:  # the download that follows gives the reason, or finds the files in the cache
        return None
    return [entry.rfilename for entry in siblings or []]


def _choose_checkpoint(files: list[str], inside: PurePosixPath, repository: str, hint: str) -> PurePosixPath:
    paths = [PurePosixPath(file) for file in files]
    folders = {path.parent for path in paths if path.name.endswith(_ZERO_ENDINGS)}
    found = sorted(
        folders | {path for path in paths if path.suffix in _CHECKPOINT_ENDINGS and path.parent not in folders}
    )
    if inside in found or inside in paths:
        return inside
    under = [path for path in found if path.is_relative_to(inside)]
    words = hint.lower().split("-") if hint else []
    fitting = [path for path in under if words and all(word in str(path).lower() for word in words)]
    for candidates in (under, fitting):
        if len(candidates) == 1:
            return candidates[0]
    shown = fitting or under or found
    listed = "".join(f"\n  {repository}/{path}" for path in shown[:_LISTED])
    listed += f"\n  and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    if under:
        raise ConversionError(f"`checkpoint`: {repository} has several, so say which one is meant:{listed}")
    problem = f"has no checkpoint {inside}" if inside.parts else "has no checkpoint (.pth, .pt)"
    raise ConversionError(f"`checkpoint`: {repository} {problem}.{' It has:' if found else ''}{listed}")


_LISTED = 40


def language_model_weights(name: str | Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Open the weights of a language model, under the names that they have in XTuner checkpoints.

    Args:
        name (`str` or `Path`): Its folder or Hub id.

    Returns:
        `tuple[dict[str, LazyTensor], list[Path]]`: The tensors, and the files they come from.

    Raises:
        ConversionError: If a file is damaged or missing.
    """
    tensors, files = open_weights(fetch_weights(name, "llm"))
    return {f"llm.{key}": tensor for key, tensor in tensors.items()}, files


def clip_weights(name: str | Path) -> Source:
    """Open the weights of a CLIP vision tower.

    Args:
        name (`str` or `Path`): Folder or Hub id of a CLIP model or of its vision tower.

    Returns:
        `Source`: Its tensors.

    Raises:
        ConversionError: If a file is damaged or missing.
    """
    tensors, files = open_weights(fetch_weights(name, "vision_tower"))
    return _sort_out(tensors, CLIP_TO_MODEL, CLIP_DROPS, files)


@dataclass
class HighResTower:
    """The ConvNeXt of an open_clip repository.

    Args:
        architecture (`str`): Its name in timm.
        depths (`list[int]`): Blocks in each stage, as counted in the weights.
        hidden_sizes (`list[int]`): Channels of each stage, as found in the weights.
        source (`Source`): Its tensors.
    """

    architecture: str
    depths: list[int]
    hidden_sizes: list[int]
    source: Source


def open_high_res_tower(name: str | Path) -> HighResTower:
    """Open the ConvNeXt trunk of an open_clip model.

    Args:
        name (`str` or `Path`): A folder, a Hub id (with or without `hf-hub:`), or a name that open_clip resolves:
            `architecture` or `architecture:tag`, for example `convnext_large_d_320:laion2b_s29b_b131k_ft_soup`.

    Returns:
        `HighResTower`: The trunk.

    Raises:
        ConversionError: If it is not found or its trunk is no ConvNeXt.
    """
    folder = _open_clip_folder(name)
    config_path = folder / _OPEN_CLIP_CONFIG
    if not config_path.is_file():
        raise ConversionError(
            f"`high_res_tower`: {name} has no {_OPEN_CLIP_CONFIG}, so it is not an open_clip repository."
        )
    architecture: Any = read_json(config_path, "high_res_tower")
    for key in ("model_cfg", "vision_cfg", "timm_model_name"):
        architecture = architecture.get(key, "") if isinstance(architecture, dict) else ""
    if not isinstance(architecture, str) or not architecture.startswith("convnext"):
        raise ConversionError(
            f"`high_res_tower` must have a ConvNeXt of timm as its trunk, but {config_path} names {architecture!r}."
        )
    path = next((folder / file for file in _OPEN_CLIP_WEIGHTS if (folder / file).is_file()), None)
    if path is None:
        raise ConversionError(f"`high_res_tower`: {folder} has neither {' nor '.join(_OPEN_CLIP_WEIGHTS)}.")
    if path.suffix == ".safetensors":
        tensors = open_safetensors(path)
    else:
        content = open_torch_file(path)
        tensors = tensors_of(content.get("state_dict", content) if isinstance(content, dict) else content, path)
    source = _sort_out(tensors, OPEN_CLIP_TO_MODEL, OPEN_CLIP_DROPS, [path])
    # With a vector in the place of a kernel, or a block of a number beyond all others, no sizes can be read.
    shapes = {key.removeprefix(_TOWER): tensor.shape for key, tensor in source.tensors.items() if tensor.shape}
    depths, hidden_sizes = trunk_sizes(shapes)
    if stages := [stage for stage, depth in enumerate(depths) if depth == 0]:
        raise ConversionError(f"`high_res_tower`: {path} has no blocks of visual.trunk.stages.{stages[0]}.")
    if sum(depths) > len(shapes):
        raise ConversionError(f"`high_res_tower`: {path} names {sum(depths)} blocks, and has {len(shapes)} tensors.")
    return HighResTower(architecture, depths, hidden_sizes, source)


def _open_clip_folder(name: str | Path) -> Path:
    text = str(name).removeprefix("local-dir:").removeprefix("hf-hub:")
    if not Path(text).is_dir() and "/" not in text:
        text = _resolve_open_clip_name(text)
    folder = fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[0]])
    if Path(text).is_dir() or (folder / _OPEN_CLIP_WEIGHTS[0]).is_file():
        return folder
    return fetch(text, "high_res_tower", [_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS[1]])


def _resolve_open_clip_name(name: str) -> str:
    import open_clip

    architecture, _, tag = name.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        raise ConversionError(
            f"`high_res_tower` must be a folder, a Hub id or a model name of open_clip, but {name} is none of these."
        )
    if tag not in tags:
        raise ConversionError(
            f"`high_res_tower`: say which weights of {architecture} are meant: "
            f"{' or '.join(f'{architecture}:{one}' for one in tags)}; got {name}."
        )
    repository = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    if not repository:
        raise ConversionError(f"`high_res_tower`: the weights of {name} are not on the Hub; give a folder.")
    return "/".join(repository.split("/")[:2])


def _sort_out(
    tensors: dict[str, LazyTensor],
    rules: tuple[tuple[str, str], ...],
    drops: tuple[tuple[str, str], ...],
    files: list[Path],
) -> Source:
    source = Source({}, {}, [], files)
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        if (new_name := rename(name, rules)) is not None:
            if new_name in names:
                raise ConversionError(
                    f"{files[0].parent} has two tensors for one parameter: {names[new_name]} and {name}. Remove the "
                    "one that is not meant."
                )
            names[new_name] = name
            source.tensors[new_name] = tensor
        elif (reason := drop_reason(name, drops)) is not None:
            source.dropped[name] = reason
        else:
            source.unexpected.append(name)
    return source


__all__ = [
    "HighResTower",
    "Source",
    "clip_weights",
    "fetch_checkpoint",
    "language_model_weights",
    "open_high_res_tower",
]
