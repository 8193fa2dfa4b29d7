"""What both image processor backends of RAM++ share: the settings of the original, and 8-bit RGB as it makes it."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs

_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB and alpha
# Where remote code finds the image processor of each backend.
_REMOTE_CLASSES = {
    "torchvision": "image_processing_ram_plus.RamPlusImageProcessor",
    "pil": "image_processing_ram_plus.RamPlusImageProcessorPil",
}


class RamPlusImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the RAM++ image processors beyond those of every image processor.

    Args:
        do_exif_transpose (`bool`, *optional*, defaults to `False`):
            Whether files and PIL images are turned upright by their EXIF orientation. The original reads them as they
            are stored. URLs and base64 strings come upright in any case.
    """

    do_exif_transpose: bool | None


class RamPlusImageProcessorMixin(BaseImageProcessor):
    """The part of the image processors that does not depend on the backend.

    Images may be PIL images (any mode), NumPy arrays, tensors, paths, URLs or base64 strings, alone or in lists. They
    become 8-bit RGB, whatever `do_convert_rgb` says: alpha is dropped, not blended, as the original drops it. Floating
    point arrays hold values from 0 to 1.
    """

    valid_kwargs = RamPlusImageProcessorKwargs
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

    def to_dict(self) -> dict[str, Any]:
        """Name the classes of both backends in `auto_map`, where saving notes the one that is saved."""
        values = super().to_dict()
        if (values.get("auto_map") or {}).get("AutoImageProcessor") in _REMOTE_CLASSES.values():
            values["auto_map"] = {"AutoImageProcessor": dict(_REMOTE_CLASSES)}
        return values

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, URLs and base64 strings.

        Args:
            image_url_or_urls: An image or a (nested) list of images.

        Returns:
            The same structure with PIL images in place of paths and strings.

        Raises:
            TypeError: If something is no image.
            ValueError: If a string is neither a path, a URL nor an encoded image.
        """
        image = image_url_or_urls
        if isinstance(image, list | tuple):
            return [self.fetch_images(entry) for entry in image]
        if isinstance(image, str | os.PathLike):
            # `load_image` would turn files upright.
            return PIL.Image.open(image) if os.path.isfile(image) else load_image(os.fspath(image))
        if isinstance(image, PIL.Image.Image | np.ndarray | torch.Tensor):
            return image
        raise TypeError(f"`images` must hold PIL images, arrays, tensors, paths or URLs, got {type(image).__name__}.")

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return list(_flat(self.fetch_images(images)))

    def process_image(self, *args: Any, **kwargs: Any) -> Any:
        """Turn one image into the backend's format, `(3, height, width)` with 8 bits.

        Args:
            *args: The image, a `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`.
            **kwargs: `do_exif_transpose`, `input_data_format` and options of the backend.

        Returns:
            `torch.Tensor` or `np.ndarray`.

        Raises:
            ValueError: If the channels of an array cannot be found, or its values are out of range.
        """
        image, *others = args
        if isinstance(image, PIL.Image.Image) and kwargs.get("do_exif_transpose"):
            image = PIL.ImageOps.exif_transpose(image)
        rgb = _as_rgb(image, kwargs.get("input_data_format"))
        kwargs |= {"do_convert_rgb": False, "input_data_format": ChannelDimension.FIRST}
        return super().process_image(rgb, *others, **kwargs)


def _flat(images: Any) -> Iterator[Any]:
    """Go through (nested) lists and through arrays that hold a batch."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _as_rgb(image: Any, input_data_format: str | ChannelDimension | None) -> Any:
    """Convert an image to 8 bits and `(3, height, width)`: an array if it was a PIL image, else of its own kind."""
    if isinstance(image, PIL.Image.Image):
        return np.array(image.convert("RGB")).transpose(2, 0, 1)
    array: Any = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image
    if array.ndim == 2:
        array, input_data_format = array[None], ChannelDimension.FIRST
    if array.ndim != 3:
        raise ValueError(f"`images` must have 2 or 3 dimensions, or 4 for a batch, got shape {tuple(image.shape)}.")
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(array, num_channels=_CHANNEL_COUNTS)
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        array = array.permute(2, 0, 1)
    if array.shape[0] not in _CHANNEL_COUNTS or 0 in array.shape:
        raise ValueError(
            f"`images` must have 1, 3 or 4 channels and at least one pixel, got shape {tuple(image.shape)} "
            f"read as {ChannelDimension(input_data_format).value}."
        )
    if array.dtype != torch.uint8:
        low, high = array.min().item(), array.max().item()
        if not (array.is_floating_point() and low >= 0 and high <= 1):  # also when they are NaN
            raise ValueError(
                "`images` must be 8-bit arrays, or floating point arrays from 0 to 1, "
                f"got {array.dtype} from {low} to {high}."
            )
        array = (array.float() * 255).round().to(torch.uint8)
    array = array.expand(3, -1, -1) if array.shape[0] == 1 else array[:3]
    return array.cpu().numpy() if isinstance(image, np.ndarray) else array


__all__ = ["RamPlusImageProcessorKwargs", "RamPlusImageProcessorMixin"]
