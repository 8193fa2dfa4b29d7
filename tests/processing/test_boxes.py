"""Box math against the original's numbers and against an NMS written out here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from mgllava.processing import boxes_mgllava
from mgllava.processing.boxes_mgllava import (
    flatten_boxes,
    limit_boxes,
    nms_per_label,
    prepare_boxes,
    read_boxes,
    to_model_frame,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "boxes_only.json").read_text())["cases"]
TO_768 = {"resize_to": 768, "crop_to": (768, 768), "pad_to_square": True}


def detected(*boxes, labels=None, scores=None):
    return {
        "boxes": list(boxes),
        "labels": labels or ["cat"] * len(boxes),
        "scores": scores or [1 - i / 100 for i in range(len(boxes))],
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["id"]))
def test_prepare_boxes_equals_the_original(case):
    boxes, labels = prepare_boxes(
        {"boxes": case["boxes"], "labels": case["labels"], "scores": case["scores"]},
        (case["height"], case["width"]),
        resize_to=768,
        crop_to=(768, 768),
        pad_to_square=case["pad_image_to_square"],
        iou_threshold=case["iou_threshold"],
        limit_mode=case["limit_mode"],
        limit=case["limit_num"],
        close_to_max_length=case["close_to_max_length"],
    )
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == case["out_boxes"]
    assert labels == case["out_labels"]


def slow_nms(boxes, scores, labels, threshold):
    """Greedy NMS, one pair at a time, float32 IoU compared with a double as torchvision's CPU kernel does."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        for j in kept:
            if labels[i] != labels[j]:
                continue
            a, b = boxes[i], boxes[j]
            width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
            height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
            inter = width * height
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
            if union > 0 and float(inter / union) > threshold:
                break
        else:
            kept.append(i)
    return kept


def test_nms_per_label_equals_a_written_out_nms():
    rng = np.random.default_rng(0)
    corners = rng.integers(-50, 200, (300, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 80, (300, 2))], axis=1).astype(np.float32)
    scores = rng.integers(0, 40, 300).astype(np.float32) / 40  # many ties
    labels = rng.integers(0, 5, 300).tolist()
    kept = nms_per_label(torch.from_numpy(boxes), torch.from_numpy(scores), labels, 0.2)
    assert kept == slow_nms(boxes, scores, labels, 0.2)
    assert 20 < len(kept) < 300


def test_nms_suppresses_an_iou_of_exactly_a_fifth():
    boxes = torch.tensor([[0.0, 0, 10, 6], [0, 4, 10, 10]])  # 20 of 100
    assert nms_per_label(boxes, torch.tensor([0.9, 0.8]), ["a", "a"], 0.2) == [0]
    assert nms_per_label(boxes, torch.tensor([0.9, 0.8]), ["a", "b"], 0.2) == [0, 1]


def test_nms_does_not_mix_labels_of_fully_negative_boxes():
    boxes = torch.tensor([[-20.0, -20, -10, -10], [-9, -9, 1, 1], [-20, -20, -10, -10]])
    assert nms_per_label(boxes, torch.tensor([0.9, 0.8, 0.7]), [0, 1, 2], 0.2) == [0, 1, 2]


