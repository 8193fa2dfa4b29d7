"""Pixels for OWLv2 as the 2024 box files were made: grey square, Gaussian blur, linear zoom with mirrored edges.

transformers 5 pads with black and clamps the edges, which changes the boxes of every image that is not square. The
resize of 2024 is linear and separable, so it is one matrix per axis here, and runs where the detector runs.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

_PADDING = 0.5  # of pixels between 0 and 1, before they are normalised


@lru_cache(maxsize=8)
def resize_matrix(length: int, new_length: int, device: torch.device) -> torch.Tensor:
    """Make the matrix that resizes one axis.

    Args:
        length (`int`): Number of samples before.
        new_length (`int`): Number of samples after.
        device (`torch.device`): Where the matrix is wanted.

    Returns:
        `torch.Tensor`: fp32 of shape `(new_length, length)`; each row sums to one.
    """
    # Not every accelerator has float64, in which the weights are worked out.
    computed_on = device if device.type == "cuda" else torch.device("cpu")
    factor, last = length / new_length, length - 1
    centres = ((torch.arange(new_length, dtype=torch.float64, device=computed_on) + 0.5) * factor - 0.5).abs()
    centres = torch.where(centres > last, 2 * last - centres, centres).clamp(min=0)
    left = centres.floor().clamp(max=max(last - 1, 0))
    right_weight = centres - left

    sigma = max((factor - 1) / 2, 0.0)
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device=computed_on)
    blur = torch.exp(-offsets.square() / (2 * sigma**2)) if radius else torch.ones_like(offsets)
    blur = blur / blur.sum()

    matrix = torch.zeros(new_length, length, dtype=torch.float64, device=computed_on)
    for samples, weights in ((left, 1 - right_weight), ((left + 1).clamp(max=last), right_weight)):
        columns = _mirror((samples[:, None] + offsets).long(), last)
        matrix.scatter_add_(1, columns, weights[:, None] * blur)
    return matrix.to(device=device, dtype=torch.float32)


def _mirror(index: torch.Tensor, last: int) -> torch.Tensor:
    """Fold indices back into `0..last`, without repeating the first and the last sample."""
    index = index.abs() % max(2 * last, 1)
    return torch.where(index > last, 2 * last - index, index)


def square_pixels(
    image: torch.Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> torch.Tensor:
    """Pad an image to a square at its right and bottom, resize and normalise it.

    Args:
        image (`torch.Tensor`): uint8 RGB of shape `(3, height, width)`.
        size (`tuple[int, int]`): `(height, width)` after resizing.
        mean (`Sequence[float]`): Per channel, of pixels between 0 and 1.
        std (`Sequence[float]`): Per channel.
        device (`torch.device`): Where to compute; the image is moved there in 8 bits.

    Returns:
        `torch.Tensor`: fp32 of shape `(3, *size)` on `device`.
    """
    height, width = image.shape[1:]
    side = max(height, width)
    # Rows of the matrices sum to one, so the grey part is an offset and takes no part in the products.
    rows = resize_matrix(side, size[0], device)[:, :height]
    columns = resize_matrix(side, size[1], device)[:, :width].T
    pixels = image.to(device).float().mul_(1 / 255).sub_(_PADDING)
    pixels = rows @ (pixels @ columns) if width >= height else (rows @ pixels) @ columns
    scale = pixels.new_tensor(std).reciprocal()[:, None, None]
    shift = (_PADDING - pixels.new_tensor(mean))[:, None, None]
    return pixels.add_(shift).mul_(scale)
