"""Image processors of RAM++: on torchvision (the default), and on PIL, with the same pixels as the original.

Both are in one file, so that saving one of them copies the code of both.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs

from .images_common import UprightImageProcessor, as_rgb, flat_images, open_images, upright


class RamPlusImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the RAM++ image processors, in addition to those of every image processor.

    Args:
        do_exif_transpose (`bool`, *optional*, defaults to `False`):
            Whether images are turned upright by their EXIF orientation, in whatever form they come. The original does
            not do this. (Pillow itself does it for TIFF files.)
    """

    do_exif_transpose: bool | None


class RamPlusImageProcessorMixin(UprightImageProcessor):
    """The part of the image processors that does not depend on the backend.

    Images may be PIL images (any mode), NumPy arrays, tensors, paths, http(s) URLs, data URLs, base64 strings, bytes,
    binary files, or mappings that hold one of these (`{"bytes": ..., "path": ...}` of the datasets library,
    `{"url": ...}`), alone or in (nested) lists. They become 8-bit RGB, whatever `do_convert_rgb` is. Alpha is
    dropped, not blended, as in the original. Of an animation, the first frame is read.

    Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, or 4-dimensional batches
    of the latter two. Integers range from 0 to 255, unsigned 16-bit integers (also in files) from 0 to 65535.
    Floating-point values are read as 0..1 if none is larger than 1, and as 0..255 otherwise. This is a guess: an image
    of 0..255 whose values are all 0 or 1 is read as black and white. All images of a batch have the same range.
    """

    valid_kwargs = RamPlusImageProcessorKwargs
    remote_classes: ClassVar[Mapping[str, str]] = {
        "torchvision": "image_processing_ram_plus.RamPlusImageProcessor",
        "pil": "image_processing_ram_plus.RamPlusImageProcessorPil",
    }
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_exif_transpose = False

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open an image or a (nested) list of images, in any form, without turning them upright."""
        return open_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return flat_images(self.fetch_images(images))

    def process_image(self, *args: Any, **kwargs: Any) -> Any:
        """Convert an opened image to 8-bit RGB in the backend's format, `(3, height, width)`."""
        image, *others = args
        if kwargs.get("do_exif_transpose"):
            image = upright(image)
        rgb = as_rgb(image, kwargs.get("input_data_format"))
        if self.backend == "pil":  # type: ignore[attr-defined]  # set by the other base class
            rgb = rgb.cpu()
        kwargs |= {"do_convert_rgb": False, "input_data_format": ChannelDimension.FIRST}
        return super().process_image(rgb, *others, **kwargs)


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


__all__ = ["RamPlusImageProcessor", "RamPlusImageProcessorKwargs", "RamPlusImageProcessorPil"]
