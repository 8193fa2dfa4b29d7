"""Frames transform pictures and boxes like the processor of each model."""

import numpy as np
import pytest
import torch
from PIL import Image

from mgllava import MGLlavaImageProcessor, RamPlusImageProcessor
from small_world.frames import centered_frame, cornered_frame, squeezed_frame

WIDTH, HEIGHT, SIZE = 320, 200, 160
BOX = np.array([[200.0, 60.0, 280.0, 120.0]])


@pytest.fixture(scope="module")
def picture():
    """A black picture with a green rectangle at `BOX`."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    left, top, right, bottom = BOX[0].astype(int)
    pixels[top:bottom, left:right] = (0, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("make_frame", [centered_frame, cornered_frame, squeezed_frame])
def test_boxes_follow_the_pixels(picture, make_frame):
    frame = make_frame(SIZE)
    pixels = frame.pixels(picture)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, SIZE, SIZE))
    green = pixels[1].astype(int) - pixels[0] > 128
    rows, columns = np.flatnonzero(green.any(1)), np.flatnonzero(green.any(0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(frame.boxes(BOX, WIDTH, HEIGHT)[0] - found).max() <= 1


def test_pixels_equal_those_of_the_models_processors(picture):
    side = {"height": SIZE, "width": SIZE}
    for frame, processor in (
        (centered_frame(SIZE), MGLlavaImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)),
        (squeezed_frame(SIZE), RamPlusImageProcessor(size=side)),
    ):
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        torch.testing.assert_close((torch.tensor(frame.pixels(picture)) / 255 - mean) / std, expected)


def test_the_frame_of_the_detector_is_padded_with_gray_at_the_bottom(picture):
    pixels = cornered_frame(SIZE).pixels(picture)
    edge = round(SIZE * HEIGHT / WIDTH)
    assert np.abs(pixels[:, edge + 2 :].astype(int) - 128).max() <= 1
    assert (pixels[:, : edge - 2] == 0).any()