@pytest.mark.parametrize(
    ("limit", "close", "expected"),
    [(59, False, 40), (60, False, 60), (50, False, 40), (49, False, 10), (None, False, 60), (None, True, 2)],
)
def test_limit_per_category(limit, close, expected):
    labels = ["b", "a"] * 30
    kept = limit_boxes(labels, "per_category", limit, close)
    assert len(kept) == expected
    if expected < 60:  # regrouped, labels in the order of their first box, best first
        assert [labels[i] for i in kept] == ["b"] * (expected // 2) + ["a"] * (expected // 2)
        assert kept[: expected // 2] == list(range(0, expected, 2))


@pytest.mark.parametrize(
    ("limit", "close", "expected"), [(10, False, 10), (None, False, 60), (10, True, 20), (None, True, 20)]
)
def test_limit_per_image(limit, close, expected):
    assert limit_boxes(["a"] * 60, "per_image", limit, close) == list(range(expected))


def test_limit_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"per_image.*got 'per_box'"):
        limit_boxes(["a"], "per_box", 1)


def test_bare_boxes_keep_their_order_and_number():
    boxes = [[50, 50, 60, 60], [50, 50, 60, 60], [0, 0, 100, 100]]
    kept, labels = prepare_boxes(np.array(boxes), (100, 100), **{**TO_768, "resize_to": 200, "crop_to": (200, 200)})
    assert kept.tolist() == [[100, 100, 120, 120], [100, 100, 120, 120], [0, 0, 200, 200]]
    assert labels == []


def test_mapping_without_scores_is_a_choice_of_regions_that_keeps_its_labels():
    entry = {"boxes": [[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 6, 6]], "labels": ["b", "b", "a"]}
    kept, labels = prepare_boxes(entry, (10, 10), **TO_768)
    assert len(kept) == 3 and labels == ["b", "b", "a"]


def test_mapping_without_labels_is_one_category():
    kept, labels = prepare_boxes({"boxes": [[0, 0, 9, 9], [0, 0, 9, 8]], "scores": [0.1, 0.9]}, (10, 10), **TO_768)
    assert kept.tolist() == [[0, 0, 691, 614]] and labels == []


@pytest.mark.parametrize("as_row", [tuple, np.array, torch.tensor])
def test_rows_of_any_kind_are_read(as_row):
    boxes, labels, scores = read_boxes([as_row([1, 2, 3, 4]), as_row([5, 6, 7, 8])])
    assert boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and labels is scores is None


def test_docstring_example():
    assert prepare_boxes([[10, 20, 110, 70]], (100, 200), **TO_768)[0].tolist() == [[38, 269, 422, 461]]


@pytest.mark.parametrize(
    "entry", [None, [], np.zeros((0, 4)), [[0, 0, 0, 0]], detected([900, 0, 950, 10]), detected()]
)
def test_without_boxes_there_is_the_zero_box(entry):
    boxes, labels = prepare_boxes(entry, (100, 100), **TO_768)
    assert boxes.dtype == torch.int64 and boxes.tolist() == [[0, 0, 0, 0]] and labels == []


def test_boxes_that_touch_the_border_stay_with_zero_size():
    boxes = torch.tensor([[-5.0, -5, 0, 5], [100, 0, 120, 50], [-9, 0, -1, 5], [101, 0, 120, 50]])
    kept, inside = to_model_frame(boxes, (100, 100), resize_to=None, crop_to=None)
    assert inside.tolist() == [True, True, False, False]
    assert kept.tolist() == [[0, 0, 0, 5], [100, 0, 100, 50]]


def test_halves_are_rounded_to_even():
    moved, _ = to_model_frame(torch.tensor([[1.0, 3, 5, 7]]), (10, 10), resize_to=5, crop_to=(5, 5))
    assert moved.tolist() == [[0, 2, 2, 4]]


def test_sides_whose_resized_length_is_one_short_shift_the_boxes():
    sides = [side for side in range(1, 5000) if int(side * (768 / side)) == 767]
    assert len(sides) == 211 and sides[:4] == [47, 94, 147, 173]
    for side in range(1, 400):
        moved, _ = to_model_frame(torch.zeros(1, 4), (side, side), resize_to=768, crop_to=(768, 768))
        assert moved.tolist() == [[1.0] * 4 if side in sides else [0.0] * 4]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([[1, 2, 3]], r"`boxes\[7\]` must have shape \(num_boxes, 4\), got \(1, 3\)"),
        (
            [1, 2, 3, 4],
            r"must have shape \(num_boxes, 4\), got \(4,\). Wrap it: one box is \[\[1.0, 2.0, 3.0, 4.0\]\]",
        ),
        ([[0, 0, 1, 1], [0, 0, float("nan"), 1]], "finite.*nan.*index 1"),
        ([[0, 0, float("inf"), 1]], "finite.*inf.*index 0"),
        ([[0, 0, 1, 1], [9, 0, 1, 1]], r"x1 <= x2.*\[9.0, 0.0, 1.0, 1.0\] at index 1"),
        ([[0, 9, 1, 1]], "y1 <= y2.*Swap the corners"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [1, 2], "labels": ["a"]}, "got 2 scores for 1 boxes"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [1], "labels": []}, "got 0 labels for 1 boxes"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [float("nan")]}, "finite scores, got nan at index 0"),
        ({"bboxes": [[0, 0, 1, 1]]}, r"key 'boxes'.*got the keys \['bboxes'\]"),
        ({"boxes": [[1, 2, 20, 30]], "score": [0.9], "labels": ["a"]}, "key 'score'. Did you mean 'scores'"),
        ({"boxes": [[1, 2, 20, 30]], "scores": [0.9], "label": ["a"]}, "key 'label'. Did you mean 'labels'"),
        ({"boxes": [[1, 2, 20, 30]], "scores": [[0.9]], "labels": ["a"]}, "must be a flat list"),
        ({"boxes": [[1, 2, 20, 30]], "scores": 0.9}, "must be a flat list"),
        ({"boxes": [[1, 2, 20, 30]], "scores": [0.9], "labels": [["a"]]}, "must be a flat list"),
        ({"boxes": [[1, 2, 20, 30]], "scores": [0.9], "labels": 3}, "must be a flat list"),
    ],
)
def test_wrong_boxes_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(entry, "boxes[7]")


