"""Image processors of MG-LLaVA: on torchvision, the default, and on PIL, with the pixels of the original.

In one file, so that a repository with one of them has the other too.
"""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .image_inputs_mgllava import MGLlavaImageProcessorMixin


class MGLlavaImageProcessor(MGLlavaImageProcessorMixin, TorchvisionBackend):
    """Makes `pixel_values`, `boxes` and `num_boxes` from images and boxes (MG-LLaVA, arXiv 2406.17770, section 3.1).

    Calling it with `return_tensors="pt"` gives

    - `pixel_values`: fp32 of shape `(num_images, 3, height, width)`, the size of `crop_size`, normalised;
    - `boxes`: fp32 of shape `(num_images, max_boxes, 4)`, xyxy in pixels of `pixel_values`, zero-padded;
    - `num_boxes`: int64 of shape `(num_images,)`, at least 1 each: without boxes there is the box `[0, 0, 0, 0]`;
    - `box_labels`: only with `return_box_labels=True`, a list per image.

    Pixels differ from the original's (see [`MGLlavaImageProcessorPil`]) where torchvision's bicubic resizing rounds to
    another 8-bit level: over the images of `tests/golden`, at most 2 levels (0.03 after normalisation) in at most
    0.4 % of the values, 6e-5 on average. Boxes are the same.

    Options: see [`MGLlavaImageProcessorKwargs`]; sizes come from `size` and `crop_size`.
    """


class MGLlavaImageProcessorPil(MGLlavaImageProcessorMixin, PilBackend):
    """The image processor whose pixels equal the original's bit for bit; slower than [`MGLlavaImageProcessor`].

    Options and outputs are those of [`MGLlavaImageProcessor`].
    """


__all__ = ["MGLlavaImageProcessor", "MGLlavaImageProcessorPil"]
