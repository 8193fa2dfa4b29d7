"""What transformers expects of every image processor, under the names that its `ImageProcessingTestMixin` uses.

Both of MG-LLaVA's and both of RAM++'s. Not repeated here is what test_image_processing.py states already;
docs/testing.md lists all names.
"""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, BatchFeature

from mgllava import (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
)

SMALL = {"size": {"shortest_edge": 18}, "crop_size": {"height": 18, "width": 18}}
FAMILIES = {
    "mgllava": (MGLlavaImageProcessor, MGLlavaImageProcessorPil, SMALL, 18),
    "ram_plus": (RamPlusImageProcessor, RamPlusImageProcessorPil, {"size": {"height": 24, "width": 24}}, 24),
}
PROCESSORS = {f"{name}-{backend}": (name, backend) for name in FAMILIES for backend in ("torchvision", "pil")}


@pytest.fixture(params=PROCESSORS)
def family(request):
    """The class, its options and the side of what it makes."""
    name, backend = PROCESSORS[request.param]
    torchvision, pil, options, side = FAMILIES[name]
    return torchvision if backend == "torchvision" else pil, options, side


def pictures(seed=0, sizes=((20, 30), (41, 17), (18, 18))):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


@pytest.mark.parametrize("name", FAMILIES)
def test_backends_equivalence_batched(name):
    torchvision, pil, options, _ = FAMILIES[name]
    images = [PIL.Image.fromarray(picture) for picture in pictures()]
    first, second = (backend(**options)(images, return_tensors="pt") for backend in (torchvision, pil))
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        torch.testing.assert_close(first[key], second[key], atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_load_backends_auto(name, tmp_path):
    torchvision, pil, options, _ = FAMILIES[name]
    for saved in (torchvision, pil):
        saved(**options).save_pretrained(tmp_path)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is torchvision
        for backend, expected in (("torchvision", torchvision), ("pil", pil)):
            loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
            assert type(loaded) is expected
            assert dict(loaded.size) == options["size"]


def test_image_processor_from_and_save_pretrained(family, tmp_path):
    backend, options, _ = family
    first = backend(**options, do_normalize=False)
    first.save_pretrained(tmp_path)
    second = backend.from_pretrained(tmp_path)
    changing = ("auto_map", "_processor_class")
    assert {k: v for k, v in second.to_dict().items() if k not in changing} == {
        k: v for k, v in first.to_dict().items() if k not in changing
    }
    assert second.do_normalize is False


def test_image_processor_to_json_file(family, tmp_path):
    backend, options, _ = family
    first = backend(**options)
    first.to_json_file(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values == json.loads(first.to_json_string())
    assert values["size"] == options["size"]
    assert backend.from_json_file(tmp_path / "config.json").to_dict() == first.to_dict()


def test_image_processor_from_dict_with_kwargs(family):
    backend, options, _ = family
    values = backend(**options).to_dict()
    assert dict(backend.from_dict(values).size) == options["size"]
    assert backend.from_dict(values, do_resize=False).do_resize is False


def test_init_without_params(family):
    backend, _, _ = family
    values = json.loads(backend().to_json_string())
    assert values["size"] and len(values["image_mean"]) == len(values["image_std"]) == 3


@pytest.mark.parametrize("form", ["pil", "numpy", "pytorch"])
def test_call(family, form):
    backend, options, side = family
    processor = backend(**options)
    convert = {
        "pil": PIL.Image.fromarray,
        "numpy": lambda picture: picture,
        "pytorch": lambda picture: torch.from_numpy(picture).permute(2, 0, 1),
    }[form]
    images = [convert(picture) for picture in pictures()]
    batch = processor(images, return_tensors="pt")["pixel_values"]
    assert batch.shape == (3, 3, side, side) and batch.dtype == torch.float32
    for index, image in enumerate(images):
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], batch[index])


@pytest.mark.parametrize(("given", "kind"), [("pt", torch.Tensor), ("np", np.ndarray)])
def test_return_tensors(family, given, kind):
    backend, options, side = family
    pixels = backend(**options)(pictures()[0], return_tensors=given)["pixel_values"]
    assert isinstance(pixels, kind) and pixels.shape == (1, 3, side, side)


def test_cast_dtype_device(family):
    backend, options, _ = family
    features = backend(**options)(pictures()[0], return_tensors="pt")
    assert isinstance(features, BatchFeature)
    assert features.to(torch.float16)["pixel_values"].dtype == torch.float16
    assert features.to("cpu", dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    with pytest.raises(TypeError):
        features.to(torch.bfloat16, "cpu")


def test_call_numpy_4_channels(family):
    """Alpha is dropped, as the originals drop it: the fourth channel decides nothing."""
    backend, options, _ = family
    processor, picture = backend(**options), pictures()[0]
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    for alpha in (0, 255):
        rgba = np.concatenate([picture, np.full_like(picture[..., :1], alpha)], axis=-1)
        assert torch.equal(processor(rgba, return_tensors="pt")["pixel_values"], expected)


def test_convert_to_rgb_mixed_input_batch(family):
    backend, options, side = family
    rgb = PIL.Image.fromarray(pictures()[0])
    batch = [rgb, rgb.convert("RGBA"), rgb.convert("L"), np.asarray(rgb.convert("L"))]
    pixels = backend(**options)(batch, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, side, side)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[2], pixels[3])


def test_override_instance_attributes_does_not_affect_other_instances(family):
    backend, _, _ = family
    first, second = backend(), backend()
    first.image_mean = [value + 0.25 for value in first.image_mean]
    assert second.image_mean != first.image_mean and backend().image_mean == second.image_mean


def test_explicit_none_preserved(family, tmp_path):
    """A file that says `null` is not overruled by the defaults of the class."""
    backend, _, _ = family
    processor = backend()
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": None}))
    assert backend.from_pretrained(tmp_path).do_normalize is None
