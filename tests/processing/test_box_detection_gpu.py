"""The box detector on a CUDA device: the same boxes in float32, low precision, text tower off the device."""

import numpy as np
import pytest
import torch

from mgllava import BoxDetector
from mgllava.processing.images_common import as_rgb, resize_by_products, resize_like_pil

from .detectors import CASES, OWLV2, assert_same_boxes, golden_image, grounding_dino, labels_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IMAGES = [golden_image(case) for case in CASES]
LABELS = [labels_of(case) for case in CASES]


def test_boxes_in_float32_equal_the_original():
    detector = BoxDetector(None, OWLV2, device="cuda", dtype=torch.float32)
    for found, case in zip(detector.detect(IMAGES, LABELS), CASES, strict=True):
        assert not found["boxes"].is_cuda
        assert_same_boxes(found, case["result"], pixels=1)


def test_resizes_on_the_gpu_equal_the_cpu():
    for image in map(as_rgb, IMAGES):
        on_gpu = resize_like_pil(image.cuda(), (96, 128))
        assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), resize_by_products(image, (96, 128)))


def test_towers_are_bfloat16_by_default_and_the_text_tower_leaves():
    detector = BoxDetector(LABELS[0], OWLV2, device="cuda")
    vision = detector._detector.model.owlv2.vision_model
    assert vision.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    found = detector.detect(IMAGES)
    assert all(np.isfinite(of_image["scores"]).all() for of_image in found)
    assert sum(len(of_image["labels"]) for of_image in found) > 10
    for part in (detector._detector.model.owlv2.text_model, detector._detector.model.objectness_head):
        assert {parameter.device.type for parameter in part.parameters()} == {"cpu"}


def test_grounding_dino_runs_in_half_precision():
    model, processor = grounding_dino()
    expected = BoxDetector(["cat", "dog"], model, detector_processor=processor, device="cpu").detect(IMAGES)
    detector = BoxDetector(["cat", "dog"], model, detector_processor=processor, device="cuda", dtype=torch.bfloat16)
    for found, wanted in zip(detector.detect(IMAGES), expected, strict=True):
        assert abs(len(found["labels"]) - len(wanted["labels"])) <= 3
        assert found["scores"].dtype == torch.float32
