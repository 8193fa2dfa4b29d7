"""The part of RAM++'s image processors that does not depend on the backend: settings, opening images, 8-bit RGB.

The code from `UnreadableImageError` on is a copy of that in `processing/images_common.py`: the two Hub folders are
copied into different model folders, and must open every image alike, which
`tests/processing/test_opening_images.py` checks.
"""

import base64
import io
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Set
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import httpx
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Where a mapping may hold an image: blocks of conversations, and what the datasets library stores.
IMAGE_KEYS = ("image", "bytes", "base64", "url", "path", "image_url")
_CHANNEL_COUNTS = (1, 3, 4)  # gray, RGB, RGB and alpha
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
# Entries of `auto_map`: the image processor class of each backend.
_REMOTE_CLASSES = {
    "torchvision": "image_processing_ram_plus.RamPlusImageProcessor",
    "pil": "image_processing_ram_plus.RamPlusImageProcessorPil",
}


class RamPlusImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the RAM++ image processors, in addition to those of every image processor.

    Args:
        do_exif_transpose (`bool`, *optional*, defaults to `False`):
            Whether images are turned upright by their EXIF orientation, in whatever form they come. The original does
            not do this. (Pillow itself does it for TIFF files.)
    """

    do_exif_transpose: bool | None


class RamPlusImageProcessorMixin(BaseImageProcessor):
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
        """Name the classes of both backends in `auto_map`, where saving writes only that of the saved class."""
        values = super().to_dict()
        if (values.get("auto_map") or {}).get("AutoImageProcessor") in _REMOTE_CLASSES.values():
            values["auto_map"] = {"AutoImageProcessor": dict(_REMOTE_CLASSES)}
        return values

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


class UnreadableImageError(OSError, ValueError):
    """An image that cannot be opened: an `OSError` as Pillow's errors are, a `ValueError` as those of transformers."""


def open_images(images: Any, name: str = "images") -> Any:
    """Open all images of a (nested) list one after the other; errors name the index."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OSU":
        images = images.tolist()
    single = str | bytes | bytearray | memoryview | os.PathLike | Mapping | Set | np.ndarray | torch.Tensor
    if isinstance(images, Iterable) and not isinstance(images, single) and not hasattr(images, "read"):
        return [open_images(image, f"{name}[{index}]") for index, image in enumerate(images)]
    return open_image(images, name)


def open_image(image: Any, name: str = "image") -> Any:
    """Open an image and decode it; the file is closed again.

    It may be a PIL image, array, tensor, path, http(s) URL, data URL, base64 string, bytes, or binary file; or a
    mapping that holds one of these (`image`, `bytes`, `base64`, `url`, `path` or `image_url`). Returns a PIL image in
    RGB, not turned upright, of several frames the first or the present one; or an array or tensor of 3 or 4
    dimensions.
    """
    if isinstance(image, Mapping):
        given = {key: image[key] for key in IMAGE_KEYS if image.get(key) is not None}
        if len(given) != 1 and set(given) != {"bytes", "path"}:  # of these two, the path names the bytes' source
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
        except Exception as error:  # decoders raise anything for broken files
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
        array = np.array(image)  # deep grayscale: `convert` would clip it at 255
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
    gray = PIL.Image.fromarray(_as_uint8(_as_tensor(array, name), name).numpy()).convert("RGB")
    gray.info = dict(image.info)
    return gray


def _undecodable(error: Exception, name: str, shown: str) -> UnreadableImageError:
    """Make an error of what a decoder reports, with advice."""
    advice = "The file may be incomplete or damaged: replace it, or leave it out."
    if isinstance(error, PIL.Image.DecompressionBombError):
        advice = "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
    problem = str(error).rstrip(".") or type(error).__name__
    return UnreadableImageError(f"`{name}` must be an image that can be decoded, got {shown}: {problem}. {advice}")


def _open_array(array: np.ndarray | torch.Tensor, name: str) -> Any:
    """Check the dimensions of an array."""
    if array.ndim not in (2, 3, 4):
        raise TypeError(
            f"`{name}` must have 2 dimensions (grayscale), 3, or 4 for a batch, got an array of shape "
            f"{tuple(array.shape)}."
        )
    if 0 in array.shape[1 if array.ndim == 4 else 0 :]:
        raise UnreadableImageError(f"`{name}` must have at least one pixel, got shape {tuple(array.shape)}.")
    if array.ndim == 3:
        return array
    levels = _as_uint8(_as_tensor(array, name), name)  # of a batch as a whole: one range for all of its images
    return levels if array.ndim == 4 else PIL.Image.fromarray(levels.cpu().numpy()).convert("RGB")


def _binary_file(image: Any, name: str) -> BinaryIO:
    """Open the source of an image file's bytes."""
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
        "file. Check the path; a relative one starts at the current folder. Or was text passed instead of images?"
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
    """Download a file."""
    try:
        response = httpx.get(url, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT)
        problem = "" if response.is_success else f"status {response.status_code}"
    except Exception as error:  # connections fail in many ways
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
    """Turn a PIL image as its EXIF orientation says, without its metadata; keep it if its EXIF cannot be read."""
    if not isinstance(image, PIL.Image.Image):
        return image
    # Not `PIL.ImageOps.exif_transpose`, which writes the EXIF again and so fails at entries that Pillow cannot write.
    try:
        turn = _UPRIGHT.get(image.getexif()[0x0112])
    except Exception:  # damaged metadata makes Pillow raise anything; the pixels are intact
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # or it would be turned again
    return turned


def flat_images(images: Any) -> list[Any]:
    """List the images of an image, a batch, or a (nested) list; `None` has none."""
    if images is None:
        return []
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [image for group in images for image in flat_images(group)]
    return [images]


def as_rgb(image: Any, input_data_format: str | ChannelDimension | None = None, name: str = "images") -> torch.Tensor:
    """Convert an opened image to 8-bit RGB: uint8 of shape `(3, height, width)`, on the device of the input.

    Arrays have 3 dimensions; if `input_data_format` is not given, the number of channels tells it.
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
    """Tell which end of an array's shape is the channels."""
    first, last = array.shape[0] in _CHANNEL_COUNTS, array.shape[2] in _CHANNEL_COUNTS
    if first == last:
        problem = "either end could be the channels" if first else "neither end has 1, 3 or 4 channels"
        raise ValueError(
            f"`{name}` has an array of shape {tuple(array.shape)}: {problem}. "
            "Pass `input_data_format` ('channels_first' or 'channels_last')."
        )
    return ChannelDimension.FIRST if first else ChannelDimension.LAST


def _as_tensor(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """Make a tensor of an array of numbers."""
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
    if not (low >= -slack and high <= 255 + slack):  # also if they are NaN
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


__all__ = ["RamPlusImageProcessorKwargs", "RamPlusImageProcessorMixin"]
