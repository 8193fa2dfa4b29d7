"""Checkpoints of MG-LLaVA as XTuner writes them, in both directions."""

from .checkpoint_reader import XTunerCheckpoint, read_checkpoint
from .export import export_xtuner
from .presets import PRESETS
from .source_format import XTUNER

__all__ = ["PRESETS", "XTUNER", "XTunerCheckpoint", "export_xtuner", "read_checkpoint"]
