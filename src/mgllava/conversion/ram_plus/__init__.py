"""Checkpoints of RAM++."""

from .source_format import RAM_PLUS, TAG_LIST_URL, THRESHOLDS_URL

__all__ = ["RAM_PLUS", "TAG_LIST_URL", "THRESHOLDS_URL"]
