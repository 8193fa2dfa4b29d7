"""Image processor of MG-LLaVA on PIL and NumPy: the pixels of the original."""

from transformers.image_processing_backends import PilBackend

from .image_inputs_mgllava import MGLlavaImageProcessorMixin


class MGLlavaImageProcessorPil(MGLlavaImageProcessorMixin, PilBackend):
    """The image processor whose pixels equal the original's bit for bit; slower than [`MGLlavaImageProcessor`].

    Options and outputs are those of [`MGLlavaImageProcessor`].
    """


__all__ = ["MGLlavaImageProcessorPil"]
