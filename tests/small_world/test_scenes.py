"""Scenes and their pictures: reproducible, varied, and with boxes that match the pixels."""

from dataclasses import replace

import numpy as np
import pytest

from small_world.drawing import draw_scene
from small_world.scenes import (
    COLORS,
    CROWD_GRID,
    HELD_OUT,
    IMAGE_SIZES,
    MAX_OBJECTS,
    PRINTABLE_SHAPES,
    SHAPES,
    Scene,
    SceneObject,
    make_scene,
)

SCENES = [make_scene("train", number) for number in range(300)]


def test_a_seed_gives_the_same_scene_and_picture():
    first, second = make_scene("test", 7), make_scene("test", 7)
    assert first == second
    assert np.array_equal(*(np.asarray(draw_scene(scene)[0]) for scene in (first, second)))


def test_splits_share_no_scene():
    scenes = {split: [make_scene(split, number).objects for number in range(200)] for split in ("train", "test")}
    assert not set(scenes["train"]) & set(scenes["test"])


def test_held_out_pairs_are_in_the_unseen_split_only():
    for split in ("train", "test", "crowded"):
        pairs = {(item.shape, item.color) for n in range(200) for item in make_scene(split, n).objects}
        assert not pairs & HELD_OUT
    unseen = {(item.shape, item.color) for n in range(200) for item in make_scene("unseen", n).objects}
    assert unseen == HELD_OUT


def test_a_crowded_picture_is_full():
    for number in range(20):
        scene = make_scene("crowded", number)
        assert len(scene.objects) == CROWD_GRID**2
        boxes = np.array(draw_scene(scene)[1])
        assert (boxes >= 0).all()
        assert (boxes <= 256).all()
        cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 * CROWD_GRID / 256).astype(int)
        assert len({tuple(cell) for cell in cells}) == CROWD_GRID**2


def test_training_scenes_have_all_sizes_shapes_colors_and_numbers_of_objects():
    objects = [item for scene in SCENES for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES) and {item.color for item in objects} == set(COLORS)
    assert {(scene.width, scene.height) for scene in SCENES} == set(IMAGE_SIZES)
    assert {len(scene.objects) for scene in SCENES} == set(range(1, MAX_OBJECTS + 1))
    assert {item.shape for item in objects if item.character} == PRINTABLE_SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_encloses_the_pixels_of_the_object(shape):
    empty = Scene("box", 240, 180, ())
    item = SceneObject(shape, "blue", "plain", (131.3, 77.8), 61.5, 13.0)
    picture, [box] = draw_scene(replace(empty, objects=(item,)))
    changed = np.abs(np.asarray(picture, dtype=int) - np.asarray(draw_scene(empty)[0])).max(-1) > 60
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    outline = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(np.array(outline) - box).max() <= 1


def test_boxes_lie_inside_the_picture():
    for scene in SCENES[:60]:
        boxes = np.array(draw_scene(scene)[1])
        assert (boxes >= 0).all()
        assert (boxes <= [scene.width, scene.height, scene.width, scene.height]).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 8).all()


def test_a_character_is_drawn_on_its_object():
    item = SceneObject("square", "yellow", "plain", (60.0, 60.0), 50.0, 0.0)
    plain, lettered = (
        np.asarray(draw_scene(Scene("letter", 120, 120, (replace(item, character=character),)))[0], dtype=int)
        for character in (None, "K")
    )
    rows, columns = np.nonzero(np.abs(plain - lettered).max(-1) > 100)
    assert 40 < rows.mean() < 80
    assert 40 < columns.mean() < 80
    # The scale is that of a picture 256 pixels wide.
    assert 4 <= np.ptp(rows) <= 8
