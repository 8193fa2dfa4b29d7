"""Pillow's bilinear resize of 8-bit images, as it was in 2024 and on any device.

torchvision's resize differs from it by one of 255 levels here and there, and so does Pillow's own of today on portrait
images: it then takes the vertical axis first where that is cheaper, and each axis rounds to 8 bits.
"""

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
