"""The parts of a box detector on disk and on the Hub, and how they are stored with the processor.

`box_detector_config` of a processor holds plain values. A part is named by a repository id (with a revision), by a
folder, or by `./box_detector/NAME`: a folder inside the model folder or model repository of the processor, which is
called its repository here. Only a user may name other folders: a `processor_config.json` never reaches outside its own
repository.
"""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

BUNDLE_FOLDER = "box_detector"
PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"
PARTS = ("tagger", "detector")


@dataclass(frozen=True)
class ProcessorRepository:
    """The folder or the repository on the Hub that a processor was loaded from.

    Attributes:
        name: Folder or repository id.
        revision: Branch, tag or commit of the repository.
        hub_options: How repositories are read: `cache_dir`, `token`, `local_files_only`, `force_download`.
        trust_remote_code: Whether code of repositories may run.
        subfolder: The processor's folder inside the repository; paths that start with `./` start there.
        written_config: The `box_detector_config` that its file holds, as opposed to what the user set later.
    """

    name: str
    revision: str | None = None
    hub_options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    subfolder: str = ""
    written_config: Mapping[str, Any] | None = None

    def wrote(self, key: str, value: Any) -> bool:
        """Tell whether a value of the configuration comes from the repository's file."""
        written = self.written_config or {}
        return key in written and written[key] == value


def bundled_name(part: str) -> str:
    """Return the name of a part that is stored with the processor."""
    return f"./{BUNDLE_FOLDER}/{part}"


def is_bundled(source: str) -> bool:
    """Tell whether a part is stored with the processor."""
    return source.startswith("./")


def known_commit(
    repo_id: str, revision: str | None, cache_dir: str | os.PathLike | None = None, file: str = "config.json"
) -> str | None:
    """Return the commit of a revision, if the local cache has this file of it."""
    folder = None if cache_dir is None else os.fspath(cache_dir)
    path = try_to_load_from_cache(repo_id, file, cache_dir=folder, revision=revision)
    return Path(path).parents[len(PurePosixPath(file).parts) - 1].name if isinstance(path, str) else None


def locate(key: str, source: str, repository: ProcessorRepository | None) -> str:
    """Return the repository id or the existing path that a value of a box detector's configuration names.

    `source` is a repository id, a path in the processor's repository that starts with `./`, or, if the user set it, a
    folder. Parts in a repository on the Hub are downloaded. A value from the repository's file that leaves the
    repository, by its path or by a link, is refused.
    """
    if not is_bundled(source):
        if repository is not None and repository.wrote(key, source):
            _check_repository_id(key, source, repository)
        return source
    inside = PurePosixPath(source)
    if ".." in inside.parts or not inside.parts or inside.is_absolute() or any(mark in source for mark in "\\:\0"):
        raise ValueError(
            f"`box_detector_config` must name paths inside the repository, got {key!r}: {source!r}. Name a folder "
            f"like {bundled_name(key)!r}."
        )
    if repository is None:
        raise ValueError(
            f"`box_detector_config` names {source!r} in the processor's repository, but this processor was not loaded "
            "from one. Save the processor and load it, or set `processor.box_detector`, or pass `boxes`."
        )
    inside = PurePosixPath(repository.subfolder) / inside
    root = Path(repository.name)
    if not root.is_dir():
        # transformers finds custom code only at the top of a folder, so the part is downloaded as a folder.
        root = _download(repository, [str(inside), f"{inside}/*"])
    check_links(root / inside, root)
    if not (root / inside).exists():
        raise FileNotFoundError(
            f"`box_detector_config` names {source!r}, but {repository.name!r} has no such file or folder. Copy it "
            "there, or set `processor.box_detector_config` to None."
        )
    return str(root / inside)


def _download(repository: ProcessorRepository, patterns: list[str]) -> Path:
    """Download some files; if that fails, use the cached ones."""
    options = {name: value for name, value in repository.hub_options.items() if value is not None}
    options.update(revision=repository.revision, allow_patterns=patterns)
    try:
        return Path(snapshot_download(repository.name, **options))
    # Without a connection, some releases of huggingface_hub ask the Hub even if the revision is a commit, and fail
    # with the errors of their HTTP library.
    except Exception as error:
        if options.get("local_files_only") or options.get("force_download"):
            raise
        options["local_files_only"] = True
        try:
            return Path(snapshot_download(repository.name, **options))
        except LocalEntryNotFoundError:
            raise error from None


def check_revision(key: str, revision: Any) -> None:
    """Refuse what is not a revision, since it becomes a part of paths in the cache."""
    is_name = isinstance(revision, str) and bool(revision) and revision[0] not in "/~"
    if revision is not None and (not is_name or ".." in revision or "\\" in revision):
        raise ValueError(f"`{key}` must be a branch, a tag or a commit of a repository on the Hub, got {revision!r}.")


