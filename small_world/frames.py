"""How each model lays a picture into its square: pixels, where boxes come to lie, and in which cells of a grid."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from mgllava import MGLlavaImageProcessor, RamPlusImageProcessor
from mgllava.processing.owlv2_detection_mgllava import square_pixels

_PIXELS_ONLY = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class Frame:
    """A square that pictures are laid into.

    Args:
        name (`str`): Tells frames apart.
        size (`int`): Side of the square, in pixels.
        pixels (`Callable`): From a picture (RGB) to uint8 of shape `(3, size, size)`.
        boxes (`Callable`): From boxes (xyxy in pixels of the picture), width and height of the picture to boxes in
            pixels of the square.
    """

    name: str
    size: int
    pixels: Callable[[Image.Image], np.ndarray]
    boxes: Callable[[np.ndarray, int, int], np.ndarray]


def centered_frame(size: int) -> Frame:
    """Lay a picture into the middle, as MG-LLaVA's image processor does."""
    side = {"height": size, "width": size}
    processor = MGLlavaImageProcessor(size={"shortest_edge": size}, crop_size=side, **_PIXELS_ONLY)

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        shift = [max(height - width, 0) // 2, max(width - height, 0) // 2] * 2
        return (values + shift) * (size / max(width, height))

    return Frame("centered", size, lambda picture: processor(picture)["pixel_values"][0].numpy(), boxes)


def cornered_frame(size: int) -> Frame:
    """Lay a picture into the left upper corner, as the box detector does for OWLv2."""

    def pixels(picture: Image.Image) -> np.ndarray:
        values = square_pixels(pil_to_tensor(picture), (size, size), [0.0] * 3, [1 / 255] * 3, torch.device("cpu"))
        return values.round().clamp(0, 255).to(torch.uint8).numpy()

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        return values * (size / max(width, height))

    return Frame("cornered", size, pixels, boxes)


def squeezed_frame(size: int) -> Frame:
    """Squeeze a picture to the square, as RAM++ does."""
    processor = RamPlusImageProcessor(size={"height": size, "width": size}, **_PIXELS_ONLY)

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        return values * np.array([size / width, size / height] * 2)

    return Frame("squeezed", size, lambda picture: processor(picture)["pixel_values"][0].numpy(), boxes)


def cells_of_centers(boxes: torch.Tensor, grid: int, image_size: int) -> torch.Tensor:
    """Number the cells that the centers of boxes lie in.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): x1, y1, x2, y2 in pixels of the square.
        grid (`int`): Cells along a side of the square.
        image_size (`int`): Side of the square.

    Returns:
        `torch.LongTensor` of shape `(...)`: Numbers, counted row by row.
    """
    column, row = ((boxes[..., :2] + boxes[..., 2:]) / 2 * grid / image_size).long().clamp(0, grid - 1).unbind(-1)
    return row * grid + column
