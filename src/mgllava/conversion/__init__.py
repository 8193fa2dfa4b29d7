"""Checkpoints in, safetensors repositories out, and the way back."""

from mgllava.model_files.errors import ConversionError

from .checkpoint_reader import XTunerCheckpoint, read_checkpoint
from .convert import convert_checkpoint
from .convert_ram_plus import convert_ram_plus
from .export_xtuner import export_xtuner
from .presets import PRESETS

__all__ = [
    "PRESETS",
    "ConversionError",
    "XTunerCheckpoint",
    "convert_checkpoint",
    "convert_ram_plus",
    "export_xtuner",
    "read_checkpoint",
]
