"""What both image processor backends share: loading, the square padding, and the boxes beside the pixels.

The square input of the MG-LLaVA vision towers (arXiv 2406.17770, section 3.1) is made as in the original's training
and evaluation code: 8-bit RGB, padded to a square with the CLIP mean colour, short side resized (bicubic),
centre-cropped, rescaled and normalised. Boxes follow the same way, see `boxes_mgllava.py`.
"""

import base64
import io
import os
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import httpx
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .boxes_mgllava import BoxLimitMode, flatten_boxes, prepare_boxes
from .pil_resize_mgllava import resize_in_square

logger = logging.get_logger(__name__)

# Where a mapping may hold an image: blocks of conversations, and what the datasets library stores.
IMAGE_KEYS = ("image", "bytes", "base64", "url", "path", "image_url")
_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB and alpha
_MILD_ASPECT_RATIO = 2
_SHORTEST_BASE64 = 32
_DOWNLOAD_TIMEOUT = 60  # seconds without an answer
_ROUNDING = 1e-3  # by how much floating point values may lie outside of their range
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
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

    Images may be PIL images (any mode), NumPy arrays, tensors, paths, http(s) URLs, data URLs, base64 strings, bytes,
    binary files, or mappings that hold one of these (`{"bytes": ..., "path": ...}` of the datasets library,
    `{"url": ...}`), alone or in (nested) lists. They are turned upright (EXIF) and into 8-bit RGB, whatever
    `do_convert_rgb` says; alpha is dropped, as the original drops it; of animated files the first frame is read.

    Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, or 4-dimensional batches
    of the latter two. Integers are read as 0..255, those of 16 bits without sign (also in files) as 0..65535, floating
    point values as 0..1 if none is larger than 1, and as 0..255 otherwise, which is a guess: an image of 0..255 whose
    values are all 0 or 1 is read as black and white. A batch has one range for all of its images.
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
        """Open images, whatever way they come, and turn them upright.

        Args:
            image_url_or_urls: An image or a (nested) list of images, see the class.

        Returns:
            The same structure, holding PIL images (RGB), arrays of 3 or 4 dimensions, and tensors.

        Raises:
            TypeError: If something is not an image.
            UnreadableImageError: If an image cannot be opened; a `ValueError` and an `OSError`.
        """
        return _map(upright, open_images(image_url_or_urls))

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

        opened = self.fetch_images(images)
        rgb = [as_rgb(image, input_data_format, f"images[{index}]") for index, image in enumerate(flat_images(opened))]
        if getattr(self, "backend", None) == "pil":
            rgb = [image.cpu() for image in rgb]
        image_sizes = [(image.shape[1], image.shape[2]) for image in rgb]
        entries = flatten_boxes(boxes, len(rgb), group_sizes(opened))
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
            is_bicubic = kwargs["resample"] == PILImageResampling.BICUBIC
            rgb = [self._as_square(image, fill, resize_to if is_bicubic else None) for image in rgb]
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

    def _as_square(self, image: torch.Tensor, fill: Sequence[int], resize_to: int | None) -> torch.Tensor:
        """Pad an image to a square; a long, thin one is resized as well, as its square would have many more pixels."""
        height, width = image.shape[1:]
        if resize_to is None or max(height, width) <= _MILD_ASPECT_RATIO * min(height, width):
            return pad_to_square(image, fill)

        backend: Any = self
        is_pil = backend.backend == "pil"

        def resize(part: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            given: Any = part.numpy() if is_pil else part
            resized = backend.resize(given, SizeDict(height=size[0], width=size[1]), PILImageResampling.BICUBIC)
            return torch.as_tensor(resized)

        # Pillow's weights have 22 bits.
        return resize_in_square(image.cpu(), resize_to, fill, resize, 22 if is_pil else None).to(image.device)


def _map(function: Callable[[Any], Any], images: Any) -> Any:
    return [_map(function, image) for image in images] if isinstance(images, list) else function(images)


def load_upright(image: Any, name: str = "image") -> Any:
    """Open an image, whatever way it comes, and turn it upright.

    Args:
        image: One image, see [`open_image`].
        name (`str`): How error messages call it.

    Returns:
        `PIL.Image.Image` (RGB), `np.ndarray` or `torch.Tensor`: Arrays have 3 or 4 dimensions.

    Raises:
        TypeError: If it is not an image.
        UnreadableImageError: If it cannot be opened; a `ValueError` and an `OSError`.
    """
    return upright(open_image(image, name))


class UnreadableImageError(OSError, ValueError):
    """An image that cannot be opened: an `OSError` as Pillow's errors are, a `ValueError` as those of transformers."""


def open_images(images: Any, name: str = "images") -> Any:
    """Open all images of a (nested) list, one after the other, so that no more than one file is open.

    Args:
        images: An image as [`open_image`] takes it, or a (nested) list, tuple, generator, or array of objects of them.
        name (`str`): How error messages call it.

    Returns:
        What [`open_image`] returns, in (nested) lists where there were several.

    Raises:
        TypeError: If something is not an image; the message names its index.
        UnreadableImageError: If an image cannot be opened; the message names its index.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OSU":
        images = images.tolist()
    single = str | bytes | bytearray | memoryview | os.PathLike | Mapping | Set | np.ndarray | torch.Tensor
    if isinstance(images, Iterable) and not isinstance(images, single) and not hasattr(images, "read"):
        return [open_images(image, f"{name}[{index}]") for index, image in enumerate(images)]
    return open_image(images, name)


def open_image(image: Any, name: str = "image") -> Any:
    """Open an image, whatever way it comes, and decode it; the file is closed again.

    Args:
        image: A PIL image, array, tensor, path, http(s) URL, data URL, base64 string, bytes, or binary file; or a
            mapping that holds one of these (`image`, `bytes`, `base64`, `url`, `path` or `image_url`).
        name (`str`): How error messages call it.

    Returns:
        `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`: PIL images are RGB, as they are stored (see [`upright`]), of
        several frames the first or the present one. Arrays have 3 or 4 dimensions.

    Raises:
        TypeError: If it is not an image.
        UnreadableImageError: If it cannot be opened or decoded, or its values are out of range.
    """
    if isinstance(image, Mapping):
        given = {key: image[key] for key in IMAGE_KEYS if image.get(key) is not None}
        if len(given) != 1 and set(given) != {"bytes", "path"}:  # of both, the path says where the bytes come from
            raise TypeError(
                f"`{name}` must have one image, under {', '.join(map(repr, IMAGE_KEYS))}, got "
                f"{', '.join(given) or f'none under the keys {sorted(map(str, image))}'}."
            )
        return open_image(next(iter(given.values())), name)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _open_array(image, name)
    if isinstance(image, PIL.Image.Image):
        return _decode(image, name, f"the PIL image {getattr(image, 'filename', '')}".strip())
    with _binary_file(image, name) as file:
        shown = _shown(image)
        try:
            opened = PIL.Image.open(file)
        except MemoryError:
            raise
        except PIL.UnidentifiedImageError as error:
            raise UnreadableImageError(
                f"`{name}` must be an image, got {shown}, which is not in a format that Pillow knows. Pass JPEG, PNG, "
                "WebP, GIF, BMP or TIFF, or install the Pillow plugin of the format."
            ) from error
        except Exception as error:  # broken files make decoders raise whatever comes
            raise _undecodable(error, name, shown) from error
        return _decode(opened, name, shown)


def _decode(image: PIL.Image.Image, name: str, shown: str) -> PIL.Image.Image:
    """Decode an image as 8-bit RGB; alpha is dropped."""
    try:
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode[0] not in "IF":
            return image.convert("RGB")
        array = np.array(image)  # deep greyscale: `convert` would clip it at 255
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error, name, shown) from error
    if image.mode == "I":
        # Pillow fills 32 bits from 16-bit files too, and programs do from 8-bit values.
        low, high = array.min(), array.max()
        if image.format in ("PNG", "PPM") or high > 255:
            if low < 0 or high > 65535:
                raise UnreadableImageError(
                    f"`{name}` must hold values from 0 to 65535, got {shown} with {low} to {high}. Scale it to 8 bits."
                )
            array = array.astype(np.uint16)
    grey = PIL.Image.fromarray(_as_uint8(_as_tensor(array, name), name).numpy()).convert("RGB")
    grey.info = dict(image.info)
    return grey


def _undecodable(error: Exception, name: str, shown: str) -> UnreadableImageError:
    """Say what a decoder says, and what to do."""
    advice = "The file may be incomplete or damaged: replace it, or leave it out."
    if isinstance(error, PIL.Image.DecompressionBombError):
        advice = "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
    problem = str(error).rstrip(".") or type(error).__name__
    return UnreadableImageError(f"`{name}` must be an image that can be decoded, got {shown}: {problem}. {advice}")


def _open_array(array: np.ndarray | torch.Tensor, name: str) -> Any:
    """Check the dimensions of an array."""
    if array.ndim not in (2, 3, 4):
        raise TypeError(
            f"`{name}` must have 2 dimensions (greyscale), 3, or 4 for a batch, got an array of shape "
            f"{tuple(array.shape)}."
        )
    if 0 in array.shape[1 if array.ndim == 4 else 0 :]:
        raise UnreadableImageError(f"`{name}` must have at least one pixel, got shape {tuple(array.shape)}.")
    if array.ndim == 3:
        return array
    levels = _as_uint8(_as_tensor(array, name), name)  # of a batch as a whole: one range for all of its images
    return levels if array.ndim == 4 else PIL.Image.fromarray(levels.cpu().numpy()).convert("RGB")


def _binary_file(image: Any, name: str) -> BinaryIO:
    """Open what holds the bytes of an image file."""
    if hasattr(image, "read"):
        if hasattr(image, "seek") and (not hasattr(image, "seekable") or image.seekable()):
            image.seek(0)  # also one that was just written
        data = image.read()
        if not isinstance(data, bytes):
            raise TypeError(
                f"`{name}` must be a file opened in binary mode, got one that reads {type(data).__name__}."
            )
        return io.BytesIO(data)
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if not isinstance(image, str | os.PathLike):
        raise TypeError(
            f"`{name}` must hold PIL images, arrays, tensors, paths, URLs, base64 strings, bytes, binary files or "
            f"mappings with one of these, got {type(image).__name__}."
        )
    text, shown = os.fspath(image), _shown(image)
    if isinstance(image, str) and text.lstrip()[:5].lower() in ("data:", "http:", "https"):
        text = text.strip()
    scheme = text[:8].lower() if isinstance(image, str) else ""
    if scheme.startswith(("http://", "https://")):
        return io.BytesIO(_download(text, name))
    if scheme.startswith("data:"):
        head, comma, payload = text.partition(",")
        data = urllib.parse.unquote_to_bytes(payload)
        decoded = _from_base64(data) if head.lower().replace(" ", "").endswith(";base64") else data
        if not comma or not decoded:
            raise UnreadableImageError(
                f"`{name}` must be a data URL like 'data:image/png;base64,...', got {shown}, which cannot be decoded."
            )
        return io.BytesIO(decoded)
    if os.path.isfile(text):
        try:
            return open(text, "rb")
        except OSError as error:
            raise UnreadableImageError(f"`{name}` must be a file that can be read, got {shown}: {error}") from error
    if os.path.isdir(text):
        raise UnreadableImageError(f"`{name}` must be an image file, got the folder {shown}. Pass its files.")
    if isinstance(image, str) and (decoded := _from_base64(text)):
        return io.BytesIO(decoded)
    raise UnreadableImageError(
        f"`{name}` must be a path, an http(s) URL, a data URL or a base64 string, got {shown}, and there is no such "
        "file. Check the path; a relative one starts at the current folder. Or was text passed in the place of images?"
    )


def _from_base64(text: str | bytes) -> bytes:
    """Decode base64, also with line breaks, without padding, or of the alphabet of URLs; empty if it is not base64."""
    encoded = b"".join((text.encode("utf-8", "replace") if isinstance(text, str) else text).split()).rstrip(b"=")
    encoded = encoded.replace(b"-", b"+").replace(b"_", b"/")
    if len(encoded) < _SHORTEST_BASE64:  # shorter than any image, as most paths are
        return b""
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return b""


def _download(url: str, name: str) -> bytes:
    """Get a file from the web."""
    try:
        response = httpx.get(url, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT)
        problem = "" if response.is_success else f"status {response.status_code}"
    except Exception as error:  # as many kinds as there are ways to fail
        response, problem = None, f"{type(error).__name__}: {error}"
    if response is None or problem:
        raise UnreadableImageError(
            f"`{name}` cannot be downloaded from {_shown(url)} ({problem}). Check the address and the connection, or "
            "download it yourself and pass the file."
        )
    return response.content


def _shown(image: Any) -> str:
    """Name an image in an error, without its data."""
    if isinstance(image, str | os.PathLike):
        text = str(os.fspath(image))
        if text[:5].lower() == "data:":
            return f"{text.partition(',')[0][:60]!r} and {len(text):,} characters in all"
        if not text:
            return "an empty string"
        return repr(text) if len(text) <= 120 else f"{text[:80] + '...' + text[-20:]!r} ({len(text):,} characters)"
    return f"a file of {type(image).__name__}" if hasattr(image, "read") else f"{len(image):,} bytes"


def upright(image: Any) -> Any:
    """Turn a PIL image as its EXIF orientation says.

    Args:
        image: What [`open_image`] returns.

    Returns:
        The image; one that was turned has no metadata left. If its EXIF cannot be read, it stays as it is stored.
    """
    if not isinstance(image, PIL.Image.Image):
        return image
    # Not `PIL.ImageOps.exif_transpose`, which writes the EXIF anew and so fails at entries that Pillow cannot write.
    try:
        turn = _UPRIGHT.get(image.getexif()[0x0112])
    except Exception:  # whatever damaged metadata makes Pillow raise; the pixels are whole
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # or it would be turned again
    return turned


def flat_images(images: Any) -> list[Any]:
    """List the images of an image, a batch, or a (nested) list.

    Args:
        images: What [`open_images`] returns, or `None`.

    Returns:
        `list`: The images; empty for `None`.
    """
    if images is None:
        return []
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [image for group in images for image in flat_images(group)]
    return [images]


def as_rgb(image: Any, input_data_format: str | ChannelDimension | None = None, name: str = "images") -> torch.Tensor:
    """Convert an opened image to 8-bit RGB.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The image; arrays have 3 dimensions.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`; by default found out.
        name (`str`): How error messages call it.

    Returns:
        `torch.Tensor`: uint8 of shape `(3, height, width)`, on the device of the input.

    Raises:
        ValueError: If the channels cannot be told from the other dimensions, or values are out of range.
        TypeError: If it is neither a PIL image nor an array nor a tensor.
    """
    if isinstance(image, PIL.Image.Image):
        return torch.from_numpy(np.array(_decode(image, name, "a PIL image"))).permute(2, 0, 1)
    array = _as_tensor(image, name)
    if input_data_format is None:
        input_data_format = _channel_dimension(array, name)
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        array = array.permute(2, 0, 1)
    if array.shape[0] not in _CHANNEL_COUNTS or 0 in array.shape:
        raise ValueError(
            f"`{name}` must have 1, 3 or 4 channels and at least one pixel, got shape {tuple(image.shape)} "
            f"read as {ChannelDimension(input_data_format).value}."
        )
    array = _as_uint8(array, name)
    return array.expand(3, -1, -1) if array.shape[0] == 1 else array[:3]


def _channel_dimension(array: torch.Tensor, name: str) -> ChannelDimension:
    first, last = array.shape[0] in _CHANNEL_COUNTS, array.shape[2] in _CHANNEL_COUNTS
    if first == last:
        problem = "either end could be the channels" if first else "neither end has 1, 3 or 4 channels"
        raise ValueError(
            f"`{name}` has an array of shape {tuple(array.shape)}: {problem}. "
            "Pass `input_data_format` ('channels_first' or 'channels_last')."
        )
    return ChannelDimension.FIRST if first else ChannelDimension.LAST


def _as_tensor(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach()
    if array.dtype.kind not in "biuf":
        raise TypeError(f"`{name}` must hold numbers, got an array of {array.dtype}.")
    # The copy is for arrays that torch cannot wrap: read-only ones, views with negative strides, swapped bytes.
    array = np.array(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 2:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def _as_uint8(array: torch.Tensor, name: str) -> torch.Tensor:
    """Bring bool, 16-bit, 0..255 and 0..1 values to 8 bits."""
    if array.dtype == torch.uint8 or array.numel() == 0:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.dtype == torch.uint16:
        levels = array.to(torch.float32)
        if 0 < levels.max().item() <= 255:
            logger.warning_once(
                "An image of 16 bits has no value above 255, so that it is nearly black: 65535 is white. If 255 is "
                "meant to be white, pass 8 bits (uint8)."
            )
        return (levels / 257).round().to(torch.uint8)  # 65535 / 255 = 257
    low, high = array.min().item(), array.max().item()
    is_float = array.is_floating_point()
    slack = _ROUNDING if is_float else 0
    if not (low >= -slack and high <= 255 + slack):  # also when they are NaN
        raise UnreadableImageError(
            f"`{name}` must hold values from 0 to 255, or from 0 to 1, got {low} to {high}. Clip or scale them; "
            "pixels that are normalized already cannot be used, and 16 bits are read as uint16."
        )
    if is_float:
        array = array.float()
        if high <= 1 + slack:
            array = array * 255
        elif high <= 2 and bool((array != array.round()).any()):
            raise UnreadableImageError(
                f"`{name}` must hold values from 0 to 1, or from 0 to 255, got {low} to {high}: a little above 1. "
                "Clip them to 0..1."
            )
        array = array.round().clamp(0, 255)
    return array.to(torch.uint8)


def group_sizes(images: Any) -> list[int] | None:
    """Count the images of each prompt.

    Args:
        images: What [`open_images`] returns.

    Returns:
        `list[int]`, *optional*: The counts; `None` if the images are not nested per prompt.
    """
    if isinstance(images, list | tuple) and images and all(isinstance(group, list | tuple) for group in images):
        return [len(flat_images(group)) for group in images]
    return None


def image_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an image block of a conversation into the form that transformers reads.

    Args:
        block (`Mapping`): With one of [`IMAGE_KEYS`]; keys that are `None` are left out, as the datasets library adds
            them.

    Returns:
        `dict`: The block; `bytes` are under `image`.

    Raises:
        ValueError: If it has several images.
    """
    block = {key: value for key, value in block.items() if key not in IMAGE_KEYS or value is not None}
    if "bytes" in block:
        block.pop("path", None)  # where the bytes come from
        block["image"] = block.pop("bytes")
    if len(given := [key for key in IMAGE_KEYS if key in block]) > 1:
        raise ValueError(f"An image block must have one image, got {', '.join(map(repr, given))}.")
    return block


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
