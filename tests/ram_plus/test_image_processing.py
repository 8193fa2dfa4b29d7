"""Both image processors of RAM++: the original's pixels and options. tests/processing checks how they open images."""

import base64

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor

from mgllava import RamPlusImageProcessor, RamPlusImageProcessorPil
from tests.ram_plus.golden import arrays, image_path

BACKENDS = [RamPlusImageProcessorPil, RamPlusImageProcessor]
SIZE = {"height": 128, "width": 128}
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
LEVEL = 1 / 255 / 0.224  # one 8-bit level after normalization, at most


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raw(image_processor, *images, **kwargs):
    return image_processor(list(images), **RAW, **kwargs)["pixel_values"]


@pytest.mark.parametrize("index", range(5))
def test_against_the_original(index):
    expected = arrays(f"ram_img{index}")["pixel_values"]
    exact = RamPlusImageProcessorPil(size=SIZE)(image_path(index), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)

    default = RamPlusImageProcessor(size=SIZE)(image_path(index), return_tensors="pt")["pixel_values"][0]
    difference = (default - expected).abs()
    assert difference.max() < LEVEL + 1e-5
    assert (difference > 1e-5).float().mean() < 0.041
    assert difference.mean() < 7.1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_size_is_the_default(backend):
    assert backend()(noise(20, 30), return_tensors="pt")["pixel_values"].shape == (1, 3, 384, 384)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_equals_one_by_one(backend):
    image_processor, paths = backend(size=SIZE), [image_path(index) for index in range(5)]
    together = image_processor(paths, return_tensors="pt")["pixel_values"]
    alone = [image_processor(path, return_tensors="pt")["pixel_values"] for path in paths]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_data_format_is_used(backend):
    ambiguous = noise(3, 3)
    image_processor = backend(size={"height": 3, "width": 3})
    last = raw(image_processor, ambiguous, input_data_format="channels_last")[0]
    assert torch.equal(last, torch.from_numpy(ambiguous).permute(2, 0, 1))
    first = raw(image_processor, ambiguous, input_data_format="channels_first")[0]
    assert torch.equal(first, torch.from_numpy(ambiguous))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_ignored_by_default(backend, tmp_path):
    stored = PIL.Image.fromarray(noise(8, 8))
    exif = stored.getexif()
    exif[0x0112] = 6  # viewers turn it clockwise
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = torch.from_numpy(np.array(stored.transpose(PIL.Image.Transpose.ROTATE_270))).permute(2, 0, 1)
    as_stored = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
    image_processor = backend(size={"height": 8, "width": 8})
    path = tmp_path / "turned.png"
    for image in (path, PIL.Image.open(path), path.read_bytes(), base64.b64encode(path.read_bytes()).decode()):
        assert torch.equal(raw(image_processor, image)[0], as_stored)
        assert torch.equal(raw(image_processor, image, do_exif_transpose=True)[0], upright)


@pytest.mark.parametrize(("backend", "expected"), [("pil", BACKENDS[0]), ("torchvision", BACKENDS[1])])
def test_options_are_saved(tmp_path, backend, expected):
    expected(size=SIZE, do_exif_transpose=True).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is expected
    assert loaded.do_exif_transpose is True and dict(loaded.size) == SIZE
