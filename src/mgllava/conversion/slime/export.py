"""Export a SliME model folder to a checkpoint of the original code."""

from pathlib import Path

from mgllava.model_files.errors import ConversionError


def export_slime(repository: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint of the original code from a model folder."""
    raise ConversionError("Not yet.")


__all__ = ["export_slime"]
