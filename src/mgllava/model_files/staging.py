"""Output folders that get their name when they are complete, and the check of what they may replace."""

import filecmp
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mgllava.atomic_files import is_partial
from mgllava.families import FAMILIES
from mgllava.folder_lock import FolderLock, FolderLockedError

from .errors import ConversionError
from .json_files import try_read_json, write_json
from .shard_writer import Shard

logger = logging.getLogger(__name__)

PROGRESS_NAME = "conversion_progress.json"
REPORT_NAME = "conversion_report.json"
_REPLACED_NAME = "conversion_replaced.json"
_MARK = "mgllava conversion"

# Code in a saved model, matched by suffix, so that modules of earlier versions are included.
CODE_NAMES = re.compile(rf"\w+_({'|'.join([*FAMILIES, 'common'])})\.py|__init__\.py")
# Files that a conversion or an export writes, and the next one may remove. All other files are the user's.
_OWN_NAMES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja"
    r"|(config|generation_config|processor_config|preprocessor_config|image_processor_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json"
    r"|(conversion_report|conversion_progress|conversion_replaced)\.json"
    rf"|{CODE_NAMES.pattern}"
)
# Only an export writes these; users may add them to a finished folder, but not to an unfinished one.
_OWN_NAMES_IN_STAGING = re.compile(
    rf"{_OWN_NAMES.pattern}|box_detector|vision_tower|additional_chat_templates|README\.md|\.gitattributes"
)


