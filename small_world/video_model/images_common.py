"""Images from any source: opened, turned upright, converted to 8-bit RGB, and resized exactly as other code does."""

import base64
import io
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, BinaryIO, ClassVar

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import httpx
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, SizeDict
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


def make_findable(module: str) -> None:
    """Set a module as an attribute of its package, where dill looks up the classes of objects that `datasets` hashes.

    transformers does not do so for remote code. dill then pickles the classes by value, until the stack overflows.
    """
    package, _, name = module.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], name, sys.modules[module])


def fetch_upright(images: Any) -> Any:
    """Open the images of a (nested) list with [`open_images`], and turn them upright."""

    def turn(image: Any) -> Any:
        return [turn(item) for item in image] if isinstance(image, list) else upright(image)

    return turn(open_images(images))


def load_upright(image: Any, name: str = "image") -> Any:
    """Open one image with [`open_image`], and turn it upright."""
    return upright(open_image(image, name))


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


def binary_file(source: Any, name: str, max_bytes: int | None = None) -> BinaryIO:
    """Open a file of any kind like [`open_image`]: a path, URL, data URL, base64 string, bytes or binary file.

    A download stops at `max_bytes`; other sources are not limited.
    """
    text = source.strip() if isinstance(source, str) else ""
    if max_bytes is None or not text.lower().startswith(("http://", "https://")):
        return _binary_file(source, name)
    data = io.BytesIO()
    try:
        with httpx.stream("GET", text, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                data.write(part)
                if data.tell() > max_bytes:
                    break
    except Exception as error:  # connections fail in many ways
        raise UnreadableImageError(f"`{name}` cannot be downloaded from {_shown(text)} ({error}).") from error
    data.seek(0)
    return data


def shown(source: Any) -> str:
    """Name a file in an error, without its data."""
    return _shown(source)


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


def group_sizes(images: Any) -> list[int] | None:
    """Count the images of each prompt; `None` if the images are not nested per prompt."""
    if isinstance(images, list | tuple) and images and all(isinstance(group, list | tuple) for group in images):
        return [len(flat_images(group)) for group in images]
    return None


def is_image_block(value: Any) -> bool:
    """Tell whether a part of a conversation is an image."""
    return isinstance(value, Mapping) and value.get("type") in ("image", "image_url")


def image_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an image block of a conversation to the form that transformers reads: `bytes` are under `image`.

    Keys that are `None`, which the datasets library adds, are left out.
    """
    block = {key: value for key, value in block.items() if key not in IMAGE_KEYS or value is not None}
    if "bytes" in block:
        block.pop("path", None)  # where the bytes come from
        block["image"] = block.pop("bytes")
    if len(given := [key for key in IMAGE_KEYS if key in block]) > 1:
        raise ValueError(f"An image block must have one image, got {', '.join(map(repr, given))}.")
    return block


# Pillow's weights are whole numbers of this unit. Sums of them are exact in float64, in whatever order.
_PRECISION = 2**22


@lru_cache(maxsize=8)
def _weights(length: int, new_length: int, device: torch.device) -> torch.Tensor:
    """Make the float64 matrix of shape `(new_length, length)` that holds Pillow's integer weights of one axis."""
    scale = length / new_length
    support = max(scale, 1.0)  # the triangle is widened when shrinking
    centers = (torch.arange(new_length, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    samples = torch.arange(length, dtype=torch.float64, device=device)
    first = (centers - support + 0.5).trunc().clamp(min=0)
    end = (centers + support + 0.5).trunc().clamp(max=length)
    weights = (1 - ((samples - centers + 0.5) / support).abs()).clamp(min=0)
    weights = weights.masked_fill((samples < first) | (samples >= end), 0)
    return (weights / weights.sum(dim=1, keepdim=True) * _PRECISION + 0.5).floor()


def resize_like_pil(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize 8-bit RGB with the bilinear filter that Pillow had in 2024, the horizontal axis first, on any device.

    torchvision's filter differs from it by one of 255 levels in places. So does the present Pillow's on portrait
    images: it resizes the vertical axis first if that is cheaper, and rounds to 8 bits after each axis. The result is
    on the GPU if the image is on a CUDA device, otherwise on the CPU.
    """
    if image.device.type == "cuda":
        return resize_by_products(image, size)
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    for new_size in ((size[1], picture.height), (size[1], size[0])):
        picture = picture.resize(new_size, PIL.Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resize_by_products(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize like [`resize_like_pil`] with one matrix product per axis: fast on a GPU, slow on a CPU.

    The device must have float64; the image may have any number of channels.
    """
    values = image.double()
    if image.shape[2] != size[1]:  # Pillow skips an axis that keeps its length
        values = _round(values @ _weights(image.shape[2], size[1], image.device).T)
    if image.shape[1] != size[0]:
        values = _round(_weights(image.shape[1], size[0], image.device) @ values)
    return values.to(torch.uint8)


def _round(values: torch.Tensor) -> torch.Tensor:
    """Divide by the unit of the weights, and round to 8 bits."""
    return ((values + _PRECISION // 2) / _PRECISION).floor_().clamp_(0, 255)


def resize_in_square(
    image: torch.Tensor,
    side: int,
    fill: Sequence[int],
    resize: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    precision: int | None,
) -> torch.Tensor:
    """Resize an image in the middle of a square of one color, without making the square.

    The square of a 12000 x 40 image has 300 times as many pixels as the image. The result is bit-identical to that of
    padding to the square first, because resizing takes the horizontal axis first, rounds to 8 bits in between, and
    does not change an area of one color.

    `resize` is the bicubic resize to a `(height, width)`, called for the long axis only; `precision` is the number of
    bits of its integer weights (`None`: the most with which the largest weight fits into 15 bits, as in PyTorch).
    Takes and returns uint8 RGB on the CPU.
    """
    height, width = image.shape[1:]
    square = image.new_tensor(fill)[:, None, None].repeat(1, side, side)
    if width >= height:
        rows = resize(image, (height, side)).numpy().transpose(1, 0, 2)
        start, rows = _resize_between(rows, width, side, fill, precision)
        square[:, start : start + len(rows)] = torch.from_numpy(rows).permute(1, 0, 2)
    else:
        columns = image.numpy().transpose(2, 0, 1)
        start, columns = _resize_between(columns, height, side, fill, precision)
        strip = torch.from_numpy(columns).permute(1, 2, 0).contiguous()
        square[:, :, start : start + len(columns)] = resize(strip, (side, len(columns)))
    return square


def _resize_between(
    image: np.ndarray, length: int, new_length: int, fill: Sequence[int], precision: int | None
) -> tuple[int, np.ndarray]:
    """Resize the first axis of `(n, 3, m)` in the middle of `length` samples of one color.

    Returns the part of the new samples that the image reaches, and the index where it starts.
    """
    offset = (length - len(image)) // 2
    first, weights = _bicubic(length, new_length)
    if precision is None:
        precision = next(bits for bits in range(22, -1, -1) if int(weights.max() * 2**bits + 0.5) < 2**15)
    whole = np.trunc(weights * 2**precision + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    end = first + whole.shape[1]
    start, stop = np.searchsorted(end, offset, "right"), np.searchsorted(first, offset + len(image), "left")
    # The sum as if all samples had the color, to which the differences of the image's samples are added.
    color = np.array(fill, np.int32)[:, None]
    total = 2**precision // 2 + whole[start:stop].sum(axis=1, dtype=np.int32)[:, None, None] * color
    total = np.repeat(total, image.shape[2], axis=2)
    for sample, values in enumerate(image, start=offset):
        reached = slice(np.searchsorted(end, sample, "right"), np.searchsorted(first, sample, "right"))
        weight = whole[reached][np.arange(reached.stop - reached.start), sample - first[reached]]
        total[reached.start - start : reached.stop - start] += weight[:, None, None] * (values - color)
    return int(start), np.clip(total >> precision, 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _bicubic(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Make the bicubic weights of one axis: the first sample of each new one, and an array `(new, taps)`."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(new_length) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), length)
    samples = first[:, None] + np.arange(int((end - first).max()))
    x = np.abs((samples - centers[:, None] + 0.5) * (1 / stretch))
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
    weights = np.where(samples < end[:, None], weights, 0.0)
    return first, weights / np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds in the order of the C code


class UprightImageProcessor(BaseImageProcessor):
    """Base class of a family's image processors on both backends: images of any form, remote code, resizing."""

    # Where remote code finds the image processor of each backend.
    remote_classes: ClassVar[Mapping[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Name the classes of both backends in `auto_map`, where the base class names only the one that is saved."""
        values = super().to_dict()
        if (values.get("auto_map") or {}).get("AutoImageProcessor") in self.remote_classes.values():
            values["auto_map"] = {"AutoImageProcessor": dict(self.remote_classes)}
        return values

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]  # the options by name
        """Check the options, before any image is opened; raise a `ValueError` if they contradict each other."""
        if kwargs.get("do_normalize") and not kwargs.get("do_rescale"):
            raise ValueError(
                "`do_rescale` must be True when `do_normalize` is, got False. Images are kept in 8 bits until then; "
                "floating point images between 0 and 1 are recognized."
            )
        data_format = kwargs.get("data_format")
        if data_format is not None and ChannelDimension(data_format) != ChannelDimension.FIRST:
            raise ValueError(
                f"`data_format` must be 'channels_first', which the model reads, got {data_format!r}. That of the "
                "images is `input_data_format`."
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def check_one_shape(self, pixels: Sequence[Any], return_tensors: Any, options: Mapping[str, Any]) -> None:
        """Raise a `ValueError` for pixels of several shapes that shall become one tensor; `options` were used."""
        shapes = sorted({tuple(image.shape) for image in pixels})
        if return_tensors is not None and len(shapes) > 1:
            given = ", ".join(f"`{name}={options[name]}`" for name in ("do_resize", "do_center_crop"))
            raise ValueError(
                f"`return_tensors` must be None for images of several shapes, got {return_tensors!r} and "
                f"{', '.join(map(str, shapes[:4]))}, with {given}. Crop the images to one size, or pass one image."
            )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open an image or a (nested) list of images, and turn them upright.

        They become PIL images in RGB, or stay arrays and tensors of 3 or 4 dimensions.
        """
        return fetch_upright(image_url_or_urls)

    def fetch_at_least_one(self, images: Any) -> Any:
        """Do as `fetch_images`, and raise a `ValueError` if there are no images."""
        opened = self.fetch_images(images)
        if not flat_images(opened):
            raise ValueError(f"`images` must hold at least one image, got {images!r}.")
        return opened

    def resize_tensor(self, image: torch.Tensor, height: int, width: int, resample: Any) -> torch.Tensor:
        """Resize an image of shape `(channels, height, width)` with the backend."""
        backend: Any = self
        given: Any = image.numpy() if backend.backend == "pil" else image
        return torch.as_tensor(backend.resize(given, SizeDict(height=height, width=width), resample))


__all__ = [
    "IMAGE_KEYS",
    "UnreadableImageError",
    "UprightImageProcessor",
    "as_rgb",
    "binary_file",
    "fetch_upright",
    "flat_images",
    "group_sizes",
    "image_block",
    "is_image_block",
    "load_upright",
    "make_findable",
    "open_image",
    "open_images",
    "resize_by_products",
    "resize_in_square",
    "resize_like_pil",
    "shown",
    "upright",
]
