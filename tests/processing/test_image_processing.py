"""Both image processor backends against the original's pixels and against PIL by hand."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers import AutoImageProcessor

from mgllava.processing import MGLlavaImageProcessor, MGLlavaImageProcessorPil, image_processing_mgllava

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"] if case["kind"] == "image"]
BACKENDS = [MGLlavaImageProcessorPil, MGLlavaImageProcessor]
SMALL = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
RAW = {"do_rescale": False, "do_normalize": False}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def inputs_of(case):
    raw = {"boxes": case["raw_boxes"], "labels": case["raw_labels"], "scores": case["raw_scores"]}
    return {
        "images": GOLDEN / case["image"],
        "boxes": [raw],
        "do_pad": case["pad_image_to_square"],
        "iou_threshold": case["iou_threshold"],
        "box_limit_mode": case["limit_mode"],
        "box_limit": case["limit_num"],
        "return_box_labels": True,
        "return_tensors": "pt",
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_against_the_original(case):
    expected = load_file(GOLDEN / "cases" / f"{case['name']}.safetensors")
    pil = MGLlavaImageProcessorPil()(**inputs_of(case))
    torch.testing.assert_close(
        pil["pixel_values"][0][:, 8::16, 8::16], expected["pixel_values_aux_s16"], atol=1e-6, rtol=0
    )

    default = MGLlavaImageProcessor()(**inputs_of(case))
    difference = (default["pixel_values"] - pil["pixel_values"]).abs()
    assert difference.max() < 0.03  # two 8-bit levels
    assert (difference > 1e-4).float().mean() < 0.004
    assert difference.mean() < 6e-5

    for features in (pil, default):
        assert features["boxes"].dtype == torch.int64 and features["num_boxes"].dtype == torch.int64
        assert features["boxes"][0].tolist() == case["boxes"]
        assert features["num_boxes"].tolist() == [case["n_boxes"]]
        assert features["box_labels"] == [case["labels"]]


def test_pil_backend_equals_the_original_in_8_bits():
    pixels = MGLlavaImageProcessorPil()(GOLDEN / "images" / "landscape.png", **RAW)["pixel_values"][0]
    expected = np.array(PIL.Image.open(GOLDEN / "cases" / "landscape_basic_aux_uint8.png"))
    np.testing.assert_array_equal(np.moveaxis(pixels, 0, -1), expected)


def padded_then_resized(image, side, backend):
    """Pad an image to a square of the mean color, then resize the square."""
    height, width = image.shape[:2]
    length = max(height, width)
    square = np.empty((length, length, 3), np.uint8)
    square[:] = 122, 116, 104
    top, left = (length - height) // 2, (length - width) // 2
    square[top : top + height, left : left + width] = image
    if backend is MGLlavaImageProcessorPil:
        resized = PIL.Image.fromarray(square).resize((side, side), PIL.Image.Resampling.BICUBIC)
        return np.array(resized).transpose(2, 0, 1)
    pixels = torch.from_numpy(square).permute(2, 0, 1)
    return resize(pixels, (side, side), InterpolationMode.BICUBIC, antialias=True).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_any_shape_are_resized_as_in_their_square(backend):
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (31, 47), (1, 3), (1, 2000), (47, 95), (211, 773), (300, 768), (3, 1500)]
    sizes += [(int(rng.integers(1, 60)), int(rng.integers(130, 900))) for _ in range(24)]
    for number, (short, long) in enumerate(sizes):
        side = (16, 48, 336, 201)[number % 4]
        image = noise(*((short, long) if number % 2 else (long, short)), seed=number)
        if number % 3 == 0:
            image = np.where(image > 127, 255, 0).astype(np.uint8)  # overshoots
        processor = backend(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        pixels = np.asarray(processor(PIL.Image.fromarray(image), **RAW)["pixel_values"][0])
        np.testing.assert_array_equal(
            pixels, padded_then_resized(image, side, backend), err_msg=f"{image.shape} {side}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_square_of_a_long_image_is_never_made(backend, monkeypatch):
    """It would take 120 gigabytes."""
    monkeypatch.setattr(image_processing_mgllava, "pad_to_square", None)
    for shape in ((2, 200_000), (200_000, 2)):
        pixels = backend(**SMALL)(PIL.Image.fromarray(noise(*shape)), **RAW)["pixel_values"][0]
        assert np.asarray(pixels).shape == (3, 48, 48)
        assert np.asarray(pixels)[:, 0, 0].tolist() == [122, 116, 104]


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_applied_and_boxes_are_in_the_upright_frame(backend, tmp_path):
    upright = PIL.Image.fromarray(noise(20, 40))
    stored = upright.transpose(PIL.Image.Transpose.ROTATE_90)  # orientation 6: turn by 270° to see it
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    processor = backend(**SMALL)
    box = [[0, 0, 40, 20]]
    expected = processor(upright, boxes=[box])
    for given in (tmp_path / "turned.png", PIL.Image.open(tmp_path / "turned.png")):
        features = processor(given, boxes=[box])
        np.testing.assert_array_equal(np.asarray(features["pixel_values"][0]), np.asarray(expected["pixel_values"][0]))
        assert features["boxes"][0].tolist() == expected["boxes"][0].tolist() == [[0, 12, 48, 36]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_are_padded_with_zeros_and_counted(backend):
    images = [PIL.Image.fromarray(noise(10, 10, seed=i)) for i in range(3)]
    boxes = [[[0, 0, 5, 5], [1, 1, 9, 9]], None, [[2, 2, 4, 4]]]
    features = backend(**SMALL)(images, boxes=boxes, return_tensors="pt")
    assert features["pixel_values"].shape == (3, 3, 48, 48)
    assert features["num_boxes"].tolist() == [2, 1, 1]
    assert features["boxes"].shape == (3, 2, 4)
    assert features["boxes"][:, 1].tolist() == [[5, 5, 43, 43], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert "box_labels" not in features
    nested = backend(**SMALL)([images[:1], images[1:]], boxes=[boxes[:1], boxes[1:]], return_tensors="pt")
    torch.testing.assert_close(dict(nested), dict(features))


def test_default_limit_and_settings_survive_saving(tmp_path):
    processor = MGLlavaImageProcessor(box_limit=None, iou_threshold=0.5, box_limit_mode="per_image", **SMALL)
    processor.save_pretrained(tmp_path)
    for name, backend in zip(("pil", "torchvision"), BACKENDS, strict=True):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is backend
        assert (loaded.box_limit, loaded.iou_threshold, loaded.box_limit_mode) == (None, 0.5, "per_image")
        assert dict(loaded.size) == SMALL["size"]
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "MGLlavaImageProcessor"
    assert not {"boxes", "close_to_max_length", "return_box_labels"} & set(saved)
    assert MGLlavaImageProcessorPil().to_dict()["image_processor_type"] == "MGLlavaImageProcessor"
    assert MGLlavaImageProcessor.model_input_names == ["pixel_values", "boxes", "num_boxes"]


def test_close_to_max_length_keeps_one_box_per_label():
    raw = {
        "boxes": [[0, 0, 5, 5], [50, 50, 60, 60], [20, 20, 30, 30]],
        "labels": ["a", "a", "b"],
        "scores": [0.9, 0.8, 1],
    }
    features = MGLlavaImageProcessor(**SMALL)(
        noise(100, 100), boxes=[raw], close_to_max_length=True, return_box_labels=True
    )
    assert features["box_labels"] == [["b", "a"]]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_no_cast_of_floating_point_inputs_rounds_boxes(cast):
    features = MGLlavaImageProcessor()(noise(767, 767), boxes=[[[1, 2, 763, 765]]], return_tensors="pt")
    cast_by_us = features.to("cpu", cast)
    cast_by_others = {  # as DeepSpeed, FSDP and serving engines do
        name: value.to(cast) if value.is_floating_point() else value for name, value in features.items()
    }
    for inputs in (cast_by_us, cast_by_others):
        assert inputs["pixel_values"].dtype == cast
        assert inputs["boxes"][0].tolist() == [[1, 2, 764, 766]]


def test_boxes_in_a_dtype_that_has_rounded_them_give_a_warning(caplog):
    boxes = torch.tensor([[1.0, 2, 259, 263]], dtype=torch.bfloat16)
    processor = MGLlavaImageProcessor(**SMALL)
    with caplog.at_level("WARNING", logger="transformers_modules"), caplog.at_level("WARNING", logger="mgllava"):
        processor(noise(300, 300), boxes=[boxes.float()])
        assert "bfloat16" not in caplog.text
        processor(noise(300, 300), boxes=[{"boxes": boxes, "scores": [0.5]}])
    assert "`boxes[0]['boxes']` are bfloat16" in caplog.text


def test_ambiguous_channels_are_an_error_until_named():
    array = noise(3, 8, 3)
    processor = MGLlavaImageProcessor(**SMALL)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 3\).*input_data_format"):
        processor(array)
    last = processor(array, input_data_format="channels_last")["pixel_values"][0]
    first = processor(array, input_data_format="channels_first")["pixel_values"][0]
    assert not torch.equal(last, first)
    torch.testing.assert_close(last, processor(PIL.Image.fromarray(array))["pixel_values"][0])


def test_wrong_options_are_named():
    processor = MGLlavaImageProcessor(**SMALL)
    image = noise(9, 9)
    with pytest.raises(ValueError, match="`boxes` must have one entry per image, got 2 entries for 1 images"):
        processor(image, boxes=[[[0, 0, 1, 1]], []])
    with pytest.raises(ValueError, match=r"`boxes\[1\]` must hold finite"):
        processor([image, image], boxes=[None, [[0, 0, np.nan, 1]]])
    with pytest.raises(ValueError, match="`size` must be given as"):
        processor(image, size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match="`do_rescale` must be True"):
        processor(image, do_rescale=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_box_rows_are_padded_to_a_multiple(backend):
    boxes = [[[0, 0, 30, 30], [10, 10, 40, 40], [5, 5, 9, 9]], [[1, 2, 30, 40]]]
    images = [noise(60, 60), noise(50, 70)]
    plain = backend(**SMALL)(images, boxes=boxes, return_tensors="pt")
    for multiple, rows in ((1, 3), (3, 3), (4, 4), (8, 8)):
        padded = backend(**SMALL)(images, boxes=boxes, pad_boxes_to_multiple_of=multiple, return_tensors="pt")
        assert padded["boxes"].shape == (2, rows, 4)
        assert torch.equal(padded["boxes"][:, :3], plain["boxes"])
        assert not padded["boxes"][:, 3:].any()
        assert padded["num_boxes"].tolist() == [3, 1]
    assert backend(**SMALL, pad_boxes_to_multiple_of=8)(images[0], return_tensors="pt")["boxes"].shape == (1, 8, 4)
    with pytest.raises(ValueError, match=r"`pad_boxes_to_multiple_of` must be a positive number, got 0"):
        backend(**SMALL)(images, boxes=boxes, pad_boxes_to_multiple_of=0)