class StagingFolder:
    """A folder `OUTPUT.incomplete` next to the output, which is locked inside the `with` block."""

    # An interrupted run leaves its weight shards in the folder, for the next run. If the output is a link, its target
    # is written. A folder of that name without the mark of this package is an error. With `overwrite`, an output of
    # one of `model_types` is replaced, except for files that no conversion writes, such as notes or `box_detector/`.

    def __init__(self, output: Path, overwrite: bool, *model_types: str):
        self.output = Path(os.path.realpath(output))
        if not self.output.name:
            raise ConversionError(f"`output` must be a folder that can be created, got {output}.")
        self.path = self.output.with_name(self.output.name + ".incomplete")
        self._replaced = self.output.with_name(self.output.name + ".replaced")
        self._lock = FolderLock(self.output, f"writing {self.output.name}")
        self._overwrite = overwrite
        self._model_types = sorted(model_types)
        self._kept: list[str] = []
        self._check_output()

    def __enter__(self) -> "StagingFolder":
        try:
            self._lock.__enter__()
        except FolderLockedError as error:
            raise ConversionError(str(error)) from error
        try:
            self._finish_replacement()
            self._check_output()
            self._check_leftovers()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, traceback)

    def _check_output(self) -> None:
        output = self.output
        if output.is_symlink():
            raise ConversionError(f"{output} is a link that leads nowhere. Choose another `output`.")
        if _is_empty(output):
            return
        if not output.is_dir():
            raise ConversionError(f"{output} exists and is not a folder. Choose another `output`.")
        if not self._overwrite:
            raise ConversionError(f"{output} exists. Choose another `output`, or pass `overwrite=True` to replace it.")
        if read_model_type(output) not in self._model_types:
            # A mistyped path must not replace a home folder.
            raise ConversionError(
                f"{output} is not a {' or '.join(self._model_types)} model folder, so `overwrite` does not replace it."
            )

    def narrow(self, model_type: str) -> None:
        """Restrict the model types that may be replaced to the one that is written."""
        self._model_types = [model_type]
        self._check_output()

    def _check_leftovers(self) -> None:
        """Refuse an `OUTPUT.incomplete` that no interrupted run of this package left."""
        if _is_empty(self.path):
            return
        mark = _read_mark(self.path / PROGRESS_NAME) if _is_real_folder(self.path) else None
        if _is_real_folder(self.path) and all(is_partial(entry.name) for entry in self.path.iterdir()):
            return  # the run was killed while it wrote the mark
        if mark is None:
            raise ConversionError(
                f"{self.path} is in the way: no interrupted run of this package left it. Move it, or choose another "
                "`output`."
            )
        kept = mark.get("kept")
        self._kept = [name for name in kept if isinstance(name, str)] if isinstance(kept, list) else []
        foreign = [entry.name for entry in self.path.iterdir() if not self._is_own(entry)]
        if foreign:
            raise ConversionError(
                f"{self.path} is the rest of an interrupted run, but holds also {', '.join(sorted(foreign)[:5])}. "
                "Move these, or choose another `output`."
            )

    def _is_own(self, entry: Path) -> bool:
        """Tell whether an entry of the unfinished folder may be removed."""
        if entry.name in self._kept:
            # A copy of a file in the output that was about to be replaced.
            return os.path.lexists(self.output / entry.name)
        return is_partial(entry.name) or _OWN_NAMES_IN_STAGING.fullmatch(entry.name) is not None

    def keep_finished(self, digests: Mapping[str, str], shards: Sequence[Shard]) -> set[str]:
        """Delete the files of an earlier run, except for shards of the same plan; return the names of these."""
        done: set[str] = set()
        progress = self.path / PROGRESS_NAME
        earlier = (_read_mark(progress) or {}).get("shards")
        if isinstance(earlier, dict):
            for shard in shards:
                path = self.path / shard.filename
                same_plan = earlier.get(shard.filename) == digests[shard.filename]
                if same_plan and path.is_file() and not path.is_symlink() and path.stat().st_size == shard.size:
                    done.add(shard.filename)
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            # Without the mark, the next run would refuse the folder.
            if entry.name not in done and entry.name != PROGRESS_NAME:
                _remove(entry)
        # The plan may be written first, because a shard gets its name when it is complete.
        write_json(progress, {"mark": _MARK, "shards": dict(digests), "kept": []})
        return done

    def publish(self) -> Path:
        """Rename the folder to the output. Files of an earlier output that no conversion writes are kept."""
        try:
            self._lock.check()
        except FolderLockedError as error:
            raise ConversionError(str(error)) from error
        if not _is_empty(self.output):
            self._keep_other_files()
            written = [entry.name for entry in self.path.iterdir() if entry.name not in self._kept]
            write_json(self.output / _REPLACED_NAME, {"mark": _MARK, "written": written})
            _sync(self.path)
            self.output.rename(self._replaced)
        elif self.output.exists():
            self.output.rmdir()
        self.path.rename(self.output)
        _sync(self.output.parent)
        self._finish_replacement()
        return self.output

    def _keep_other_files(self) -> None:
        """Add the user's files of the output to the folder that replaces it: as hard links, or as copies."""
        if os.path.lexists(self._replaced):
            raise ConversionError(
                f"{self._replaced} is in the way: no interrupted run of this package left it. Move it, or choose "
                "another `output`."
            )
        others = [
            entry
            for entry in self.output.iterdir()
            if _OWN_NAMES.fullmatch(entry.name) is None and not os.path.lexists(self.path / entry.name)
        ]
        progress = _read_mark(self.path / PROGRESS_NAME) or {"mark": _MARK}
        self._kept = [entry.name for entry in others]
        write_json(self.path / PROGRESS_NAME, {**progress, "kept": self._kept})
        for entry in others:
            if _is_real_folder(entry):
                shutil.copytree(entry, self.path / entry.name, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(entry, self.path / entry.name)

    def _finish_replacement(self) -> None:
        """Finish the replacement of the output, which an earlier run may have been killed in."""
        mark = _read_mark(self._replaced / _REPLACED_NAME) if _is_real_folder(self._replaced) else None
        if mark is not None and not os.path.lexists(self.output):
            logger.warning("%s was restored: a run was interrupted while it replaced it.", self.output)
            self._replaced.rename(self.output)
            mark = None
        elif mark is not None:
            written = mark.get("written")
            _remove_replaced(self._replaced, self.output, written if isinstance(written, list) else [])
            (self._replaced / _REPLACED_NAME).unlink()
            if any(self._replaced.iterdir()):
                logger.warning(
                    "%s holds files that were added to %s while it was being replaced. They were not deleted.",
                    self._replaced,
                    self.output,
                )
            else:
                self._replaced.rmdir()
        for name in (_REPLACED_NAME, PROGRESS_NAME):
            if _read_mark(self.output / name) is not None:
                (self.output / name).unlink()


def read_model_type(folder: Path) -> str | None:
    """Read the model type of a model folder; `None` if it has none."""
    model_type = (try_read_json(folder / "config.json") or {}).get("model_type")
    return model_type if isinstance(model_type, str) else None


def _read_mark(path: Path) -> dict[str, Any] | None:
    content = None if path.is_symlink() else try_read_json(path)
    return content if content is not None and content.get("mark") == _MARK else None


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(path: Path) -> bool:
    """Tell whether a path is free or an empty folder."""
    return not os.path.lexists(path) or (_is_real_folder(path) and not any(path.iterdir()))


def _remove(path: Path) -> None:
    if _is_real_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        if not stat.S_ISREG(os.lstat(source).st_mode) and not os.path.islink(source):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _remove_replaced(old: Path, new: Path, written: Sequence[Any]) -> None:
    """Remove the files that were written again or copied to the new folder; keep all others."""
    for entry in list(old.iterdir()):
        if entry.name == _REPLACED_NAME:
            continue
        if entry.name in written or _OWN_NAMES.fullmatch(entry.name) is not None:
            _remove(entry)
        else:
            _remove_duplicate(entry, new / entry.name)


def _remove_duplicate(old: Path, new: Path) -> None:
    if _is_real_folder(old) and _is_real_folder(new):
        for entry in list(old.iterdir()):
            _remove_duplicate(entry, new / entry.name)
        with suppress(OSError):
            old.rmdir()
    elif os.path.lexists(new) and _same_file(old, new):
        old.unlink()


def _same_file(old: Path, new: Path) -> bool:
    """Tell whether nothing is lost without the old file, which may have been changed after it was copied."""
    if os.path.samestat(old.lstat(), new.lstat()):
        return True
    if old.is_symlink() or new.is_symlink():
        return old.is_symlink() and new.is_symlink() and os.readlink(old) == os.readlink(new)
    # The cache goes by paths, sizes and times.
    filecmp.clear_cache()
    return filecmp.cmp(old, new, shallow=False)


def _sync(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the system can."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = ["CODE_NAMES", "PROGRESS_NAME", "REPORT_NAME", "StagingFolder", "read_model_type"]
