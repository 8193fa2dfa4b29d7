"""Convert original checkpoints to model folders, and export model folders to original checkpoints."""

from mgllava.model_files.errors import ConversionError

from .build import add_videos, build_from_parts
from .convert import convert_checkpoint, convert_ram_plus, export_original
from .xtuner import PRESETS, XTunerCheckpoint, export_xtuner, read_checkpoint

__all__ = [
    "PRESETS",
    "ConversionError",
    "XTunerCheckpoint",
    "add_videos",
    "build_from_parts",
    "convert_checkpoint",
    "convert_ram_plus",
    "export_original",
    "export_xtuner",
    "read_checkpoint",
]
