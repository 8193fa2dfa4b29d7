"""The parts of the small model, trained from scratch on the pictures and texts of the small world.

They correspond to the models that the paper starts from: CLIP, a CLIP ConvNeXt, a language model, RAM++ and OWLv2.
Those were trained on millions of captions. Here the attributes of every object are known, so the towers are also
trained to predict them.
"""

from enum import Enum


class Part(str, Enum):
    """A part; its value is the name of its folder among the parts."""

    TOKENIZER = "tokenizer"
    LANGUAGE_MODEL = "language-model"
    VISION_TOWER = "vision-tower"
    HIGH_RES_TOWER = "high-res-tower"
    TILE_TOWER = "tile-tower"
    DETECTOR = "detector"
    TAGGER = "tagger"


__all__ = ["Part"]
