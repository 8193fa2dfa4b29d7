"""Scenes of the small world: the objects of a picture and their places, drawn at random from a seed.

A scene is plain data. `drawing` turns it into pixels, `questions` into captions and conversations. The same seed gives
the same scene on every machine; different splits have different seeds.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test", "unseen", "crowded", "fine", "fine-test", "fine-crowded"]
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "hexagon", "heart", "moon")
# The label with which the detector finds objects of any shape.
ANY_SHAPE = "object"
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 92, 214),
    "yellow": (240, 200, 30),
    "orange": (242, 130, 24),
    "purple": (136, 56, 188),
    "pink": (240, 130, 186),
    "cyan": (40, 190, 205),
}
TEXTURES = ("plain", "striped", "dotted")
# Without letters that look like a digit at seven pixels: O, I, S, B and Z.
LETTERS = "ACEFHKLMNPRTUVXY"
DIGITS = "0123456789"
IMAGE_SIZES = ((256, 256), (256, 192), (192, 256), (256, 160), (160, 256), (320, 240), (240, 320), (384, 216))
MAX_OBJECTS = 15
# Of the fine splits. As tiles of 112 pixels, these sizes are 2x2; their global view has half of the resolution.
FINE_IMAGE_SIZES = ((224, 224), (224, 196), (196, 224), (224, 168), (168, 224))
FINE_MAX_OBJECTS = 8
# Their objects are centered in cells of this many pixels, the patches of the vision tower in a tile. A tower of five
# layers does not learn to read characters that lie across patches.
FINE_CELL = 14
# Side of the grid of a crowded picture, in cells with one object each.
CROWD_GRID = 5
# A ring and a moon have no center to print a character on.
PRINTABLE_SHAPES = frozenset(SHAPES) - {"ring", "moon"}

# Pairs of shape and color that are not in the training data, to test whether the model learns both independently.
HELD_OUT = frozenset(
    (shape, color) for i, shape in enumerate(SHAPES) for j, color in enumerate(COLORS) if (3 * i + j) % 8 == 0
)


@dataclass(frozen=True)
class SceneObject:
    """An object, with center (x, y) and size (its diameter) in pixels of the picture."""

    shape: str
    color: str
    texture: str
    center: tuple[float, float]
    size: float
    # In degrees, counterclockwise.
    angle: float
    # A letter or digit that is printed on the object.
    character: str | None = None


@dataclass(frozen=True)
class Scene:
    """The contents of a picture of `width` x `height` pixels."""

    # `split/number`, which is also the seed.
    id: str
    width: int
    height: int
    # From back to front.
    objects: tuple[SceneObject, ...]
    # Height of capitals, in pixels of a picture whose long side is 256.
    character_height: float = 12.0

    @property
    def side(self) -> int:
        """Side of the square that the picture is centered in, in pixels of the picture."""
        return max(self.width, self.height)

    @property
    def corner(self) -> tuple[float, float]:
        """Left upper corner of the picture (x, y) in that square."""
        return (self.side - self.width) / 2, (self.side - self.height) / 2


@dataclass(frozen=True)
class _Print:
    """Height of the characters, and size of the smallest object that has one, both where the long side is 256."""

    height: float
    smallest_object: float


# A character must be a few pixels high and still fit on its object.
_PRINT, _FINE_PRINT = _Print(12.0, 26), _Print(8.0, 32)


def make_scene(split: Split, number: int) -> Scene:
    """Return the scene of a seed, which is `number` within the split.

    `unseen` has only pairs of shape and color from `HELD_OUT`, the other splits have only other pairs. `crowded` has
    as many objects as fit, so that the towers learn more from a picture. The `fine` splits are for SliME: their print
    is as high as a patch of the vision tower in a tile, and half as high in the global view.
    """
    scene_id = f"{split}/{number}"
    rng = random.Random(scene_id)
    pairs = [
        (shape, color) for shape in SHAPES for color in COLORS if ((shape, color) in HELD_OUT) == (split == "unseen")
    ]
    if split == "crowded":
        return _make_crowd(scene_id, rng, pairs)
    if split == "fine-crowded":
        return _make_crowd(scene_id, rng, pairs, FINE_IMAGE_SIZES[0][0], _FINE_PRINT)
    if split in ("fine", "fine-test"):
        return _make_fine(scene_id, rng, pairs)
    width, height = rng.choice(IMAGE_SIZES)
    # Sizes are relative to the long side, which is scaled to the side of the model's square.
    unit = max(width, height) / 256
    wanted = rng.randint(1, MAX_OBJECTS) if rng.random() < 0.5 else rng.randint(1, 6)
    # Repeated shapes and colors make questions about numbers and single objects harder.
    favorite_shape, favorite_color = rng.choice(SHAPES), rng.choice(list(COLORS))
    favored = [pair for pair in pairs if favorite_shape in pair or favorite_color in pair] or pairs
    objects: list[SceneObject] = []
    for _ in range(wanted):
        shape, color = rng.choice(favored if rng.random() < 0.35 else pairs)
        placed = _place(rng, width, height, unit, objects)
        if placed is None:
            continue
        center, size = placed
        printable = shape in PRINTABLE_SHAPES and size >= _PRINT.smallest_object * unit
        character = rng.choice(LETTERS + DIGITS) if printable and rng.random() < 0.6 else None
        texture = "plain" if character else rng.choices(TEXTURES, weights=(3, 1, 1))[0]
        angle = rng.uniform(-20, 20)
        objects.append(SceneObject(shape, color, texture, center, size, angle, character))
    return Scene(scene_id, width, height, tuple(objects))


def _make_fine(scene_id: str, rng: random.Random, pairs: list[tuple[str, str]]) -> Scene:
    """Return a scene of few objects, most of them with a character."""
    width, height = rng.choice(FINE_IMAGE_SIZES)
    unit = max(width, height) / 256
    smallest = _FINE_PRINT.smallest_object
    objects: list[SceneObject] = []
    for _ in range(rng.randint(1, FINE_MAX_OBJECTS)):
        shape, color = rng.choice(pairs)
        placed = _place(rng, width, height, unit, objects, ((16, smallest), (smallest, 66)), 0.2)
        if placed is None:
            continue
        center, size = placed
        center = _centered_in_cell(center)
        printable = shape in PRINTABLE_SHAPES and size >= smallest * unit
        character = rng.choice(LETTERS + DIGITS) if printable and rng.random() < 0.8 else None
        texture = "plain" if character else rng.choices(TEXTURES, weights=(3, 1, 1))[0]
        objects.append(SceneObject(shape, color, texture, center, size, rng.uniform(-20, 20), character))
    return Scene(scene_id, width, height, tuple(objects), _FINE_PRINT.height)


def _make_crowd(
    scene_id: str,
    rng: random.Random,
    pairs: list[tuple[str, str]],
    side: int = 256,
    print_: _Print = _PRINT,
) -> Scene:
    """Return a scene with one object in each cell of a grid, most of them with a character."""
    cell, unit, smallest = side / CROWD_GRID, side / 256, print_.smallest_object
    objects = []
    for index in range(CROWD_GRID**2):
        shape, color = rng.choice(pairs)
        size = unit * (rng.uniform(16, smallest) if rng.random() < 0.2 else rng.uniform(smallest, 58))
        character = None
        if shape in PRINTABLE_SHAPES and size >= smallest * unit and rng.random() < 0.8:
            character = rng.choice(LETTERS + DIGITS)
        texture = "plain" if character else rng.choice(TEXTURES)
        x, y = (
            min(max((place + 0.5) * cell + rng.uniform(-6, 6), size / 2 + 1), side - size / 2 - 1)
            for place in (index % CROWD_GRID, index // CROWD_GRID)
        )
        center = _centered_in_cell((x, y)) if print_ is _FINE_PRINT else (round(x, 2), round(y, 2))
        objects.append(SceneObject(shape, color, texture, center, round(size, 2), rng.uniform(-20, 20), character))
    rng.shuffle(objects)
    return Scene(scene_id, side, side, tuple(objects), print_.height)


def _centered_in_cell(center: tuple[float, float]) -> tuple[float, float]:
    x, y = (FINE_CELL * (value // FINE_CELL + 0.5) for value in center)
    return x, y


def _place(
    rng: random.Random,
    width: int,
    height: int,
    unit: float,
    objects: list[SceneObject],
    sizes: tuple[tuple[float, float], tuple[float, float]] = ((16, 34), (34, 80)),
    share_of_small: float = 0.6,
) -> tuple[tuple[float, float], float] | None:
    """Return center and size of another object that leaves the objects behind it recognizable, if there is room."""
    for _ in range(30):
        size = unit * rng.uniform(*sizes[0 if rng.random() < share_of_small else 1])
        if size > 0.9 * min(width, height):
            continue
        x = rng.uniform(size / 2, width - size / 2)
        y = rng.uniform(size / 2, height - size / 2)
        clear = all(
            math.hypot(x - other.center[0], y - other.center[1]) > 0.42 * (size + other.size) for other in objects
        )
        if clear:
            return (round(x, 2), round(y, 2)), round(size, 2)
    return None
