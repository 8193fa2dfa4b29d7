"""JSON files, which may come from strangers."""

import json
from pathlib import Path
from typing import Any

from mgllava.atomic_files import replacing

from .errors import ConversionError

_MAX_BYTES = 1 << 28


def read_json(path: Path, argument: str | None = None) -> dict[str, Any]:
    """Read a JSON file that must hold an object; errors start with the name of the argument."""
    start = f"`{argument}`: " if argument else ""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConversionError(f"{start}{path} is too large for a configuration.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConversionError(f"{start}{path} must be JSON, but cannot be read ({reason}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{start}{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def try_read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; `None` if it cannot be read or does not hold an object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        # Names of files need not be valid Unicode; JSON escapes what UTF-8 cannot encode.
        data = (json.dumps(content, indent=2) + "\n").encode("utf-8")
    with replacing(path) as partial:
        partial.write_bytes(data)


__all__ = ["read_json", "try_read_json", "write_json"]
