"""The parts of the small model, trained from scratch on the pictures and texts of the small world.

They stand for what the paper starts from: CLIP, a CLIP ConvNeXt, a language model, RAM++ and OWLv2. Those learned from
millions of captions. Here the generator knows what every object is, so the towers learn from that as well.
"""

from enum import Enum


class Part(str, Enum):
    """A part; its value is the name of its folder among the parts."""

    TOKENIZER = "tokenizer"
    LANGUAGE_MODEL = "language-model"
    VISION_TOWER = "vision-tower"
    HIGH_RES_TOWER = "high-res-tower"
    DETECTOR = "detector"
    TAGGER = "tagger"


__all__ = ["Part"]
