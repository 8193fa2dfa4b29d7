"""The square input frames of the models: pixels of a picture, coordinates of its boxes, and cells of a grid."""

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
    """A square of `size` pixels that pictures are fitted into."""

    name: str
    size: int
    # From a picture (RGB) to uint8 of shape `(3, size, size)`.
    pixels: Callable[[Image.Image], np.ndarray]
    # From boxes (xyxy in pixels of the picture), width and height of the picture to boxes in pixels of the square.
    boxes: Callable[[np.ndarray, int, int], np.ndarray]


def centered_frame(size: int) -> Frame:
    """Return the frame of MG-LLaVA's image processor, which pads a picture on both sides."""
    side = {"height": size, "width": size}
    processor = MGLlavaImageProcessor(size={"shortest_edge": size}, crop_size=side, **_PIXELS_ONLY)

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        shift = [max(height - width, 0) // 2, max(width - height, 0) // 2] * 2
        return (values + shift) * (size / max(width, height))

    return Frame("centered", size, lambda picture: processor(picture)["pixel_values"][0].numpy(), boxes)


def cornered_frame(size: int) -> Frame:
    """Return the frame of OWLv2 in the box detector, which pads a picture on the right or at the bottom."""

    def pixels(picture: Image.Image) -> np.ndarray:
        values = square_pixels(pil_to_tensor(picture), (size, size), [0.0] * 3, [1 / 255] * 3, torch.device("cpu"))
        return values.round().clamp(0, 255).to(torch.uint8).numpy()

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        return values * (size / max(width, height))

    return Frame("cornered", size, pixels, boxes)


def squeezed_frame(size: int) -> Frame:
    """Return the frame of RAM++, which changes the aspect ratio of a picture."""
    processor = RamPlusImageProcessor(size={"height": size, "width": size}, **_PIXELS_ONLY)

    def boxes(values: np.ndarray, width: int, height: int) -> np.ndarray:
        return values * np.array([size / width, size / height] * 2)

    return Frame("squeezed", size, lambda picture: processor(picture)["pixel_values"][0].numpy(), boxes)


def cells_of_centers(boxes: torch.Tensor, grid: int, image_size: int) -> torch.Tensor:
    """Return the indices, counted row by row, of the `grid` x `grid` cells that contain the centers of boxes.

    `boxes` has the shape `(..., 4)` and holds xyxy in pixels of a square of `image_size` pixels.
    """
    column, row = ((boxes[..., :2] + boxes[..., 2:]) / 2 * grid / image_size).long().clamp(0, grid - 1).unbind(-1)
    return row * grid + column
