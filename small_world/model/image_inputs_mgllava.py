"""What both image processor backends share: loading, the square padding, and the boxes beside the pixels.

The square input of the MG-LLaVA vision towers (arXiv 2406.17770, section 3.1) is made as in the original's training
and evaluation code: 8-bit RGB, padded to a square with the CLIP mean colour, short side resized (bicubic),
centre-cropped, rescaled and normalised. Boxes follow the same way, see `boxes_mgllava.py`.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    load_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .boxes_mgllava import BoxLimitMode, flatten_boxes, prepare_boxes

_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB and alpha
# Where remote code finds the image processor of each backend.
_REMOTE_CLASSES = {
    "torchvision": "image_processing_mgllava.MGLlavaImageProcessor",
    "pil": "image_processing_mgllava.MGLlavaImageProcessorPil",
}


class MGLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the MG-LLaVA image processors beyond those of every image processor.

    Args:
        boxes (`list`, *optional*):
            One entry per image, xyxy in pixels of the original image after its EXIF orientation is applied: a mapping
            with `boxes`, `scores` and `labels` (detector output, filtered as below), or a bare `(num_boxes, 4)` array
            (regions that are kept as they are), or `None` (no boxes). May be nested per prompt as the images may be.
        iou_threshold (`float`, *optional*, defaults to 0.2):
            IoU from which the lower-scored of two detected boxes with one label is dropped.
        box_limit_mode (`str`, *optional*, defaults to `"per_category"`):
            `"per_category"` keeps at most 20 boxes per label once there are more than `box_limit` (5 if `box_limit` is
            below 50); `"per_image"` keeps the best `box_limit`.
        box_limit (`int`, *optional*, defaults to 100):
            Number of detected boxes above which the limit applies. `None`: no limit.
        close_to_max_length (`bool`, *optional*, defaults to `False`):
            For training: the text leaves little room, so that only one box per label (or 20 per image) is kept.
        return_box_labels (`bool`, *optional*, defaults to `False`):
            Whether to return `box_labels` too: the labels of the kept boxes, one list per image.
        pad_boxes_to_multiple_of (`int`, *optional*):
            Add rows of zeros to `boxes` until their number is a multiple of this, so that a compiled model sees few
            shapes. `num_boxes` and the text do not change. By default there are as many rows as the image with the
            most boxes needs.
    """

    boxes: Any
    iou_threshold: float | None
    box_limit_mode: str | None
    box_limit: int | None
    close_to_max_length: bool | None
    return_box_labels: bool | None
    pad_boxes_to_multiple_of: int | None


