"""Checkpoints in, safetensors repositories out, and the way back."""

from .checkpoint_reader import XTunerCheckpoint, read_checkpoint
from .convert import convert_checkpoint
from .errors import ConversionError
from .export_xtuner import export_xtuner

__all__ = ["ConversionError", "XTunerCheckpoint", "convert_checkpoint", "export_xtuner", "read_checkpoint"]