def test_keys_that_detectors_and_box_files_add_are_ignored():
    entry = {"boxes": [[1, 2, 20, 30]], "scores": [0.9], "labels": ["a"], "text_labels": ["a"], "id": 1, "width": 9}
    assert len(read_boxes(entry)[0]) == 1


@pytest.mark.parametrize("entry", ["cat", [["a", "b", "c", "d"]], object()])
def test_entries_that_are_not_numbers_are_refused(entry):
    with pytest.raises(TypeError, match="`boxes` must be an array of numbers"):
        read_boxes(entry)


def test_labels_that_are_one_string_are_refused():
    with pytest.raises(TypeError, match=r"`boxes` must have a list of labels, .* got the string 'cat'"):
        read_boxes({"boxes": [BOX] * 3, "labels": "cat"})


BOX = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.1, 0.2, 0.9, 0.8], "looks relative to its size. Multiply x by the width and y by the height"),
        ([0.0, 0.0, 1.0, 1.0], "looks relative"),
        (np.array([0.0, 0.25, 1.0, 0.5]), "looks relative"),
        (torch.tensor([-0.01, 0.25, 1.02, 0.5], dtype=torch.float64), "looks relative"),
        ([640, 10, 700, 20], "which is outside of it"),
        ([10, 480, 20, 500], "which is outside of it"),
        ([-30, 10, -5, 20], "which is outside of it"),
        ([10, -30, 20, 0], "which is outside of it"),
        ([1000, 1000, 2000, 2000], r"the upright image \(640 x 480, width x height\)"),
    ],
)
@pytest.mark.parametrize("as_mapping", [False, True])
def test_regions_that_are_not_in_pixels_of_the_image_are_refused(box, message, as_mapping):
    for boxes, index in (([box], 0), ([[5, 5, 50, 50], box], 1)):
        if index and message == "looks relative" and isinstance(box, list):
            continue  # next to a box in pixels, whole numbers are pixels
        entry = {"boxes": boxes, "labels": ["a"] * len(boxes)} if as_mapping else boxes
        with pytest.raises(ValueError, match=rf"(?s)`boxes\[3\]` .*at index {index}.*|{message}") as caught:
            prepare_boxes(entry, (480, 640), **TO_768, name="boxes[3]")
        assert re.search(message, str(caught.value)) and f"at index {index}" in str(caught.value)


@pytest.mark.parametrize(
    ("boxes", "image_size"),
    [
        ([[0, 0, 1, 1]], (480, 640)),  # the first pixel
        (torch.tensor([[0, 0, 1, 1]]), (480, 640)),
        ([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 50.5, 50.0]], (480, 640)),
        ([[0.5, 0.5, 3.25, 2.0]], (480, 640)),
        ([[0.0, 0.0, 1.0, 1.0]], (1, 1)),
        ([[0.0, 0.0, 0.0, 0.0]], (480, 640)),  # no object
        ([[0, 0, 640, 480], [639, 479, 640, 480]], (480, 640)),
    ],
)
def test_regions_in_the_image_are_kept_without_a_warning(boxes, image_size, monkeypatch):
    monkeypatch.setattr(boxes_mgllava.logger, "warning_once", pytest.fail)
    assert len(prepare_boxes(boxes, image_size, **TO_768)[0]) == len(boxes)