class MGLlavaImageProcessorMixin(BaseImageProcessor):
    """The part of the image processors that does not depend on the backend.

    Images may be PIL images (any mode), NumPy arrays, tensors, paths, URLs or base64 strings, alone or in (nested)
    lists. They are turned upright (EXIF) and into 8-bit RGB, whatever `do_convert_rgb` says; alpha is dropped, as the
    original drops it. Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`;
    floating point values are read as 0..1 if none is larger than 1 and as 0..255 otherwise.
    """

    valid_kwargs = MGLlavaImageProcessorKwargs
    model_input_names = ["pixel_values", "boxes", "num_boxes"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 768}
    default_to_square = False
    crop_size = {"height": 768, "width": 768}
    do_pad = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    iou_threshold = 0.2
    box_limit_mode = "per_category"
    box_limit = 100

    def __init__(self, **kwargs: Unpack[MGLlavaImageProcessorKwargs]):
        super().__init__(**kwargs)
        # The base class takes None for "not given"; here it means "no limit" and has to survive saving and loading.
        if "box_limit" in kwargs:
            self.box_limit = kwargs["box_limit"]

    def to_dict(self) -> dict[str, Any]:
        """Name the classes of both backends in `auto_map`, where saving notes the one that is saved."""
        values = super().to_dict()
        if (values.get("auto_map") or {}).get("AutoImageProcessor") in _REMOTE_CLASSES.values():
            values["auto_map"] = {"AutoImageProcessor": dict(_REMOTE_CLASSES)}
        return values

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load paths, URLs and base64 strings, and turn PIL images upright.

        Args:
            image_url_or_urls: An image or a (nested) list of images.

        Returns:
            The same structure, holding PIL images, arrays of 3 or 4 dimensions, and tensors.

        Raises:
            TypeError: If something is no image.
            ValueError: If a string is neither a path, a URL nor an encoded image.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return load_upright(image_url_or_urls)

    def _preprocess_image_like_inputs(  # type: ignore[override]  # the options by name
        self,
        images: Any,
        *args: Any,
        boxes: Any,
        iou_threshold: float,
        box_limit_mode: BoxLimitMode,
        box_limit: int | None,
        close_to_max_length: bool | None,
        return_box_labels: bool | None,
        pad_boxes_to_multiple_of: int | None,
        do_pad: bool,
        return_tensors: Any,
        input_data_format: str | ChannelDimension | None,
        device: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make `pixel_values`, `boxes` and `num_boxes` of all images."""
        if pad_boxes_to_multiple_of is not None and pad_boxes_to_multiple_of < 1:
            raise ValueError(
                f"`pad_boxes_to_multiple_of` must be a positive number, got {pad_boxes_to_multiple_of}. Pass None for "
                "no padding beyond the image with the most boxes."
            )
        size, crop_size = kwargs["size"], kwargs["crop_size"]
        if kwargs["do_normalize"] and not kwargs["do_rescale"]:
            raise ValueError(
                "`do_rescale` must be True when `do_normalize` is, got False. Images are kept in 8 bits until then; "
                "floating point images between 0 and 1 are recognised."
            )
        resize_to = _short_side(size) if kwargs["do_resize"] else None
        crop_to = (crop_size.height, crop_size.width) if kwargs["do_center_crop"] else None

        rgb = [as_rgb(image, input_data_format) for image in flat_images(self.fetch_images(images))]
        image_sizes = [(image.shape[1], image.shape[2]) for image in rgb]
        entries = [None] * len(rgb) if boxes is None else flatten_boxes(boxes)
        if len(entries) != len(rgb):
            raise ValueError(
                f"`boxes` must have one entry per image, got {len(entries)} entries for {len(rgb)} images. "
                "Pass None or [] for an image without boxes."
            )
        prepared = [
            prepare_boxes(
                entry,
                image_size,
                resize_to=resize_to,
                crop_to=crop_to,
                pad_to_square=do_pad,
                iou_threshold=iou_threshold,
                limit_mode=box_limit_mode,
                limit=box_limit,
                close_to_max_length=bool(close_to_max_length),
                name=f"boxes[{index}]",
            )
            for index, (entry, image_size) in enumerate(zip(entries, image_sizes, strict=True))
        ]

        if do_pad:
            fill = [int(channel * 255) for channel in kwargs["image_mean"]]
            rgb = [pad_to_square(image, fill) for image in rgb]
        pixels = [
            self.process_image(image, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, device=device)
            for image in rgb
        ]
        features = self._preprocess(pixels, *args, do_pad=False, return_tensors=None, **kwargs)

        num_boxes = [len(kept) for kept, _ in prepared]
        padded = torch.nn.utils.rnn.pad_sequence([kept for kept, _ in prepared], batch_first=True)
        if pad_boxes_to_multiple_of is not None:
            padded = torch.nn.functional.pad(padded, (0, 0, 0, -padded.shape[1] % pad_boxes_to_multiple_of))
        data = {"pixel_values": features["pixel_values"], "boxes": list(padded.numpy()), "num_boxes": num_boxes}
        if return_box_labels:
            data["box_labels"] = [labels for _, labels in prepared]
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["box_labels"])


def load_upright(image: Any) -> Any:
    """Load a path, a URL or a base64 string, and turn PIL images upright.

    Args:
        image: One image in any form.

    Returns:
        `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`: Arrays have 3 or 4 dimensions.

    Raises:
        TypeError: If it is no image.
        ValueError: If a string is neither a path, a URL nor an encoded image.
    """
    if isinstance(image, str | os.PathLike):
        # Opened here where it is a file: `load_image` clips 16-bit greyscale.
        image = PIL.Image.open(image) if os.path.isfile(image) else load_image(os.fspath(image))
    if isinstance(image, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(image)
    if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 2:
        return PIL.Image.fromarray(_as_uint8(_as_tensor(image)).cpu().numpy())
    if isinstance(image, np.ndarray | torch.Tensor) and image.ndim in (3, 4):
        return image
    got = f"an array of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    raise TypeError(
        f"`images` must hold PIL images, arrays, tensors, paths or URLs, got {got}. "
        "Arrays have 2 (greyscale) or 3 dimensions, or 4 for a batch."
    )


def flat_images(images: Any) -> list[Any]:
    """List the images of an image, a batch, or a (nested) list, as [`make_flat_list_of_images`] does.

    Args:
        images: Loaded images, or `None`.

    Returns:
        `list`: The images; empty for `None`.
    """
    flat: Any = [] if images is None else make_flat_list_of_images(images)
    return list(flat)


def as_rgb(image: Any, input_data_format: str | ChannelDimension | None = None) -> torch.Tensor:
    """Convert an upright image to 8-bit RGB.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The image; arrays have 3 dimensions.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`; by default found out.

    Returns:
        `torch.Tensor`: uint8 of shape `(3, height, width)`, on the device of the input.

    Raises:
        ValueError: If the channels cannot be told from the other dimensions, or values are out of range.
    """
    if isinstance(image, PIL.Image.Image):
        if image.mode.startswith("I"):  # 16-bit greyscale: `convert` would clip it at 255
            levels = np.clip(np.array(image), 0, 65535).astype(np.uint16)
            image = PIL.Image.fromarray(_as_uint8(torch.from_numpy(levels)).numpy())
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    array = _as_tensor(image)
    if input_data_format is None:
        input_data_format = _channel_dimension(array)
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        array = array.permute(2, 0, 1)
    if array.shape[0] not in _CHANNEL_COUNTS or 0 in array.shape:
        raise ValueError(
            f"`images` must have 1, 3 or 4 channels and at least one pixel, got shape {tuple(image.shape)} "
            f"read as {ChannelDimension(input_data_format).value}."
        )
    array = _as_uint8(array)
    return array.expand(3, -1, -1) if array.shape[0] == 1 else array[:3]


def _channel_dimension(array: torch.Tensor) -> ChannelDimension:
    first, last = array.shape[0] in _CHANNEL_COUNTS, array.shape[2] in _CHANNEL_COUNTS
    if first == last:
        problem = "either end could be the channels" if first else "neither end has 1, 3 or 4 channels"
        raise ValueError(
            f"`images` has an array of shape {tuple(array.shape)}: {problem}. "
            "Pass `input_data_format` ('channels_first' or 'channels_last')."
        )
    return ChannelDimension.FIRST if first else ChannelDimension.LAST


def _as_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    # The copy is for arrays that torch cannot wrap: read-only ones, and views with negative strides.
    return torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array


def _as_uint8(array: torch.Tensor) -> torch.Tensor:
    """Bring bool, 16-bit, 0..255 and 0..1 values to 8 bits."""
    if array.dtype == torch.uint8 or array.numel() == 0:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.dtype == torch.uint16:
        return (array.to(torch.float32) / 257).round().to(torch.uint8)  # 65535 / 255 = 257
    low, high = array.min().item(), array.max().item()
    if not (low >= 0 and high <= 255):  # also when they are NaN
        raise ValueError(f"`images` must hold values from 0 to 255, or from 0 to 1, got {low} to {high}.")
    if array.is_floating_point():
        array = (array.float() * (255 if high <= 1 else 1)).round()
    return array.to(torch.uint8)


def pad_to_square(image: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """Put an image into the middle of a square of one colour.

    Args:
        image (`torch.Tensor`): uint8 of shape `(3, height, width)`.
        fill (`Sequence[int]`): One value per channel.

    Returns:
        `torch.Tensor`: uint8 of shape `(3, side, side)`; the image starts at `(side - height) // 2`,
        `(side - width) // 2`.
    """
    height, width = image.shape[1:]
    side = max(height, width)
    square = image.new_tensor(fill)[:, None, None].repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


def _short_side(size: SizeDict) -> int:
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(f"`size` must be given as {{'shortest_edge': pixels}}, got {dict(size)}.")
    return int(size.shortest_edge)
