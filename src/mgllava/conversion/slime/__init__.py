"""Checkpoints of SliME as its authors' code writes them, in both directions."""

from .export import export_slime
from .source_format import SLIME, SLIME_LORA, SLIME_STAGE

__all__ = ["SLIME", "SLIME_LORA", "SLIME_STAGE", "export_slime"]
