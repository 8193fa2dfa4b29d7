"""Image processors of RAM++: on torchvision (the default), and on PIL, with the same pixels as the original.

Both are in one file, so that saving one of them copies the code of both.
"""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .image_inputs_ram_plus import RamPlusImageProcessorMixin


class RamPlusImageProcessor(RamPlusImageProcessorMixin, TorchvisionBackend):
    """Prepares images for RAM++ (arXiv 2310.15200): bilinear resize to a square, ImageNet statistics.

    Pixels differ from the original's (see [`RamPlusImageProcessorPil`]) where torchvision's bilinear resize rounds to
    another 8-bit level. For the images of `tests/golden_ram`, at most 4.1 % of the values differ, by one level
    (0.018 after normalization) and by 7e-4 on average; for a portrait image of 480x640 pixels, 14 %.

    Options: see [`RamPlusImageProcessorKwargs`]. `size` sets the size.
    """


class RamPlusImageProcessorPil(RamPlusImageProcessorMixin, PilBackend):
    """Image processor with the same 8-bit pixels as the original; slower than [`RamPlusImageProcessor`].

    Options and outputs are those of [`RamPlusImageProcessor`].
    """


__all__ = ["RamPlusImageProcessor", "RamPlusImageProcessorPil"]
