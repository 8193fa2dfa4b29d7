"""Videos of the small world: objects that move, appear, vanish and change color, and questions about them.

Every question needs several frames: a single one shows neither a direction, nor what came first, nor both colors. Like
a scene, a video is drawn at random from a seed.
"""

import random
from dataclasses import dataclass
from typing import Literal

from .questions import Question, place_of
from .scenes import COLORS, HELD_OUT, SHAPES, Scene, SceneObject

VideoSplit = Literal["train", "test", "lesson"]
# Kinds of questions about videos.
VIDEO_KINDS = ("motion", "appearance", "disappearance", "change", "before", "after")
NUM_FRAMES = 8
SIDE = 256
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Sizes of the objects, and lengths of the paths, in pixels. Paths are short, so that places say little of directions.
_SIZES, _PATHS = (40, 60), (76, 100)
# Frames between the two objects of a pair that appear, or vanish.
_GAP = 2
_TRIES = 200
_MOST_OF_LESSON = 4


@dataclass(frozen=True)
class Video:
    """The frames of a video, which all have its `id` (it gives the background), and the questions about it."""

    id: str
    frames: tuple[Scene, ...]
    questions: tuple[Question, ...]


def make_video(split: VideoSplit, number: int) -> Video:
    """Return the video of a seed, which is `number` within the split.

    It has one or two objects that move, two of one shape that appear (or vanish) one after the other, and one that
    changes its color. All other shapes and all colors are different, and each object does one thing only.

    Videos of the split `lesson` have two frames, in which all objects move, with questions about their places, too.
    """
    video_id = f"video-{split}/{number}"
    rng = random.Random(video_id)
    if split == "lesson":
        return _make_lesson(video_id, rng)
    num_moving = rng.randint(1, 2)
    directions = [*rng.choices(list(_DIRECTIONS), k=num_moving), *[None] * 3]
    paths = _place(rng, directions)
    while True:
        # Those that move, the pair, and the one that changes from the last color but one to the last.
        shapes, colors = rng.sample(SHAPES, num_moving + 2), rng.sample(list(COLORS), num_moving + 4)
        shapes.insert(num_moving, shapes[num_moving])
        if not HELD_OUT.intersection([*zip(shapes, colors, strict=False), (shapes[-1], colors[-1])]):
            break
    sizes_and_angles = [(size, rng.uniform(-20, 20)) for size, _ in paths]
    # For each object of the pair, the frames that show it.
    appear = rng.random() < 0.5
    first = rng.randint(1, NUM_FRAMES - 1 - _GAP)
    times = (first, first + _GAP)
    shown = [set(range(time, NUM_FRAMES)) if appear else set(range(time)) for time in times]
    shown = [set(range(NUM_FRAMES))] * num_moving + shown + [set(range(NUM_FRAMES))]
    changes = rng.randint(2, NUM_FRAMES - 2)
    order = rng.sample(range(len(paths)), len(paths))
    frames = []
    for time in range(NUM_FRAMES):
        objects = []
        for index in (index for index in order if time in shown[index]):
            size, angle = sizes_and_angles[index]
            color = colors[-1] if index == len(paths) - 1 and time >= changes else colors[index]
            objects.append(SceneObject(shapes[index], color, "plain", paths[index][1][time], size, angle))
        frames.append(Scene(video_id, SIDE, SIDE, tuple(objects)))

    questions = [_motion(colors[index], shapes[index], directions[index]) for index in range(num_moving)]
    questions.append(_order(rng, appear, *shapes[num_moving : num_moving + 1], *colors[num_moving : num_moving + 2]))
    shape, before, after = shapes[-1], colors[-2], colors[-1]
    questions.append(Question("before", f"What color was the {shape} at first?", before))
    questions.append(Question("after", f"What color does the {shape} become?", after))
    rng.shuffle(questions)
    # The others name the object that changes, so this one is the first.
    questions.insert(0, Question("change", "Which object changes its color?", shape))
    return Video(video_id, tuple(frames), tuple(questions))


def _make_lesson(video_id: str, rng: random.Random) -> Video:
    """Return a video whose objects all move, in two frames: the places show what the direction depends on."""
    directions: list[str | None] = [*rng.choices(list(_DIRECTIONS), k=rng.randint(1, _MOST_OF_LESSON))]
    placed = _place(rng, directions)
    pairs = _pairs(rng, len(placed))
    angles = [rng.uniform(-20, 20) for _ in placed]
    frames = tuple(
        Scene(
            video_id,
            SIDE,
            SIDE,
            tuple(
                SceneObject(*pair, "plain", path[time], size, angle)
                for pair, (size, path), angle in zip(pairs, placed, angles, strict=True)
            ),
        )
        for time in (0, NUM_FRAMES - 1)
    )
    asked = list(zip(pairs, directions, strict=True))
    motion = [_motion(color, shape, direction) for (shape, color), direction in asked]
    places = [
        Question("place", f"Where {verb} the {color} {shape} {when}?", answer)
        for (shape, color), (_, path) in zip(pairs, placed, strict=True)
        for verb, when, center in (("was", "at first", path[0]), ("is", "at the end", path[-1]))
        if (answer := place_of(center, SIDE, SIDE))
    ]
    rng.shuffle(places)
    return Video(video_id, frames, (*motion, *places))


def _order(rng: random.Random, appear: bool, shape: str, first: str, last: str) -> Question:
    """Ask which of two objects of a shape, by their colors, appears first or vanishes last."""
    kind, verb = ("appearance", "appears first") if appear else ("disappearance", "vanishes last")
    one, other = rng.sample([first, last], 2)
    text = f"Which {shape} {verb}, the {one} one or the {other} one?"
    return Question(kind, text, first if appear else last)


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return pairs of shape and color, all different and none of them held out."""
    while True:
        pairs = list(zip(rng.sample(SHAPES, count), rng.sample(list(COLORS), count), strict=True))
        if not HELD_OUT.intersection(pairs):
            return pairs


def _motion(color: str, shape: str, direction: str | None) -> Question:
    return Question("motion", f"Which way does the {color} {shape} move?", str(direction))


def _place(rng: random.Random, directions: list[str | None]) -> list[tuple[float, list[tuple[float, float]]]]:
    """Return the size and the centers in each frame of objects that move in the given directions and never touch."""
    while True:
        placed: list[tuple[float, list[tuple[float, float]]]] = []
        for direction in directions:
            for _ in range(_TRIES):
                size = round(rng.uniform(*_SIZES), 2)
                length = rng.uniform(*_PATHS) if direction else 0.0
                dx, dy = (length * part for part in _DIRECTIONS[direction]) if direction else (0.0, 0.0)
                x = rng.uniform(size / 2 + max(0, -dx), SIDE - size / 2 - max(0, dx))
                y = rng.uniform(size / 2 + max(0, -dy), SIDE - size / 2 - max(0, dy))
                steps = [time / (NUM_FRAMES - 1) for time in range(NUM_FRAMES)]
                path = [(round(x + step * dx, 2), round(y + step * dy, 2)) for step in steps]
                if all(_is_clear(size, path, *other) for other in placed):
                    placed.append((size, path))
                    break
            else:
                break
        if len(placed) == len(directions):
            return placed


def _is_clear(
    size: float, path: list[tuple[float, float]], other_size: float, other: list[tuple[float, float]]
) -> bool:
    near = 0.5 * (size + other_size)
    return all(
        (x - other_x) ** 2 + (y - other_y) ** 2 > near**2
        for (x, y), (other_x, other_y) in zip(path, other, strict=True)
    )
