"""Resizing 8-bit images exactly as other code does, where calling that code would not do.

Pillow's bilinear resize as it was in 2024, on any device: torchvision's differs from it by one of 255 levels here and
there, and so does Pillow's own of today on portrait images, where it takes the vertical axis first if that is cheaper,
and each axis rounds to 8 bits. And the bicubic resize of a long, thin image in a square of one color, without the
square.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import PIL.Image
import torch

# Pillow's weights are whole numbers of this unit. Sums of them are exact in float64, in whatever order.
_PRECISION = 2**22


@lru_cache(maxsize=8)
def _weights(length: int, new_length: int, device: torch.device) -> torch.Tensor:
    """Make the float64 matrix of shape `(new_length, length)` that holds Pillow's integer weights of one axis."""
    scale = length / new_length
    support = max(scale, 1.0)  # the triangle is widened when shrinking
    centres = (torch.arange(new_length, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    samples = torch.arange(length, dtype=torch.float64, device=device)
    first = (centres - support + 0.5).trunc().clamp(min=0)
    end = (centres + support + 0.5).trunc().clamp(max=length)
    weights = (1 - ((samples - centres + 0.5) / support).abs()).clamp(min=0)
    weights = weights.masked_fill((samples < first) | (samples >= end), 0)
    return (weights / weights.sum(dim=1, keepdim=True) * _PRECISION + 0.5).floor()


def resize_like_pil(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize an 8-bit image with Pillow's bilinear filter, the horizontal axis first.

    Args:
        image (`torch.Tensor`): uint8 RGB of shape `(3, height, width)`.
        size (`tuple[int, int]`): `(height, width)` after resizing.

    Returns:
        `torch.Tensor`: uint8 of shape `(3, *size)`, on the GPU if the image is on a CUDA device, else on the CPU.
    """
    if image.device.type == "cuda":
        return resize_by_products(image, size)
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    for new_size in ((size[1], picture.height), (size[1], size[0])):
        picture = picture.resize(new_size, PIL.Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resize_by_products(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Do the same as one matrix product per axis: what a GPU is good at, and slow on a CPU.

    Args:
        image (`torch.Tensor`): uint8 of shape `(channels, height, width)`, on a device that has float64.
        size (`tuple[int, int]`): `(height, width)` after resizing.

    Returns:
        `torch.Tensor`: uint8 of shape `(channels, *size)`.
    """
    values = image.double()
    if image.shape[2] != size[1]:  # Pillow leaves an axis that keeps its length alone
        values = _round(values @ _weights(image.shape[2], size[1], image.device).T)
    if image.shape[1] != size[0]:
        values = _round(_weights(image.shape[1], size[0], image.device) @ values)
    return values.to(torch.uint8)


def _round(values: torch.Tensor) -> torch.Tensor:
    return ((values + _PRECISION // 2) / _PRECISION).floor_().clamp_(0, 255)


def resize_in_square(
    image: torch.Tensor,
    side: int,
    fill: Sequence[int],
    resize: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    precision: int | None,
) -> torch.Tensor:
    """Resize an image in the middle of a square of one color, which is never made.

    The result equals that of padding to the square first, to the bit: resizing takes the horizontal axis first and
    rounds to 8 bits in between, and what has one color keeps it. The square of a 12000 x 40 image has 300 times as
    many pixels as the image.

    Args:
        image (`torch.Tensor`): uint8 RGB of shape `(3, height, width)`, on the CPU.
        side (`int`): Length of both sides of the square after resizing.
        fill (`Sequence[int]`): Color of the square, one value per channel.
        resize (`Callable`): The bicubic resize to a `(height, width)`; called for the long axis only.
        precision (`int`, *optional*): Bits of that resize's integer weights; `None`: as many as let the largest weight
            fit into 15 bits, as PyTorch chooses them.

    Returns:
        `torch.Tensor`: uint8 of shape `(3, side, side)`.
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
    # As if all samples had the color, and then the difference where the image is.
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
    """Make the weights of one axis, widened when shrinking: the first sample of each new one, and `(new, taps)`."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(new_length) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), length)
    samples = first[:, None] + np.arange(int((end - first).max()))
    x = np.abs((samples - centers[:, None] + 0.5) * (1 / stretch))
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
    weights = np.where(samples < end[:, None], weights, 0.0)
    return first, weights / np.cumsum(weights, axis=1)[:, -1:]  # added one after the other, as C does
