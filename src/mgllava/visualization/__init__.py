"""Pictures for people: boxes with their labels, and what a model keeps of an image."""

from .boxes import draw_boxes
from .token_map import kept_tokens

__all__ = ["draw_boxes", "kept_tokens"]