def _check_repository_id(key: str, source: str, repository: ProcessorRepository) -> None:
    """Refuse a value of a downloaded configuration that is not a repository id, or that names a local path."""
    advice = (
        f"A configuration from {repository.name!r} may name a repository on the Hub or a path inside its own "
        f"repository (like {bundled_name(key)!r}). To use a folder of yours, set `processor.box_detector_config` or "
        "`processor.box_detector` in Python."
    )
    try:
        if key not in PARTS:
            raise HFValidationError("it must be a file of the repository")
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(
            f"`box_detector_config` has {key!r}: {source!r}, which is refused: {error}. {advice}"
        ) from error
    if os.path.lexists(source):
        raise ValueError(
            f"`box_detector_config` has {key!r}: {source!r}, which is refused: there is a local file or folder of "
            f"this name, which would be read instead of the repository on the Hub. {advice}"
        )


def check_links(path: Path, root: Path) -> None:
    """Refuse a file or folder with links that lead out of a repository.

    In the cache of the Hub, files are links to `blobs/` next to the snapshots.
    """
    allowed = [root.resolve()]
    for parent in root.absolute().parents:
        if parent.name == "snapshots" and not (blobs := parent.parent / "blobs").is_symlink():
            allowed.append(blobs.resolve())
    for entry in [path, *path.rglob("*")]:
        try:
            target = entry.resolve()
            is_inside = any(target.is_relative_to(folder) for folder in allowed)
        except (OSError, RuntimeError):  # a loop of links
            is_inside = False
        if not is_inside:
            raise ValueError(
                f"{os.fspath(entry)!r} leads out of {os.fspath(root)!r} by a symbolic link, but all files of a "
                "repository must lie inside it. If you made the link, replace it by a copy of the file."
            )


def links_out_of(folder: Path, root: Path) -> list[str]:
    """List the text files in a folder (settings, templates) that are links to files outside its repository."""
    outside = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jinja", ".json", ".model", ".txt") or path.name == "chat_templates":
            try:
                check_links(path, root)
            except ValueError:
                outside.append(path.name)
    return outside


def store_parts(
    config: Mapping[str, Any],
    save_directory: str | os.PathLike,
    repository: ProcessorRepository | None,
    objects: Mapping[str, tuple[Any, Any]],
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Store the parts that are not repository ids in `save_directory/box_detector`, and pin those that are.

    `objects` holds model and processor of the parts that exist in memory only. Returns the configuration, with the
    stored parts named `./box_detector/...`, and the others with the commit that the local cache knows.
    """
    stored = copy.deepcopy(dict(config))
    bundle = Path(save_directory) / BUNDLE_FOLDER
    if cache_dir is None and repository is not None:
        cache_dir = repository.hub_options.get("cache_dir")
    for part in PARTS:
        source = config.get(part)
        if part in objects:
            with _replacing(bundle / part) as folder:
                for saved in objects[part]:
                    saved.save_pretrained(folder)
        elif not isinstance(source, str):
            continue
        else:
            located = locate(part, source, repository)
            if not (is_bundled(source) or os.path.isdir(located)):
                _pin(stored, part, cache_dir)
                continue
            # Copied instead of saved from memory, where weights may have been rounded.
            _copy(Path(located), bundle / part)
        stored[part] = bundled_name(part)
        stored.pop(f"{part}_revision", None)
    if config.get("prompt_embeds"):
        _copy(Path(locate("prompt_embeds", config["prompt_embeds"], repository)), bundle / PROMPT_EMBEDS_FILE)
        stored["prompt_embeds"] = bundled_name(PROMPT_EMBEDS_FILE)
    return stored


def _pin(config: dict[str, Any], part: str, cache_dir: str | os.PathLike | None) -> None:
    """Write the commit of a repository on the Hub into a configuration, if the cache knows it."""
    key = f"{part}_revision"
    check_revision(key, config.get(key))
    try:
        commit = known_commit(config[part], config.get(key), cache_dir)
    except HFValidationError:  # a folder that does not exist: loading raises the error
        commit = None
    if commit is not None:
        config[key] = commit


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder without links that lead out of it."""
    if source.resolve() == target.resolve():
        return
    check_links(source, source if source.is_dir() else source.parent)
    with _replacing(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(".git", ".cache"))
        else:
            shutil.copyfile(source, temporary)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to, and rename it to `target` when everything is written."""
    temporary = target.with_name(f".{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        yield temporary
        _remove(target)
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


__all__ = [
    "BUNDLE_FOLDER",
    "PARTS",
    "PROMPT_EMBEDS_FILE",
    "ProcessorRepository",
    "bundled_name",
    "check_links",
    "check_revision",
    "is_bundled",
    "known_commit",
    "links_out_of",
    "locate",
    "store_parts",
]