def test_regions_over_the_edge_are_clipped_with_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr(boxes_mgllava.logger, "warning_once", messages.append)
    boxes = [[10, 10, 20, 20], [-30, 40, 50, 999], [600, 5, 640.5, 50]]
    kept, _ = prepare_boxes(boxes, (480, 640), **TO_768, name="boxes[3]")
    assert len(messages) == 1 and "`boxes[3]` reach over the edge" in messages[0]
    assert "[-30.0, 40.0, 50.0, 999.0] at index 1 (1 such boxes)" in messages[0]
    inside, _ = prepare_boxes([[10, 10, 20, 20], [0, 40, 50, 480], [600, 5, 640, 50]], (480, 640), **TO_768)
    assert kept.tolist() == inside.tolist()
    # Boxes of a detector may reach into the padding without a warning, as in the original.
    found, _ = prepare_boxes(detected(*boxes, labels=["a", "b", "c"]), (480, 640), **TO_768)
    assert len(messages) == 1 and found[1].tolist() == [0, 144, 60, 768]


def test_regions_without_area_give_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr(boxes_mgllava.logger, "warning_once", messages.append)
    kept, _ = prepare_boxes([[5, 5, 50, 50], [7, 7, 7, 9], [0, 0, 0, 0]], (480, 640), **TO_768)
    assert len(kept) == 3 and len(messages) == 1 and "[7.0, 7.0, 7.0, 9.0] at index 1 (1 such boxes)" in messages[0]


def test_relative_boxes_of_a_detector_give_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr(boxes_mgllava.logger, "warning_once", messages.append)
    prepare_boxes(detected([0.1, 0.2, 0.5, 0.6], [0.0, 5.5, 9.0, 9.0], labels=["a", "b"]), (480, 640), **TO_768)
    assert len(messages) == 0  # one of many may lie in the first pixel
    prepare_boxes(detected([0.1, 0.2, 0.5, 0.6], [0.0, 0.5, 0.9, 1.0], labels=["a", "b"]), (480, 640), **TO_768)
    assert len(messages) == 1 and "seem to be relative to its size" in messages[0]


def test_regions_that_the_crop_cuts_off_are_refused():
    options = {"resize_to": 50, "crop_to": (50, 50), "pad_to_square": False}
    assert len(prepare_boxes([[100, 0, 120, 50]], (50, 200), **options)[0]) == 1
    with pytest.raises(ValueError, match=r"got \[0.0, 0.0, 20.0, 50.0\] at index 1, which the crop"):
        prepare_boxes([[100, 0, 120, 50], [0, 0, 20, 50]], (50, 200), **options)
    assert len(prepare_boxes(detected([100, 0, 120, 50], [0, 0, 20, 50]), (50, 200), **options)[0]) == 1


@pytest.mark.parametrize(
    ("boxes", "groups", "expected"),
    [
        (None, None, [None]),
        (detected(BOX), None, [detected(BOX)]),
        ([BOX], None, [[BOX]]),
        ((BOX,), None, [[BOX]]),
        ([[BOX, BOX]], None, [[BOX, BOX]]),
        ((box for box in [BOX, BOX]), None, [[BOX, BOX]]),
        ([[BOX], [], None], None, [[BOX], [], None]),
        ([None, [BOX]], None, [None, [BOX]]),
        ([detected(BOX), None], None, [detected(BOX), None]),
        ([[[BOX]], [[BOX], [BOX]]], None, [[BOX], [BOX], [BOX]]),
        ([[], [detected(BOX)], [None, [BOX]]], None, [detected(BOX), None, [BOX]]),
        ([[], [[BOX]]], [2, 1], [[], [], [BOX]]),
        ([None, [[BOX]]], [2, 1], [None, None, [BOX]]),
        ([[None, []], [[BOX]]], [2, 1], [None, [], [BOX]]),
        # Nothing but empty lists, at every level.
        ([], [1], [[]]),
        ([], None, [[], []]),
        ([], [2, 1], [[], [], []]),
        ([[]], None, [[]]),
        ([[[]]], None, [[]]),
        ([[], []], None, [[], []]),
        ([[[]], [[], []]], [1, 2], [[], [], []]),
        ([[[]], [[], []]], None, [[], [], []]),
        ([[], []], [2, 1], [[], [], []]),
        ([[], [], []], [2, 1], [[], [], []]),
        ([[None], [[], None]], [1, 2], [None, [], None]),
        ([[None], [None]], None, [None, None]),
        ([None, []], [2, 1], [None, None, []]),
        ([[[]], [None]], [1, 1], [[], None]),
    ],
)
def test_flatten_boxes_gives_one_entry_per_image(boxes, groups, expected):
    assert flatten_boxes(boxes, len(expected), groups) == expected


