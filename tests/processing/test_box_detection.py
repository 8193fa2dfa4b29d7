"""The box detector: golden boxes, batches, modes, labels, memory, errors."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput

from mgllava import BoxDetector
from mgllava.conversion import convert_ram_plus
from mgllava.processing import COCO_80, box_detection_mgllava
from mgllava.processing.box_detection_mgllava import tags_as_labels
from mgllava.processing.images_common import as_rgb, resize_by_products, resize_like_pil
from mgllava.processing.owlv2_detection_mgllava import resize_matrix, square_pixels

from .detectors import (
    CASES,
    EXPECTED,
    GOLDEN_RAM,
    OWLV2,
    assert_same_boxes,
    golden_image,
    grounding_dino,
    labels_of,
)

by_image = pytest.mark.parametrize("case", CASES, ids=lambda case: case["image"].split("/")[1][:4])
IMAGES = [golden_image(case) for case in CASES]
LABELS = [labels_of(case) for case in CASES]


def arrays_of(case):
    return np.load(GOLDEN_RAM / "expected" / f"owl_legacy_{case['image'].split('/')[1][:4]}.npz")


@pytest.fixture(scope="module")
def detector():
    return BoxDetector(None, OWLV2)


@pytest.fixture(scope="module")
def ram_plus(tmp_path_factory):
    """The golden tagger as a folder."""
    output = tmp_path_factory.mktemp("ram") / "tagger"
    ram = GOLDEN_RAM / "ram"
    return convert_ram_plus(
        checkpoint=ram / "ram_plus_tiny.pth",
        tag_list=ram / "data" / "ram_tag_list.txt",
        thresholds=ram / "data" / "ram_tag_list_threshold.txt",
        output=output,
        swin_config=ram / "configs" / "swin" / "config_swinL_384.json",
        decoder_config=ram / "configs" / "q2l_config.json",
    )


@by_image
def test_boxes_equal_the_original(detector, case):
    (found,) = detector.detect(GOLDEN_RAM / case["image"], labels_of(case))
    assert found["boxes"].dtype == torch.int64
    assert_same_boxes(found, case["result"])


def test_autocast_of_the_caller_does_not_round_boxes(detector):
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = detector.detect(GOLDEN_RAM / CASES[0]["image"], labels_of(CASES[0]))
    assert_same_boxes(found, CASES[0]["result"])


@by_image
def test_pixels_equal_the_original(detector, case):
    pixels = detector._detector.pixel_values([as_rgb(golden_image(case))])[0].numpy()
    np.testing.assert_allclose(pixels, arrays_of(case)["pixel_values"], rtol=0, atol=1e-6)


@by_image
def test_embeddings_logits_and_boxes_equal_the_original_on_its_pixels(detector, case):
    expected, owlv2 = arrays_of(case), detector._detector
    features = owlv2.image_features(torch.from_numpy(expected["pixel_values"])[None])
    embeds, mask = owlv2.prompt_embeds.get([case["prompts"]])
    assert mask.all()
    np.testing.assert_allclose(embeds[0], expected["text_embeds"], rtol=0, atol=1e-6)
    logits = owlv2.class_logits(features, [case["prompts"]])[0]
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    boxes = owlv2.patch_boxes(features[0], torch.arange(features.shape[1]))
    np.testing.assert_allclose(boxes, expected["pred_boxes"], rtol=0, atol=1e-5)


def test_tags_and_boxes_equal_the_original(ram_plus):
    detector = BoxDetector(ram_plus, OWLV2)
    for batch_size in (1, 8):
        for found, case in zip(detector.detect(IMAGES, batch_size=batch_size), CASES, strict=True):
            assert_same_boxes(found, case["result"])


def test_tagger_pixels_equal_the_original(ram_plus):
    tagger = BoxDetector(ram_plus, OWLV2)._tagger
    for index, image in enumerate(IMAGES):
        expected = np.load(GOLDEN_RAM / "expected" / f"ram_img{index}.npz")["pixel_values"]
        np.testing.assert_allclose(tagger.pixel_values([as_rgb(image)])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(100, 50), (480, 640), (31, 300), (300, 31), (7, 383), (128, 385), (2, 3), (1, 1)])
def test_resize_by_products_equals_pillow_to_the_bit(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    # One axis per call: so Pillow has no choice of the order, which newer versions make.
    wide = PIL.Image.fromarray(pixels).resize((128, size[1]), PIL.Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(wide.resize((128, 96), PIL.Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert torch.equal(resize_by_products(image, (96, 128)), expected)
    assert torch.equal(resize_like_pil(image, (96, 128)), expected)


def test_without_tags_faithful_looks_for_the_empty_prompt_and_clean_for_nothing(ram_plus, detector):
    image = GOLDEN_RAM / EXPECTED["no_tag"]["image"]
    tagging = BoxDetector(ram_plus, OWLV2)
    tagging._tagger.model.config.thresholds = [1.0] * 20
    assert_same_boxes(tagging.detect(image)[0], EXPECTED["no_tag"]["result"])
    assert_same_boxes(detector.detect(image, [[]])[0], EXPECTED["no_tag"]["result"])
    clean = BoxDetector(ram_plus, OWLV2, mode="clean")
    clean._tagger.model.config.thresholds = [1.0] * 20
    (found,) = clean.detect(image)
    assert found["labels"] == [] and found["boxes"].shape == (0, 4) and found["scores"].shape == (0,)


def test_tags_become_labels_as_in_the_original():
    assert tags_as_labels(["Red Bus", "dog,cat", " a "]) == ["red bus", "dog", "cat", "a"]
    assert tags_as_labels([]) == [""]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_of_mixed_sizes_and_tag_counts_equal_single_images(detector, batch_size):
    sizes = [(160, 120), (31, 300), (200, 64), (126, 126), (640, 480), (1, 1), (75, 101)]
    images = [IMAGES[index % 5].convert("RGB").resize(size) for index, size in enumerate(sizes)]
    counts = [1, 16, 3, 11, 2, 5, 7]
    labels = [LABELS[0][:count] for count in counts]
    together = detector.detect(images, labels, batch_size=batch_size)
    assert sum(len(found["labels"]) for found in together) > 20
    for image, own, found in zip(images, labels, together, strict=True):
        assert_same_boxes(found, detector.detect(image, own)[0], pixels=1)


def test_padding_of_shorter_label_lists_is_never_the_best_label(detector):
    logits = detector._detector.class_logits(torch.ones(2, 2, 48), [["a photo of x"], ["a photo of y", " "]])
    assert (logits[0, :, 1] == torch.finfo(torch.float32).min).all()
    alone = detector._detector.class_logits(torch.ones(1, 2, 48), [["a photo of x"]])
    torch.testing.assert_close(logits[:1, :, :1], alone)


def test_clean_boxes_are_the_faithful_ones_before_truncation_clipped_to_the_image(detector):
    clean = BoxDetector(None, OWLV2, mode="clean")
    num_dropped = 0
    for image, labels in zip(IMAGES, LABELS, strict=True):
        (raw,) = detector.detect(image, labels)
        (found,) = clean.detect(image, labels)
        width, height = image.size
        clipped = torch.minimum(raw["boxes"].clamp(min=0), torch.tensor([width, height] * 2))
        has_area = ((found_all := clipped)[:, 2:] > found_all[:, :2]).all(dim=1)
        num_dropped += int((~has_area).sum())
        assert found["boxes"].dtype == torch.float32
        assert found["boxes"].min() >= 0 and (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
        kept = [label for label, keep in zip(raw["labels"], has_area.tolist(), strict=True) if keep]
        assert found["labels"] == kept
        torch.testing.assert_close(found["boxes"], clipped[has_area].float(), rtol=0, atol=1)
    assert num_dropped > 0


def test_scores_must_exceed_the_threshold(detector):
    (found,) = detector.detect(IMAGES[0], LABELS[0])
    middle = found["scores"].sort().values[5].item()
    (fewer,) = detector.detect(IMAGES[0], LABELS[0], threshold=middle)
    assert len(fewer["labels"]) == len(found["labels"]) - 6 and fewer["scores"].min() > middle


def test_boxes_are_in_the_upright_frame_for_all_kinds_of_images(detector, tmp_path):
    image = IMAGES[1].convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    array = np.array(image)
    kinds = [image, tmp_path / "turned.png", array, torch.from_numpy(array).permute(2, 0, 1), array / 255]
    first, *others = detector.detect(kinds, LABELS[1])
    assert_same_boxes(first, CASES[1]["result"])
    for found in others:
        assert_same_boxes(found, first)
    assert len(detector.detect(torch.from_numpy(np.stack([array, array])), LABELS[1])) == 2


def test_the_labels_of_coco_are_those_of_torchvision():
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [name for name in names if name not in ("__background__", "N/A")] == COCO_80


def test_fixed_labels_keep_their_spelling(detector):
    upper = [label.upper() for label in LABELS[0]]
    (found,) = BoxDetector(upper, OWLV2).detect(IMAGES[0])
    expected = {**CASES[0]["result"], "labels": [label.upper() for label in CASES[0]["result"]["labels"]]}
    assert_same_boxes(found, expected)
    (found,) = BoxDetector(upper, OWLV2).detect(IMAGES[0], ["esk ferry"], threshold=0.0)
    assert set(found["labels"]) == {"esk ferry"}


def test_embeddings_are_computed_once_and_equal_those_of_one_prompt_at_a_time(detector, monkeypatch):
    detector.detect(IMAGES, LABELS)
    owlv2 = detector._detector
    alone = torch.cat([owlv2.embed_prompts([prompt]) for prompt in CASES[0]["prompts"]])
    torch.testing.assert_close(owlv2.prompt_embeds.get([CASES[0]["prompts"]])[0][0], alone, rtol=0, atol=1e-6)

    def refuse(*args, **kwargs):
        raise AssertionError("the text tower ran again")

    monkeypatch.setattr(owlv2.model.owlv2.text_model, "forward", refuse)
    monkeypatch.setattr(owlv2.model.objectness_head, "forward", refuse)
    for found, case in zip(detector.detect(IMAGES, LABELS), CASES, strict=True):
        assert_same_boxes(found, case["result"])
    with pytest.raises(AssertionError, match="ran again"):
        detector.detect(IMAGES[0], ["unseen"])


def test_vocabulary_is_embedded_in_advance_on_request(ram_plus, monkeypatch):
    detector = BoxDetector(ram_plus, OWLV2)
    detector.embed_vocabulary()
    assert len(detector._detector.prompt_embeds) == 20 + 1  # all tags, and the empty prompt
    monkeypatch.setattr(detector._detector.model.owlv2.text_model, "forward", None)
    assert_same_boxes(detector.detect(IMAGES[0])[0], CASES[0]["result"])


def test_long_labels_are_cut_with_a_warning(detector, monkeypatch):
    messages = []
    monkeypatch.setattr("mgllava.processing.owlv2_detection_mgllava.logger.warning", messages.append)
    detector.detect(IMAGES[0], ["word " * 40])
    assert len(messages) == 1 and "16 tokens" in messages[0]
    assert detector._detector._encode(["word " * 40, "a"])["input_ids"].shape == (2, 16)


def test_low_precision_towers_leave_heads_and_text_in_float32(ram_plus):
    detector = BoxDetector(ram_plus, OWLV2, dtype=torch.bfloat16)
    model = detector._detector.model
    assert model.owlv2.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert detector._tagger.model.dtype == torch.bfloat16
    float32 = AutoModelForZeroShotObjectDetection.from_pretrained(OWLV2, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if not name.startswith("owlv2.vision_model") or "post_layernorm" in name:
            torch.testing.assert_close(weight, float32[name], rtol=0, atol=0)
    assert all(found["scores"].dtype == torch.float32 for found in detector.detect(IMAGES))
    pixels = torch.from_numpy(arrays_of(CASES[0])["pixel_values"])[None]
    close = BoxDetector(None, OWLV2)._detector.image_features(pixels)
    torch.testing.assert_close(detector._detector.image_features(pixels), close, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("largest", [1, 3])
def test_out_of_memory_halves_the_batch_with_a_warning(detector, monkeypatch, largest):
    messages, sizes, find = [], [], detector._detector.find

    def limited(images, *args):
        sizes.append(len(images))
        if len(images) > largest:
            raise torch.OutOfMemoryError("simulated")
        return find(images, *args)

    monkeypatch.setattr(detector._detector, "find", limited)
    monkeypatch.setattr(box_detection_mgllava.logger, "warning", messages.append)
    for found, case in zip(detector.detect(IMAGES, LABELS), CASES, strict=True):
        assert_same_boxes(found, case["result"])
    assert sizes == {1: [5, 2, 1, 1, 1, 1, 1], 3: [5, 2, 2, 1]}[largest]
    assert (
        len(messages) == {1: 2, 3: 1}[largest]
        and "Out of memory with 5 images at a time: continuing with 2" in messages[0]
    )


def test_out_of_memory_with_a_single_image_is_raised(detector, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(detector._detector, "find", fail)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        detector.detect(IMAGES, LABELS)


@pytest.mark.parametrize(("length", "new_length"), [(1, 5), (2, 7), (5, 5), (126, 126), (160, 126), (7, 3), (640, 97)])
def test_resize_rows_are_weights_and_constant_images_stay_constant(length, new_length):
    matrix = resize_matrix(length, new_length, torch.device("cpu"))
    assert matrix.shape == (new_length, length) and matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(new_length))
    if length == new_length:
        torch.testing.assert_close(matrix, torch.eye(length))
    gray = torch.full((3, length, length), 51, dtype=torch.uint8)
    pixels = square_pixels(gray, (new_length, new_length), [0.1] * 3, [0.5] * 3, torch.device("cpu"))
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.2))


def test_grounding_dino_finds_given_labels_in_batches_as_alone():
    model, processor = grounding_dino()
    detector = BoxDetector(["cat", "Red dog"], model, detector_processor=processor, mode="clean")
    images = [*IMAGES, IMAGES[0]]
    together = detector.detect(images, threshold=0.3)
    assert sum(len(found["labels"]) for found in together) > 5
    for image, found in zip(images, together, strict=True):
        assert set(found["labels"]) <= {"cat", "Red dog"}
        assert_same_boxes(found, detector.detect(image, threshold=0.3)[0], pixels=1e-3)
        width, height = image.size
        assert ((found["boxes"] >= 0) & (found["boxes"] <= torch.tensor([width, height] * 2))).all()
    assert detector.detect(IMAGES[0], [[]])[0]["labels"] == []
    assert detector.detect(IMAGES[0], threshold=1.0)[0]["labels"] == []


def test_the_threshold_holds_for_the_words_of_grounding_dino_too(monkeypatch):
    """Its default for words is 0.25, with which boxes of lower scores would have no word and be dropped."""
    model, processor = grounding_dino()
    logits = torch.full((1, 2, 256), -20.0)
    logits[0, 0, 1], logits[0, 1, 3] = -1.5, -3.0  # "cat" at 0.18, "dog" at 0.05
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]]])
    output = GroundingDinoObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    output["input_ids"] = torch.tensor([[101, 1030, 1012, 1031, 1012, 102]])
    monkeypatch.setattr(model, "forward", lambda **_: output)
    detector = BoxDetector(["cat", "dog"], model, detector_processor=processor, mode="clean")
    for threshold, labels in ((0.1, ["cat"]), (0.01, ["cat", "dog"]), (0.2, [])):
        assert detector.detect(IMAGES[0], threshold=threshold)[0]["labels"] == labels


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "best"}, ValueError, "`mode` must be one of 'faithful', 'clean', got 'best'"),
        ({"tagger": []}, ValueError, "`tagger` must have at least one label"),
        ({"tagger": ["a", 1]}, TypeError, r"`tagger` must be a list of strings, got \['int', 'str'\]"),
        ({"tagger": "no/such"}, OSError, "`tagger` must be a folder or a repository on the Hub .* got 'no/such'"),
        ({"tagger": OWLV2}, TypeError, "`tagger` must be an image tagging model .* got Owlv2"),
        ({"detector": "/no/such/folder"}, OSError, "`detector` must be a folder or a repository .* got '/no/such"),
        ({"detector": GOLDEN_RAM.parent / "golden" / "llm"}, TypeError, "zero-shot object detector .* type 'llama'"),
        ({"detector": object()}, TypeError, "zero-shot object detector .* got 'object', which is not a model"),
    ],
)
def test_wrong_parts_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        BoxDetector(**{"detector": OWLV2, **arguments})


@pytest.mark.parametrize(("works", "chosen"), [(True, "meta"), (False, "cpu")])
def test_a_detector_goes_to_the_accelerator_if_this_process_can_use_it(monkeypatch, caplog, works, chosen):
    """A process forked from one that uses the accelerator cannot; this machine may have none."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    if not works:

        def fail(*_, **__):
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

        monkeypatch.setattr(torch, "empty", fail)
    assert box_detection_mgllava._resolve_device(None, None) == torch.device(chosen)
    assert ("is loaded on the CPU, since this process cannot use meta" in caplog.text) is not works


