"""Scenes of the small world: what lies where in a picture, drawn from a seed.

A scene is plain data. `drawing` turns it into pixels, `questions` into captions and conversations. The same seed gives
the same scene on every machine; the seeds of different splits never meet.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test", "unseen", "crowded"]
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "hexagon", "heart", "moon")
# What the detector finds in all shapes alike, for whoever does not say what to look for.
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
# No two that look alike at seven pixels: O and 0, I and 1, S and 5, B and 8, Z and 2 keep the digit only.
LETTERS = "ACEFHKLMNPRTUVXY"
DIGITS = "0123456789"
IMAGE_SIZES = ((256, 256), (256, 192), (192, 256), (256, 160), (160, 256), (320, 240), (240, 320), (384, 216))
MAX_OBJECTS = 15
# Side of the grid that a crowded picture is laid out on.
CROWD_GRID = 5
# A ring and a moon have no middle to print on.
PRINTABLE_SHAPES = frozenset(SHAPES) - {"ring", "moon"}

# Pairs that training never shows, so that a test can ask whether shape and color are understood apart.
HELD_OUT = frozenset(
    (shape, color) for i, shape in enumerate(SHAPES) for j, color in enumerate(COLORS) if (3 * i + j) % 8 == 0
)


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Args:
        shape (`str`): One of `SHAPES`.
        color (`str`): A key of `COLORS`.
        texture (`str`): One of `TEXTURES`.
        center (`tuple[float, float]`): x, y in pixels of the image.
        size (`float`): Diameter in pixels of the image.
        angle (`float`): Rotation in degrees, counterclockwise.
        character (`str`, *optional*): Letter or digit printed on the object.
    """

    shape: str
    color: str
    texture: str
    center: tuple[float, float]
    size: float
    angle: float
    character: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Args:
        id (`str`): `split/number`, which is also the seed.
        width (`int`): Width in pixels.
        height (`int`): Height in pixels.
        objects (`tuple[SceneObject, ...]`): Back to front.
    """

    id: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]

    @property
    def side(self) -> int:
        """Side of the square that the picture is laid into, in pixels of the picture."""
        return max(self.width, self.height)

    @property
    def corner(self) -> tuple[float, float]:
        """Where the left upper corner of the picture lies in that square, which has the picture in its middle."""
        return (self.side - self.width) / 2, (self.side - self.height) / 2


def make_scene(split: Split, number: int) -> Scene:
    """Draw the scene of a seed.

    Args:
        split (`str`): One of `Split`. `unseen` shows pairs of shape and color from `HELD_OUT`
            only, the others never show them. `crowded` has as many objects as fit, which teaches the towers more in
            the same time.
        number (`int`): Seed within the split.
    """
    scene_id = f"{split}/{number}"
    rng = random.Random(scene_id)
    pairs = [
        (shape, color) for shape in SHAPES for color in COLORS if ((shape, color) in HELD_OUT) == (split == "unseen")
    ]
    if split == "crowded":
        return _make_crowd(scene_id, rng, pairs)
    width, height = rng.choice(IMAGE_SIZES)
    # Sizes are relative to the long side, since that is what the model's square is scaled to.
    unit = max(width, height) / 256
    wanted = rng.randint(1, MAX_OBJECTS) if rng.random() < 0.5 else rng.randint(1, 6)
    # Repeating a shape or a color makes questions of counting and of telling apart worth asking.
    favorite_shape, favorite_color = rng.choice(SHAPES), rng.choice(list(COLORS))
    favored = [pair for pair in pairs if favorite_shape in pair or favorite_color in pair] or pairs
    objects: list[SceneObject] = []
    for _ in range(wanted):
        shape, color = rng.choice(favored if rng.random() < 0.35 else pairs)
        placed = _place(rng, width, height, unit, objects)
        if placed is None:
            continue
        center, size = placed
        # A character must be a few pixels high and still fit on its object.
        printable = shape in PRINTABLE_SHAPES and size >= 26 * unit
        character = rng.choice(LETTERS + DIGITS) if printable and rng.random() < 0.6 else None
        texture = "plain" if character else rng.choices(TEXTURES, weights=(3, 1, 1))[0]
        angle = rng.uniform(-20, 20)
        objects.append(SceneObject(shape, color, texture, center, size, angle, character))
    return Scene(scene_id, width, height, tuple(objects))


def _make_crowd(scene_id: str, rng: random.Random, pairs: list[tuple[str, str]]) -> Scene:
    """Put one object into each cell of a grid, most of them with a character."""
    side, cell = 256, 256 / CROWD_GRID
    objects = []
    for index in range(CROWD_GRID**2):
        shape, color = rng.choice(pairs)
        size = rng.uniform(16, 26) if rng.random() < 0.2 else rng.uniform(26, 58)
        character = None
        if shape in PRINTABLE_SHAPES and size >= 26 and rng.random() < 0.8:
            character = rng.choice(LETTERS + DIGITS)
        texture = "plain" if character else rng.choice(TEXTURES)
        x, y = (
            min(max((place + 0.5) * cell + rng.uniform(-6, 6), size / 2 + 1), side - size / 2 - 1)
            for place in (index % CROWD_GRID, index // CROWD_GRID)
        )
        center = round(x, 2), round(y, 2)
        objects.append(SceneObject(shape, color, texture, center, round(size, 2), rng.uniform(-20, 20), character))
    rng.shuffle(objects)
    return Scene(scene_id, side, side, tuple(objects))


def _place(
    rng: random.Random, width: int, height: int, unit: float, objects: list[SceneObject]
) -> tuple[tuple[float, float], float] | None:
    """Find room for one more object. Overlaps are allowed as long as every object behind stays recognizable."""
    for _ in range(30):
        size = unit * (rng.uniform(16, 34) if rng.random() < 0.6 else rng.uniform(34, 80))
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
