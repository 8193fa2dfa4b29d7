"""Pictures for people: boxes with their labels on images and frames, and what a model keeps of an image."""

from .boxes import draw_boxes, draw_frames
from .token_map import kept_tokens

__all__ = ["draw_boxes", "draw_frames", "kept_tokens"]
