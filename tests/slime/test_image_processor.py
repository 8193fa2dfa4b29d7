"""Options and pictures that the image processors of SliME meet; the original's pixels are in `test_golden.py`."""

import numpy as np
import pytest
import torch

from mgllava import SlimeImageProcessor, SlimeImageProcessorPil
from tests.processing.test_image_processing import noise

BACKENDS = [SlimeImageProcessor, SlimeImageProcessorPil]
SMALL = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


@pytest.fixture(scope="module", params=BACKENDS)
def processor(request):
    return request.param(**SMALL)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"do_resize": False}, "`do_resize` must be True where `do_tile` is True"),
        ({"do_center_crop": False}, "`do_center_crop` must be True where `do_tile` is True"),
        ({"do_pad": True}, "`do_pad` must be False where `do_tile` is True"),
        ({"size": {"shortest_edge": 29}}, "`size` and `crop_size` must be one square"),
        ({"size": {"shortest_edge": 28, "longest_edge": 56}}, "`size` and `crop_size` must be one square"),
        ({"crop_size": {"height": 28, "width": 14}}, "`size` and `crop_size` must be one square"),
        ({"do_rescale": False}, "`do_rescale` must be True when `do_normalize` is"),
        ({"data_format": "channels_last"}, "`data_format` must be 'channels_first'"),
    ],
)
def test_options_that_tiles_cannot_follow_are_refused(processor, options, problem):
    with pytest.raises(ValueError, match=problem):
        processor(noise(30, 40), **options)


def test_one_view_follows_the_options(processor):
    image = noise(30, 40)
    views = processor(image, do_tile=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    assert views.shape == (1, 3, 28, 37)
    assert processor(image, do_tile=False, do_resize=False, do_center_crop=False)["pixel_values"][0].shape[1:] == (
        30,
        40,
    )
    padded = processor(image, do_tile=False, do_pad=True, pad_size={"height": 40, "width": 40}, return_tensors="pt")
    assert padded["pixel_values"].shape == (1, 3, 40, 40)


def test_views_of_several_shapes_are_no_tensor(processor):
    images, options = [noise(30, 40), noise(40, 30)], {"do_tile": False, "do_center_crop": False}
    assert len(processor(images, **options)["pixel_values"]) == 2
    with pytest.raises(ValueError, match="`return_tensors` must be None for images of several shapes"):
        processor(images, **options, return_tensors="pt")


def test_no_value_for_an_option_is_its_default(processor):
    image = noise(30, 40)
    expected = processor(image, return_tensors="pt")
    assert torch.equal(processor(image, do_tile=None, return_tensors="pt")["image_grids"], expected["image_grids"])
    assert len(expected["pixel_values"]) == 1 + int(np.prod(expected["image_grids"].tolist()))


def test_no_images_are_named(processor):
    for images in ([], [[], []]):
        with pytest.raises(ValueError, match="`images` must hold at least one image"):
            processor(images, return_tensors="pt")