def test_a_model_without_its_processor_is_refused():
    model = AutoModelForZeroShotObjectDetection.from_pretrained(OWLV2)
    with pytest.raises(ValueError, match="`detector_processor` must be given"):
        BoxDetector(None, model)
    assert BoxDetector(None, model, detector_processor=AutoProcessor.from_pretrained(OWLV2)).detect([], ["a"]) == []


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "`labels` must be given, got None"),
        ([], ValueError, "`labels` must have at least one label, got an empty list"),
        ("cat", TypeError, "`labels` must be a list of strings, got 'cat'"),
        (["cat", 3], TypeError, r"`labels` must be a list of strings, got \['int', 'str'\]"),
        ([["cat"], ["dog"]], ValueError, "one list per image, got 2 lists for 1 images"),
        ([["cat", None]], TypeError, r"`labels\[0\]` must be a list of strings"),
    ],
)
def test_wrong_labels_are_named(detector, labels, error, message):
    with pytest.raises(error, match=message):
        detector.detect(IMAGES[0], labels)


def test_unreadable_images_are_named(detector, tmp_path):
    (tmp_path / "broken.png").write_bytes((GOLDEN_RAM / CASES[0]["image"]).read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no image")
    for path in ("broken.png", "text.jpg", "missing.png"):
        with pytest.raises(ValueError, match=rf"`images\[1\]` must be .*{path}"):
            detector.detect([IMAGES[0], tmp_path / path], ["a"])
    with pytest.raises(TypeError, match=r"`images\[0\]` must hold .*got int"):
        detector.detect([3], ["a"])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        detector.detect(IMAGES, ["a"], batch_size=0)
