"""Where the parts of a box detector are on disk and on the Hub, and how they are stored with the processor.

`box_detector_config` of a processor holds plain values. A part is named by a repository id, by a folder, or by
`./box_detector/NAME`: a folder inside the repository that the processor itself is in.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

BUNDLE_FOLDER = "box_detector"
PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"
PARTS = ("tagger", "detector")


@dataclass(frozen=True)
class ProcessorRepository:
    """The folder or the repository on the Hub that a processor was loaded from.

    Args:
        name (`str`): Folder or repository id.
        revision (`str`, *optional*): Of the repository.
        hub_options (`dict`, *optional*): How repositories are read: `cache_dir`, `token`, `local_files_only`, ...
        trust_remote_code (`bool`): Whether code of repositories may run.
    """

    name: str
    revision: str | None = None
    hub_options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


def bundled_name(part: str) -> str:
    """Name a part as one that is stored with the processor."""
    return f"./{BUNDLE_FOLDER}/{part}"


def is_bundled(source: str) -> bool:
    """Tell whether a part is stored with the processor."""
    return source.startswith("./")


def locate(source: str, repository: ProcessorRepository | None) -> str:
    """Find a part.

    Args:
        source (`str`): A repository id, a folder, or a path in the processor's repository that starts with `./`.
        repository ([`ProcessorRepository`], *optional*): Where the processor came from.

    Returns:
        `str`: A repository id or an existing path. Parts in a repository on the Hub are downloaded.

    Raises:
        ValueError: If the path leaves the repository, or there is no repository to look in.
        FileNotFoundError: If the repository has no such path.
    """
    if not is_bundled(source):
        return source
    inside = PurePosixPath(source)
    if ".." in inside.parts:
        raise ValueError(f"`box_detector_config` must name paths inside the repository, got {source!r}.")
    if repository is None:
        raise ValueError(
            f"`box_detector_config` names {source!r} in the processor's repository, but this processor was not loaded "
            "from one: its detector was given as objects, which pickling leaves out. Save the processor and load it, "
            "or set `processor.box_detector`, or pass `boxes`."
        )
    root = Path(repository.name)
    if not root.is_dir():
        # Remote code of a part is only found at the top of a folder, so its files are fetched as one.
        patterns = [str(inside), f"{inside}/*"]
        options = {name: value for name, value in repository.hub_options.items() if value is not None}
        root = Path(
            snapshot_download(repository.name, revision=repository.revision, allow_patterns=patterns, **options)
        )
    if not (root / inside).exists():
        raise FileNotFoundError(
            f"`box_detector_config` names {source!r}, but {repository.name!r} has no such file or folder. Copy it "
            "there, or set `processor.box_detector_config` to None."
        )
    return str(root / inside)


def store_parts(
    config: Mapping[str, Any],
    save_directory: str | os.PathLike,
    repository: ProcessorRepository | None,
    objects: Mapping[str, tuple[Any, Any]],
) -> dict[str, Any]:
    """Store the parts that are no repository ids in `save_directory/box_detector`.

    Args:
        config (`Mapping`): A box detector's configuration.
        save_directory (`str` or `os.PathLike`): The processor's new repository.
        repository ([`ProcessorRepository`], *optional*): Where paths that start with `./` are.
        objects (`Mapping`): Model and processor of the parts that exist in memory only, by the part's name.

    Returns:
        `dict`: The configuration, with the stored parts named `./box_detector/...`.
    """
    stored = dict(config)
    bundle = Path(save_directory) / BUNDLE_FOLDER
    for part in PARTS:
        source = config.get(part)
        if part in objects:
            with _Replacement(bundle / part) as folder:
                for saved in objects[part]:
                    saved.save_pretrained(folder)
        elif isinstance(source, str) and (is_bundled(source) or os.path.isdir(source)):
            # Copied, not saved from memory, where its weights may have been rounded.
            _copy(Path(locate(source, repository)), bundle / part)
        else:
            continue
        stored[part] = bundled_name(part)
    if config.get("prompt_embeds"):
        _copy(Path(locate(config["prompt_embeds"], repository)), bundle / PROMPT_EMBEDS_FILE)
        stored["prompt_embeds"] = bundled_name(PROMPT_EMBEDS_FILE)
    return stored


def _copy(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    with _Replacement(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(".git", ".cache"))
        else:
            shutil.copyfile(source, temporary)


class _Replacement:
    """A path to write to that takes its final name when everything is written."""

    def __init__(self, target: Path):
        self.target, self.temporary = target, target.with_name(f".{target.name}.incomplete")

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _remove(self.temporary)
        return self.temporary

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            _remove(self.target)
            os.replace(self.temporary, self.target)
        else:
            _remove(self.temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
