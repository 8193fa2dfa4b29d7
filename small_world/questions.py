"""What can be said and asked about a scene: captions, questions and their answers.

Every question has exactly one right answer; where a scene is ambiguous (two stars, one of them to be named), nothing
is asked. Existence is asked as often of what is there as of what is not, and what is not there is mostly one attribute
away from what is.
"""

import random
from dataclasses import dataclass

from .scenes import COLORS, DIGITS, SHAPES, Scene, SceneObject

KINDS = ("existence", "color", "shape", "count", "position", "relation", "reading")
CAPTION_REQUEST = "Describe the picture."
MAX_COUNT = 8
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
# Cells along a side of the grid that vision gives to the small model.
GRID = 8
_PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Args:
        kind (`str`): One of `KINDS`.
        text (`str`): The question.
        answer (`str`): Its only right answer, in lower case but for letters that are read.
    """

    kind: str
    text: str
    answer: str


def reading_order(scene: Scene) -> list[SceneObject]:
    """Objects row by row of the grid that vision gives to the model, each row from left to right."""
    top, cell = scene.corner[1], scene.side / GRID
    return sorted(scene.objects, key=lambda item: ((item.center[1] + top) // cell, item.center[0]))


def describe(scene: Scene) -> str:
    """Caption of a scene: its objects in [`reading_order`], with what is printed on them.

    In any other order a caption would not tell which token a phrase belongs to.
    """
    parts = []
    for item in reading_order(scene):
        texture = "" if item.texture == "plain" else f"{item.texture} "
        article = "an" if not texture and item.color == "orange" else "a"
        printed = f" with the {_character_kind(item.character)} {item.character}" if item.character else ""
        parts.append(f"{article} {texture}{item.color} {item.shape}{printed}")
    return ", ".join(parts)


def ask(scene: Scene, limit: int | None = None) -> list[Question]:
    """Questions about a scene, drawn from its seed.

    Args:
        scene (`Scene`): The scene.
        limit (`int`, *optional*): At most so many questions, of as many kinds as there are.
    """
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
    # One of each kind in turn, kinds in random order, so that a limit leaves them balanced.
    kinds = [kind for kind in KINDS if by_kind[kind]]
    chosen = []
    while any(by_kind.values()):
        rng.shuffle(kinds)
        chosen += [by_kind[kind].pop() for kind in kinds if by_kind[kind]]
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
    # Large groups are rare and zeros are many; a fair share of each makes the answer hard to guess.
    counts = sorted({count for count in groups.values() if count <= MAX_COUNT})
    questions = []
    for count in rng.sample(counts, min(3, len(counts))):
        name = rng.choice(sorted(name for name, size in groups.items() if size == count))
        questions.append(Question("count", f"How many {name} are there?", _NUMBERS[count]))
    return questions


def _position(scene: Scene) -> list[Question]:
    questions = []
    for item, name in _named(scene):
        column = _third(item.center[0] / scene.width, ("left", "center", "right"))
        row = _third(item.center[1] / scene.height, ("top", "middle", "bottom"))
        if column and row:
            answer = {"middle center": "center", "middle left": "left", "middle right": "right"}
            answer |= {"top center": "top", "bottom center": "bottom"}
            place = f"{row} {column}"
            questions.append(Question("position", f"Where is the {name}?", answer.get(place, place)))
    return questions


def _third(value: float, names: tuple[str, str, str]) -> str | None:
    """Which third of the picture, or `None` within 4 % of a border, where people would disagree."""
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
    """Objects that color and shape together single out."""
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
