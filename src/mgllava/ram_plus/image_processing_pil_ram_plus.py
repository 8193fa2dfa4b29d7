"""Image processor of RAM++ on PIL and NumPy: the pixels of the original."""

from transformers.image_processing_backends import PilBackend

from .image_inputs_ram_plus import RamPlusImageProcessorMixin


class RamPlusImageProcessorPil(RamPlusImageProcessorMixin, PilBackend):
    """The image processor whose 8-bit pixels equal the original's; slower than [`RamPlusImageProcessor`].

    Options and outputs are those of [`RamPlusImageProcessor`].
    """


__all__ = ["RamPlusImageProcessorPil"]
