"""Find checkpoints on disk or on the Hub."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.sources import fetch

from .source_format import SourceFormat

_HUB_PATH = re.compile(
    r"(?:hf://|hf-hub:)?(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<path>[^@]+))?"
)
_LISTED = 40


def _accept(fitting: Sequence[SourceFormat], folder: Path | None) -> None:
    """Accept every checkpoint."""


def fetch_checkpoint(
    name: str | Path,
    formats: Sequence[SourceFormat],
    options: Mapping[str, Any],
    check: Callable[[Sequence[SourceFormat], Path | None], None] = _accept,
) -> Path:
    """Find a checkpoint on disk, or download it from the Hub.

    A Hub id is `owner/name`, or `owner/name/path` with the path of the checkpoint in the repository, where `name` may
    be followed by a revision: `owner/name@revision`. Before a download, `check` is called with the formats that fit
    the names of the files, and with a folder that holds the files that tell the format, if there are any.
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
        # Offline: search the files that were downloaded before.
        patterns = sorted({pattern for source_format in formats for pattern in source_format.patterns})
        folder = fetch(repository, "checkpoint", patterns, revision)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    chosen = inside
    if files is not None:
        paths = [PurePosixPath(file) for file in files]
        full_name = f"{repository}{f'@{revision}' if revision else ''}"
        chosen = _choose_checkpoint(paths, inside, full_name, formats, options)
        fitting = [one for one in formats if chosen in one.find(paths)]
        telling = [_escape(str(chosen / file)) for one in fitting for file in one.told_by]
        is_told = bool(fitting) and all(one.told_by for one in fitting)
        check(fitting, fetch(repository, "checkpoint", telling, revision) / chosen if is_told else None)
    if not chosen.parts:
        return fetch(repository, "checkpoint", ["*"], revision)
    escaped = _escape(str(chosen))
    found = fetch(repository, "checkpoint", [escaped, f"{escaped}/*"], revision) / chosen
    if not found.exists():
        raise ConversionError(f"`checkpoint`: {repository} has no {chosen}.")
    return found


def _escape(name: str) -> str:
    """Turn a name into a pattern that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _list_repository(repository: str, revision: str | None) -> list[str] | None:
    """List the files of a repository; `None` if the Hub cannot be reached or does not have it."""
    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings
    except Exception:  # the following download reports the error, or finds the files in the cache
        return None
    return [entry.rfilename for entry in siblings or []]


def _choose_checkpoint(
    paths: list[PurePosixPath],
    inside: PurePosixPath,
    repository: str,
    formats: Sequence[SourceFormat],
    options: Mapping[str, Any],
) -> PurePosixPath:
    found = sorted({path for source_format in formats for path in source_format.find(paths)})
    if inside in found or inside in paths:
        return inside
    under = [path for path in found if path.is_relative_to(inside)]
    words = next((hint.lower().split("-") for one in formats if (hint := one.hint(options))), [])
    fitting = [path for path in under if words and all(word in str(path).lower() for word in words)]
    for candidates in (under, fitting):
        if len(candidates) == 1:
            return candidates[0]
    shown = fitting or under or found
    listed = "".join(f"\n  {repository}/{path}" for path in shown[:_LISTED])
    listed += f"\n  and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    if under:
        raise ConversionError(f"`checkpoint`: {repository} has several checkpoints; name one of them:{listed}")
    looked_for = ", ".join(dict.fromkeys(pattern for one in formats for pattern in one.patterns))
    problem = f"has no checkpoint {inside}" if inside.parts else f"has no checkpoint ({looked_for})"
    raise ConversionError(f"`checkpoint`: {repository} {problem}.{' It has:' if found else ''}{listed}")


__all__ = ["fetch_checkpoint"]
