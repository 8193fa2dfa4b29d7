"""Image processors of RAM++: on torchvision, the default, and on PIL, with the pixels of the original.

Both are in one file, so that a model folder with one of them has the other as well.
"""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .image_inputs_ram_plus import RamPlusImageProcessorMixin


class RamPlusImageProcessor(RamPlusImageProcessorMixin, TorchvisionBackend):
    """Makes `pixel_values` of RAM++ (arXiv 2310.15200): squeezed to a square, bilinear, ImageNet mean and deviation.

    Pixels differ from the original's (see [`RamPlusImageProcessorPil`]) where torchvision's bilinear resizing rounds
    to another 8-bit level: over the images of `tests/golden_ram`, by one level (0.018 after normalization) in at most
    4.1 % of the values, 7e-4 on average; of an upright picture of 480x640 pixels, in 14 % of the values.

    Options: see [`RamPlusImageProcessorKwargs`]; the size comes from `size`.
    """


class RamPlusImageProcessorPil(RamPlusImageProcessorMixin, PilBackend):
    """The image processor whose 8-bit pixels equal the original's; slower than [`RamPlusImageProcessor`].

    Options and outputs are those of [`RamPlusImageProcessor`].
    """


__all__ = ["RamPlusImageProcessor", "RamPlusImageProcessorPil"]