@pytest.mark.parametrize(
    ("boxes", "count"),
    [
        (np.ones((2, 4)), 1),
        (np.zeros((0, 4)), 1),
        (np.zeros(0), 1),
        ([torch.tensor(BOX), torch.tensor(BOX)], 1),
        ([np.ones((3, 4)), np.ones((2, 4))], 2),
        ([np.zeros((0, 4)), np.zeros((0, 4))], 2),
        (torch.ones(5, 2, 4), 5),
        (torch.ones(5, 0, 4), 5),
        ([np.ones((3, 4)), [BOX], None, detected(BOX)], 4),
        (np.array([[BOX, BOX], [BOX]], dtype=object), 2),
        ([torch.ones(2, 1, 4), torch.ones(1, 3, 4)], 3),
    ],
)
def test_flatten_boxes_takes_arrays(boxes, count):
    entries = flatten_boxes(boxes, count)
    assert len(entries) == count
    assert all(entry is None or read_boxes(entry)[0].shape[1] == 4 for entry in entries)


@pytest.mark.parametrize(
    ("boxes", "images", "error", "message"),
    [
        (BOX, 1, ValueError, r"got the numbers \[1, 2, 3, 4\]. Wrap them"),
        (np.array(BOX), 1, ValueError, "Wrap them"),
        ([BOX, BOX], 2, ValueError, "got 1 entries for 2 images. Put the boxes of each image into a list"),
        ([BOX, [BOX]], 2, ValueError, r"got \[1, 2, 3, 4\] at index 0, which has fewer levels than others. Wrap it"),
        ([[BOX], BOX], 2, ValueError, "at index 1"),
        ([[[[BOX]]]], 1, ValueError, "more levels"),
        ([[BOX], [BOX]], 1, ValueError, "got 2 entries for 1 images"),
        ([[], []], 1, ValueError, "got 2 entries for 1 images"),
        ("[[1, 2, 3, 4]]", 1, TypeError, "got str '\\[\\[1, 2"),
        ([[["1", "2", "3", "4"]]], 1, TypeError, "must hold numbers, got str '1'"),
        (object(), 1, TypeError, "must hold numbers, got object"),
        ([[BOX], [object()]], 2, TypeError, "got object"),
        (
            [[[BOX]], [[BOX], [BOX]]],
            [2, 1],
            ValueError,
            r"`boxes\[0\]` must have one entry per image of `images\[0\]`, got 1 entries for 2",
        ),
    ],
)
def test_wrong_nesting_is_named(boxes, images, error, message):
    """`images` is their number, or a list of the numbers of each prompt."""
    groups = images if isinstance(images, list) else None
    with pytest.raises(error, match=message):
        flatten_boxes(boxes, sum(groups) if groups else images, groups)


def test_nms_runs_at_most_once_for_each_label(monkeypatch):
    """A loop over 5000 boxes would take seconds."""
    calls = []
    monkeypatch.setattr(boxes_mgllava, "nms", lambda *args: calls.append(args) or nms(*args))
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 900, (5000, 2))
    entry = {
        "boxes": np.concatenate([corners, corners + rng.integers(1, 100, (5000, 2))], axis=1),
        "labels": rng.integers(0, 1000, 5000).tolist(),
        "scores": rng.random(5000),
    }
    boxes, _ = prepare_boxes(entry, (1000, 1000), **TO_768, limit=None)
    assert len(boxes) > 1000 >= len(calls)
