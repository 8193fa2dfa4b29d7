"""Detect incomplete checkpoints: the last step of a save writes a list of the checkpoint's files."""

import json
import logging
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mgllava.atomic_files import replacing

logger = logging.getLogger(__name__)

_MARKER = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Write the list of the files of a checkpoint, which marks it as complete."""
    with replacing(checkpoint / _MARKER) as partial:
        partial.write_text(json.dumps(_sizes(checkpoint), indent=1) + "\n", encoding="utf-8")


def _is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved completely, and no file was removed or shortened since."""
    try:
        expected = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = _sizes(checkpoint)
    return all(found.get(name) == size for name, size in expected.items())


def _sizes(folder: Path) -> dict[str, int]:
    # Without the marker itself, whether it is complete or only partly written.
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_MARKER))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint, if there is one; newer incomplete ones are skipped with a warning."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = (path.name.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*"))
    for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
        checkpoint = Path(folder) / f"{prefix}{step}"
        if _is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is skipped: it is incomplete, because its save was interrupted.", checkpoint)
    return None


def clear_incomplete(checkpoint: Path) -> None:
    """Remove a checkpoint that an interrupted save left, so that it can be written again."""
    if checkpoint.is_dir():
        # The marker is removed first, so that a partly removed checkpoint does not count as complete.
        (checkpoint / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


__all__ = ["clear_incomplete", "last_complete_checkpoint", "mark_complete"]
