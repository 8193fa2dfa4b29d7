"""Image processors of MG-LLaVA: on torchvision (the default), and on PIL (bit-identical to the original).

The square input of the MG-LLaVA vision towers (arXiv 2406.17770, section 3.1) is made as in the original's training
and evaluation code: 8-bit RGB, padded to a square with the CLIP mean color, short side resized (bicubic),
center-cropped, rescaled and normalized. Boxes are transformed alike, see `boxes_mgllava.py`.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .boxes_mgllava import BoxLimitMode, flatten_boxes, prepare_boxes, select_objects
from .images_common import UprightImageProcessor, as_rgb, flat_images, group_sizes, make_findable, resize_in_square

# An image whose sides have a greater ratio is resized without making its square.
_MILD_ASPECT_RATIO = 2


class MGLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the MG-LLaVA image processors beyond those of every image processor.

    Args:
        boxes (`list`, *optional*):
            One entry per image, xyxy in pixels of the original image after its EXIF orientation is applied: a mapping
            with `boxes`, `scores` and `labels` (detector output, filtered as below), or a bare `(num_boxes, 4)` array
            (regions that are all kept), or `None` (no boxes). May be nested per prompt like the images.
        iou_threshold (`float`, *optional*, defaults to 0.2):
            IoU from which the lower-scored of two detected boxes with one label is dropped.
        box_limit_mode (`str`, *optional*, defaults to `"per_category"`):
            `"per_category"` keeps at most 20 boxes per label once there are more than `box_limit` (5 if `box_limit` is
            below 50); `"per_image"` keeps the best `box_limit`.
        box_limit (`int`, *optional*, defaults to 100):
            Number of detected boxes above which the limit applies. `None`: no limit.
        close_to_max_length (`bool`, *optional*, defaults to `False`):
            For training: whether the text leaves little room, so that one box per label (or 20 per image) is kept.
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


class MGLlavaImageProcessorMixin(UprightImageProcessor):
    """The part of the image processors that does not depend on the backend.

    Images may be PIL images (any mode), NumPy arrays, tensors, paths, http(s) URLs, data URLs, base64 strings, bytes,
    binary files, or mappings that hold one of these (`{"bytes": ..., "path": ...}` of the datasets library,
    `{"url": ...}`), alone or in (nested) lists. They are turned upright (EXIF) and into 8-bit RGB, whatever
    `do_convert_rgb` says; alpha is dropped, as in the original; only the first frame of animated files is read.

    Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, or 4-dimensional batches
    of the latter two. Integers are read as 0..255, those of 16 bits without sign (also in files) as 0..65535, floating
    point values as 0..1 if none is larger than 1, and as 0..255 otherwise, which is a guess: an image of 0..255 whose
    values are all 0 or 1 is read as black and white. A batch has one range for all of its images.
    """

    valid_kwargs = MGLlavaImageProcessorKwargs
    remote_classes = {
        "torchvision": "image_processing_mgllava.MGLlavaImageProcessor",
        "pil": "image_processing_mgllava.MGLlavaImageProcessorPil",
    }
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
    box_limit_mode: BoxLimitMode = "per_category"
    box_limit = 100

    def __init__(self, **kwargs: Unpack[MGLlavaImageProcessorKwargs]):
        super().__init__(**kwargs)
        # The base class takes None for "not given"; here it means "no limit" and has to survive saving and loading.
        if "box_limit" in kwargs:
            self.box_limit = kwargs["box_limit"]

    def objects(self, detections: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Select the objects of an image that the model gets a token for, see [`MGLlavaProcessor.objects`]."""
        return select_objects(detections, image_size, **box_options(self))[1]

    def _preprocess_image_like_inputs(  # type: ignore[override]  # the options by name
        self,
        images: Any,
        *args: Any,
        boxes: Any,
        close_to_max_length: bool | None,
        return_box_labels: bool | None,
        pad_boxes_to_multiple_of: int | None,
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
        selection = box_options(SimpleNamespace(**kwargs))
        opened = self.fetch_at_least_one(images)
        rgb = [as_rgb(image, input_data_format, f"images[{index}]") for index, image in enumerate(flat_images(opened))]
        if getattr(self, "backend", None) == "pil":
            rgb = [image.cpu() for image in rgb]
        image_sizes = [(image.shape[1], image.shape[2]) for image in rgb]
        entries = flatten_boxes(boxes, len(rgb), group_sizes(opened))
        prepared = [
            prepare_boxes(
                entry,
                image_size,
                **selection,
                close_to_max_length=bool(close_to_max_length),
                name=f"boxes[{index}]",
            )
            for index, (entry, image_size) in enumerate(zip(entries, image_sizes, strict=True))
        ]

        if kwargs.pop("do_pad"):
            fill = [int(channel * 255) for channel in kwargs["image_mean"]]
            is_bicubic = kwargs["resample"] == PILImageResampling.BICUBIC
            rgb = [self._as_square(image, fill, selection["resize_to"] if is_bicubic else None) for image in rgb]
        pixels = [
            self.process_image(image, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, device=device)
            for image in rgb
        ]
        features = self._preprocess(pixels, *args, do_pad=False, return_tensors=None, **kwargs)
        self.check_one_shape(features["pixel_values"], return_tensors, kwargs)

        num_boxes = [len(kept) for kept, _ in prepared]
        padded = torch.nn.utils.rnn.pad_sequence([kept for kept, _ in prepared], batch_first=True)
        if pad_boxes_to_multiple_of is not None:
            padded = torch.nn.functional.pad(padded, (0, 0, 0, -padded.shape[1] % pad_boxes_to_multiple_of))
        data = {"pixel_values": features["pixel_values"], "boxes": list(padded.numpy()), "num_boxes": num_boxes}
        if return_box_labels:
            data["box_labels"] = [labels for _, labels in prepared]
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["box_labels"])

    def _as_square(self, image: torch.Tensor, fill: Sequence[int], resize_to: int | None) -> torch.Tensor:
        """Pad an image to a square; resize a long image in addition, as its square would have many more pixels."""
        height, width = image.shape[1:]
        if resize_to is None or max(height, width) <= _MILD_ASPECT_RATIO * min(height, width):
            return pad_to_square(image, fill)

        def resize(part: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            return self.resize_tensor(part, *size, PILImageResampling.BICUBIC)

        is_pil = getattr(self, "backend", None) == "pil"
        # Pillow's weights have 22 bits.
        return resize_in_square(image.cpu(), resize_to, fill, resize, 22 if is_pil else None).to(image.device)


class MGLlavaImageProcessor(MGLlavaImageProcessorMixin, TorchvisionBackend):
    """Makes `pixel_values`, `boxes` and `num_boxes` from images and boxes (MG-LLaVA, arXiv 2406.17770, section 3.1).

    Calling it with `return_tensors="pt"` gives

    - `pixel_values`: float32 of shape `(num_images, 3, height, width)`, the size of `crop_size`, normalized;
    - `boxes`: int64 of shape `(num_images, max_boxes, 4)`, xyxy in pixels of `pixel_values`, zero-padded;
    - `num_boxes`: int64 of shape `(num_images,)`, at least 1 each: without boxes there is the box `[0, 0, 0, 0]`;
    - `box_labels`: only with `return_box_labels=True`, a list per image.

    Pixels differ from the original's (see [`MGLlavaImageProcessorPil`]) where torchvision's bicubic resizing rounds to
    another 8-bit level: over the images of `tests/golden`, at most 2 levels (0.03 after normalization) in at most
    0.4 % of the values, 6e-5 on average. Boxes are the same.

    Options: see [`MGLlavaImageProcessorKwargs`]; sizes come from `size` and `crop_size`.
    """


class MGLlavaImageProcessorPil(MGLlavaImageProcessorMixin, PilBackend):
    """The image processor whose pixels equal the original's bit for bit; slower than [`MGLlavaImageProcessor`].

    Options and outputs are those of [`MGLlavaImageProcessor`].
    """


def pad_to_square(image: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """Pad an image to a square of one color, in which it starts at `(side - height) // 2`, `(side - width) // 2`."""
    height, width = image.shape[1:]
    side = max(height, width)
    square = image.new_tensor(fill)[:, None, None].repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


def box_options(options: Any) -> dict[str, Any]:
    """Give the options of an image processor the names that they have in [`prepare_boxes`]."""
    size, crop_size = dict(options.size), dict(options.crop_size)
    if options.do_resize and (not size.get("shortest_edge") or size.get("longest_edge")):
        raise ValueError(f"`size` must be given as {{'shortest_edge': pixels}}, got {size}.")
    return {
        "resize_to": int(size["shortest_edge"]) if options.do_resize else None,
        "crop_to": (crop_size["height"], crop_size["width"]) if options.do_center_crop else None,
        "pad_to_square": options.do_pad,
        "iou_threshold": options.iou_threshold,
        "limit_mode": options.box_limit_mode,
        "limit": options.box_limit,
    }


make_findable(__name__)

__all__ = ["MGLlavaImageProcessor", "MGLlavaImageProcessorKwargs", "MGLlavaImageProcessorPil", "box_options"]
