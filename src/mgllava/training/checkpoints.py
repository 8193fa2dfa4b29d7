"""Complete checkpoints, which have a list of their files, written last."""

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


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was saved to its end, and no file was removed or shortened since."""
    try:
        expected = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = _sizes(checkpoint)
    return all(found.get(name) == size for name, size in expected.items())


def _sizes(folder: Path) -> dict[str, int]:
    # The marker is not among them, and neither is a marker that is half written.
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_MARKER))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint, if there is one; later ones are skipped with a warning."""
    for step in sorted(_steps(Path(folder)), reverse=True):
        checkpoint = Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is skipped: it is incomplete, because its saving was interrupted.", checkpoint)
    return None


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [int(name) for name in names if name.isdigit()]


def clear_incomplete(checkpoint: Path) -> None:
    """Remove what an interrupted save left where a checkpoint is to be written."""
    if checkpoint.is_dir():
        # The marker goes first, so that a half removed checkpoint does not count as complete.
        (checkpoint / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


__all__ = ["clear_incomplete", "is_complete", "last_complete_checkpoint", "mark_complete"]
