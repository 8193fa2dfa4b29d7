"""Pictures, conversations and reference answers for tests with vLLM; skipped where it is not installed."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import pytest

from . import reference

MODEL = Path(__file__).parents[2] / "small_world" / "model"
collect_ignore = ["site"]


def pytest_report_header():
    """Say which release runs."""
    if find_spec("vllm"):
        import vllm

        return f"vllm {vllm.__version__} ({vllm.__file__})"
    return None


def picture(seed, size=(160, 120), mode="RGB"):
    """Draw three shapes."""
    colors = ("red", "blue", "green", "orange", "purple", "teal", "black")
    image = PIL.Image.new(mode, size, "white")
    draw = PIL.ImageDraw.Draw(image)
    for index in range(3):
        left, top = (37 * seed + 53 * index) % (size[0] - 50), (29 * seed + 41 * index) % (size[1] - 45)
        shape = draw.ellipse if (seed + index) % 2 else draw.rectangle
        shape((left, top, left + 40 + 3 * index, top + 36), fill=colors[(seed + 2 * index) % len(colors)])
    return image


def boxes_of(seed, count, size=(160, 120)):
    """Make boxes inside a picture."""
    return [
        [
            (seed * 13 + 29 * index) % (size[0] - 60),
            (seed * 7 + 17 * index) % (size[1] - 60),
            (seed * 13 + 29 * index) % (size[0] - 60) + 20 + 5 * index,
            (seed * 7 + 17 * index) % (size[1] - 60) + 30 + 3 * index,
        ]
        for index in range(count)
    ]


def ask(text, *images):
    """Make a user turn of `(picture, boxes)` pairs and a text."""
    blocks = [
        {"type": "image", "image": image} if boxes is None else {"type": "image", "image": image, "boxes": boxes}
        for image, boxes in images
    ]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversations():
    """Return twenty conversations; some images and boxes come several times, in other company."""
    first, second, third = picture(1), picture(2), picture(3, (90, 200))
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    what, color, count = "What is in the picture?", "Which color is the circle?", "How many shapes are there?"
    return [
        *([ask(what, (first, boxes_of(1, number)))] for number in range(6)),
        [ask(what, (second, boxes_of(2, 3)))],
        [ask(color, (third, boxes_of(3, 2, third.size)))],
        [ask("Compare the pictures.", (first, boxes_of(1, 4)), (second, boxes_of(2, 1)))],
        [ask("Compare the pictures.", (second, boxes_of(2, 1)), (first, boxes_of(1, 4)))],
        [ask("Compare the pictures.", (first, boxes_of(1, 2)), (picture(4), boxes_of(4, 5)))],
        [ask("Are they equal?", (first, boxes_of(1, 2)), (first, boxes_of(1, 3)))],
        [ask(what, (first, boxes_of(1, 2))), answer("a red circle"), ask(color)],
        [ask(what, (first, boxes_of(1, 2))), answer("a red circle"), ask(count, (second, boxes_of(2, 2)))],
        [ask("Hello."), answer("Hello!"), ask(what, (second, []))],
        [system, ask(count, (first, boxes_of(1, 1)))],
        [system, ask(what, (second, boxes_of(2, 5))), answer("shapes"), ask(color), answer("red"), ask("Sure?")],
        [ask("What do you see?")],
        [system, ask("Count to three.")],
        [ask(count, (picture(5), {"boxes": boxes_of(5, 4), "labels": list("abab"), "scores": [0.9, 0.5, 0.7, 0.4]}))],
    ]


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    import mgllava  # noqa: F401

    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def generate():
    """Return a function from a conversation to the ids of its prompt and of its greedy answer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda conversation, folder=MODEL, **options: process.submit(
            reference.generate, folder, conversation, **options
        ).result()
