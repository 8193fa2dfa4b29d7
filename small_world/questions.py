"""Captions of a scene, and questions about it with their answers.

Every question has exactly one right answer; ambiguous questions (about "the star" of two stars) are not asked. As many
existence questions have the answer yes as no, and the object of the latter mostly differs in one attribute from one
that exists.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass

from .scenes import COLORS, DIGITS, SHAPES, Scene, SceneObject

KINDS = ("existence", "color", "shape", "count", "position", "relation", "reading")
# Kinds of questions about the fine splits.
FINE_KINDS = ("existence", "color", "shape", "count", "reading")
CAPTION_REQUEST = "Describe the picture."
MAX_COUNT = 8
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
# Side of the grid of the small model's vision towers, in cells.
GRID = 8
_PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """A question about a scene, of one of the `KINDS`.

    The answer is in lower case, except for letters that are to be read.
    """

    kind: str
    text: str
    answer: str


def reading_order(scene: Scene) -> list[SceneObject]:
    """Return the objects in the row-by-row order of the vision towers' grid, each row from left to right."""
    top, cell = scene.corner[1], scene.side / GRID
    return sorted(scene.objects, key=lambda item: ((item.center[1] + top) // cell, item.center[0]))


def describe(scene: Scene) -> str:
    """Return the caption of a scene: its objects in [`reading_order`], with the characters printed on them.

    In any other order, a caption would not show which image token a phrase belongs to.
    """
    parts = []
    for item in reading_order(scene):
        texture = "" if item.texture == "plain" else f"{item.texture} "
        article = "an" if not texture and item.color == "orange" else "a"
        printed = f" with the {_character_kind(item.character)} {item.character}" if item.character else ""
        parts.append(f"{article} {texture}{item.color} {item.shape}{printed}")
    return ", ".join(parts)


def ask(scene: Scene, limit: int | None = None, kinds: Collection[str] = KINDS) -> list[Question]:
    """Return at most `limit` questions about a scene, drawn at random from its seed and balanced over the kinds."""
    rng = random.Random(f"{scene.id}/questions")
    by_kind = {
        "existence": _existence(scene, rng),
        "color": _color(scene),
        "shape": _shape(scene),
        "count": _count(scene, rng),
        "position": _position(scene),
        "relation": _relation(scene, rng),
        "reading": _reading(scene),
    }
    for questions in by_kind.values():
        rng.shuffle(questions)
    # One of each kind in turn, in random order, so that a limit keeps the kinds balanced.
    asked = [kind for kind in KINDS if by_kind[kind] and kind in kinds]
    chosen: list[Question] = []
    while any(by_kind[kind] for kind in asked):
        rng.shuffle(asked)
        chosen += [by_kind[kind].pop() for kind in asked if by_kind[kind]]
    return chosen[:limit]


def _existence(scene: Scene, rng: random.Random) -> list[Question]:
    present = {(item.shape, item.color) for item in scene.objects}
    near = [(shape, color) for shape, _ in present for color in COLORS if (shape, color) not in present]
    near += [(shape, color) for shape in SHAPES for _, color in present if (shape, color) not in present]
    far = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in present]
    there = rng.sample(sorted(present), min(2, len(present)))
    absent = {rng.choice(sorted(near) if rng.random() < 0.7 else far) for _ in there}
    questions = [Question("existence", f"Is there {_a(color)} {shape}?", "yes") for shape, color in there]
    return questions + [
        Question("existence", f"Is there {_a(color)} {shape}?", "no") for shape, color in sorted(absent)
    ]


def _color(scene: Scene) -> list[Question]:
    return [
        Question("color", f"What color is the {item.shape}?", item.color)
        for item in scene.objects
        if sum(other.shape == item.shape for other in scene.objects) == 1
    ]


def _shape(scene: Scene) -> list[Question]:
    return [
        Question("shape", f"What shape is the {item.color} object?", item.shape)
        for item in scene.objects
        if sum(other.color == item.color for other in scene.objects) == 1
    ]


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    groups = {"objects": len(scene.objects)}
    for shape in SHAPES:
        groups[_PLURALS.get(shape, f"{shape}s")] = sum(item.shape == shape for item in scene.objects)
    for color in COLORS:
        groups[f"{color} objects"] = sum(item.color == color for item in scene.objects)
    # Large groups are rare and empty ones are frequent; a uniform choice of counts makes the answer hard to guess.
    counts = sorted({count for count in groups.values() if count <= MAX_COUNT})
    questions = []
    for count in rng.sample(counts, min(3, len(counts))):
        name = rng.choice(sorted(name for name, size in groups.items() if size == count))
        questions.append(Question("count", f"How many {name} are there?", _NUMBERS[count]))
    return questions


def _position(scene: Scene) -> list[Question]:
    places = ((name, place_of(item.center, scene.width, scene.height)) for item, name in _named(scene))
    return [Question("position", f"Where is the {name}?", place) for name, place in places if place]


def place_of(center: tuple[float, float], width: int, height: int) -> str | None:
    """Return the name of the ninth of a picture that a point is in, or `None` near a boundary; see [`_third`]."""
    column = _third(center[0] / width, ("left", "center", "right"))
    row = _third(center[1] / height, ("top", "middle", "bottom"))
    if not column or not row:
        return None
    short = {"middle center": "center", "middle left": "left", "middle right": "right"}
    short |= {"top center": "top", "bottom center": "bottom"}
    place = f"{row} {column}"
    return short.get(place, place)


def _third(value: float, names: tuple[str, str, str]) -> str | None:
    """Return the name of a third of the picture, or `None` within 4 % of a boundary, where the answer is unclear."""
    if min(abs(value - 1 / 3), abs(value - 2 / 3)) < 0.04:
        return None
    return names[int(value * 3)]


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    named = _named(scene)
    questions = []
    for _ in range(3 if len(named) >= 2 else 0):
        (a, a_name), (b, b_name) = rng.sample(named, 2)
        dx = (a.center[0] - b.center[0]) / scene.side
        dy = (a.center[1] - b.center[1]) / scene.side
        horizontal = rng.random() < 0.5
        if abs(dx if horizontal else dy) < 0.08:
            continue
        if horizontal:
            text, answer = "left or right of", "left" if dx < 0 else "right"
        else:
            text, answer = "above or below", "above" if dy < 0 else "below"
        questions.append(Question("relation", f"Is the {a_name} {text} the {b_name}?", answer))
    return list(dict.fromkeys(questions))


def _reading(scene: Scene) -> list[Question]:
    return [
        Question("reading", f"What {_character_kind(item.character)} is on the {name}?", item.character)
        for item, name in _named(scene)
        if item.character
    ]


def _named(scene: Scene) -> list[tuple[SceneObject, str]]:
    """Return the objects that color and shape identify, each with its name."""
    pairs = [(item.shape, item.color) for item in scene.objects]
    return [
        (item, f"{item.color} {item.shape}")
        for item, pair in zip(scene.objects, pairs, strict=True)
        if pairs.count(pair) == 1
    ]


def _character_kind(character: str) -> str:
    return "digit" if character in DIGITS else "letter"


def _a(color: str) -> str:
    return f"an {color}" if color == "orange" else f"a {color}"
