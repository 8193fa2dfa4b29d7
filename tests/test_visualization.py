"""Drawn boxes and labels: their places, sizes and colors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mgllava.visualization import draw_boxes, draw_frames

GRAY = (128, 128, 128)


def gray(width, height):
    return Image.new("RGB", (width, height), GRAY)


def drawn(picture):
    """Tell which pixels of a gray image were drawn on, `(height, width)`."""
    return (np.asarray(picture) != 128).any(axis=2)


def colors(picture):
    """List the colors of lines and plates: frequent colors except gray, black and white."""
    values, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    return [value for value, count in zip(values, counts, strict=True) if count > 200 and len(set(value)) > 1]


@pytest.mark.parametrize(("width", "height"), [(400, 380), (600, 400), (4000, 3000)])
def test_lines_are_drawn_along_the_box_only(width, height):
    box = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    on = drawn(draw_boxes(gray(width, height), [box]))
    middle_row, middle_column = height // 2, width // 2
    line = max(4, round((width * height) ** 0.5 / 90))
    for position, edge in ((on[middle_row], box[0]), (on[middle_row], box[2]), (on[:, middle_column], box[1])):
        assert position[edge]
        touched = np.flatnonzero(position[edge - 3 * line : edge + 3 * line])
        assert len(touched) <= line
    assert not on[middle_row, middle_column] and not on[0].any() and not on[-1].any()


def test_lines_and_letters_grow_with_the_image():
    def share(width, height):
        box = {"boxes": [[width / 3, height / 3, width / 2, height / 2]], "labels": ["spoon"], "scores": [0.5]}
        return drawn(draw_boxes(gray(width, height), box)).mean()

    shares = [share(*size) for size in ((400, 300), (1200, 900), (4000, 3000))]
    assert max(shares) < 1.6 * min(shares)


def test_each_label_has_a_color_of_its_own():
    boxes = [[10 + 90 * number, 60, 80 + 90 * number, 120] for number in range(6)]
    labels = ["cup", "spoon", "cup", "saucer", "fork", "spoon"]
    assert len(colors(draw_boxes(gray(600, 400), {"boxes": boxes, "labels": labels}))) == 4
    assert len(colors(draw_boxes(gray(600, 400), boxes))) == 6


def luminance(color):
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    values = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in np.asarray(color) / 255]
    return float(np.dot([0.2126, 0.7152, 0.0722], values))


def test_letters_stand_out_from_their_plate():
    """In black or white, whichever it is, with a contrast of 3, which the guidelines want of large letters."""
    boxes = [
        [10 + 150 * (number % 5), 60 + 120 * (number // 5), 110 + 150 * (number % 5), 120 + 120 * (number // 5)]
        for number in range(20)
    ]
    picture = draw_boxes(gray(800, 600), {"boxes": boxes, "labels": [f"MMM{number}" for number in range(20)]})
    for x, y, _, _ in boxes:
        cell = picture.crop((x - 5, y - 40, x + 140, y + 70))
        (plate,) = colors(cell)
        # Lines have black edges, so black alone does not tell the color of the letters.
        letters = (255, 255, 255) if (255, 255, 255) in dict(map(reversed, cell.getcolors(1 << 16))) else (0, 0, 0)
        dark, light = sorted([luminance(plate), luminance(letters)])
        assert (light + 0.05) / (dark + 0.05) > 3


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 50, 50],
        [590, 0, 599, 10],
        [0, 390, 40, 399],
        [580, 380, 600, 400],
        [-50, -50, 700, 500],
        [300, -20, 340, 5],
    ],
)
def test_labels_stay_inside_the_image(box):
    """A label is not cut off: it is as large as in the middle of the image."""
    label = {"labels": ["a long label"], "scores": [0.123]}
    color = (51, 255, 255)

    def plate(box):
        picture = np.asarray(draw_boxes(gray(600, 400), {"boxes": [box], **label}, line_width=1))
        filled = (picture == color).all(axis=2)
        # Rows of the plate have many pixels of its color outside the two lines.
        return sum(row.sum() for row in filled if 20 < row.sum() < 200)

    assert plate(box) >= 0.8 * plate([300, 200, 310, 210])


def test_labels_do_not_cover_each_other():
    alone = drawn(draw_boxes(gray(600, 400), {"boxes": [[200, 200, 300, 300]], "labels": ["mmmm"]}))
    both = drawn(draw_boxes(gray(600, 400), {"boxes": [[200, 200, 300, 300]] * 2, "labels": ["mmmm", "mmmn"]}))
    assert both.sum() > alone.sum() + 500


def test_scores_can_be_left_out():
    found = {"boxes": [[100, 100, 300, 300]], "labels": ["cup"], "scores": [0.5]}
    without = draw_boxes(gray(600, 400), {"boxes": found["boxes"], "labels": ["cup"]})
    assert draw_boxes(gray(600, 400), found, scores=False) == without
    assert draw_boxes(gray(600, 400), found) != without


def test_small_images_are_enlarged_by_a_whole_number():
    picture = draw_boxes(gray(100, 80), {"boxes": [[20, 20, 60, 60]], "labels": ["cup"]})
    assert picture.size == (500, 400)
    on = drawn(picture)
    assert on[200, 100] and on[200, 300] and not on[200, 200]


def test_all_forms_of_boxes():
    box = [100.0, 100.0, 300.0, 300.0]
    expected = draw_boxes(gray(600, 400), [box])
    for boxes in (np.array([box]), torch.tensor([box]), {"boxes": torch.tensor([box], dtype=torch.bfloat16)}):
        assert draw_boxes(gray(600, 400), boxes) == expected
    assert draw_boxes(gray(600, 400), [{"boxes": [box]}]) == expected  # as a box detector returns it for one image
    outside = {"boxes": [[-20, -20, -5, -5]], "scores": [0.5]}  # as from a box detector
    for boxes in ([], torch.zeros(0, 4), {"boxes": [], "labels": [], "scores": []}, outside):
        assert not drawn(draw_boxes(gray(600, 400), boxes)).any()


def test_image_is_turned_upright_and_not_changed():
    image = gray(600, 400)
    image.getexif()[0x0112] = 6
    picture = draw_boxes(image, [[10, 10, 100, 500]])
    assert picture.size == (400, 600) and image.size == (600, 400) and not drawn(image).any()
    assert draw_boxes(np.full((400, 600, 3), 128, dtype=np.uint8), []) == gray(600, 400)
    assert draw_boxes(Image.new("L", (400, 400), 128), [[10, 10, 100, 300]]).mode == "RGB"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([[1, 2, 3]], r"`detections` must have shape \(num_boxes, 4\), got \(1, 3\)"),
        ([[[1, 2, 3, 4]]], r"got \(1, 1, 4\)"),
        ({"boxes": [[1, 2, 3, 4]], "labels": []}, "must have as many labels as boxes, got 0 labels for 1 boxes"),
        ({"boxes": [[1, 2, 3, 4]], "scores": [1, 2]}, "must have as many scores as boxes, got 2 scores for 1 boxes"),
        ([[30, 2, 3, 4]], r"x1 <= x2 .* got \[30\.0, 2\.0, 3\.0, 4\.0\]"),
        ([[-20, -20, -5, -5]], r"must lie in the upright image .* at index 0"),
        ([[0.1, 0.1, 0.5, 0.5]], "looks relative to its size"),
        ([{"boxes": []}, {"boxes": []}], "must be those of one image, got 2"),
    ],
)
def test_wrong_boxes_are_refused(found, said):
    with pytest.raises(ValueError, match=said):
        draw_boxes(gray(600, 400), found)


def test_frames_are_drawn_in_lines_with_the_same_color_for_a_label():
    cup, spoon = [100, 100, 300, 300], [150, 50, 350, 250]
    entries = [
        {"boxes": [cup, spoon], "labels": ["cup", "spoon"], "scores": [0.9, 0.8]},
        {"boxes": [], "labels": [], "scores": []},
        {"boxes": [spoon], "labels": ["spoon"], "scores": [0.7]},
    ]
    strip = draw_frames([gray(400, 380)] * 3, {"frames": entries}, columns=2)
    assert strip.size == (2 * 400 + 8, 2 * 380 + 8)
    first, second, third = (strip.crop((x, y, x + 400, y + 380)) for x, y in ((0, 0), (408, 0), (0, 388)))
    assert not drawn(second).any()
    (color,) = colors(third)
    assert any((color == other).all() for other in colors(first)) and len(colors(first)) == 2
    assert (np.asarray(strip)[:, 400:408] == 255).all() and (np.asarray(strip)[388:, 408:] == 255).all()


def test_frames_are_made_smaller_and_need_an_entry_each():
    assert draw_frames([gray(2000, 1000)] * 5).size == (4 * 648 - 8, 2 * 328 - 8)
    with pytest.raises(ValueError, match="each of the 2 frames, got 1"):
        draw_frames([gray(40, 40)] * 2, [[]])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw_frames([])


def test_letters_have_at_least_twelve_pixels():
    """On the smallest image that is not enlarged; on larger ones they grow."""
    found = {"boxes": [[100, 100, 300, 300]], "labels": ["cup"]}
    assert draw_boxes(gray(360, 360), found) == draw_boxes(gray(360, 360), found, font_size=12)
    assert draw_boxes(gray(960, 960), found) == draw_boxes(gray(960, 960), found, font_size=30)
