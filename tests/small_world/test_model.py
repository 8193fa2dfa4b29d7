"""The model that the repository ships answers questions about new pictures, with boxes that it finds itself."""

import json

import pytest
from PIL import Image

from small_world import demo
from small_world.bundle import LANGUAGE_MODEL
from small_world.questions import KINDS

PICTURES = 20
# What shows a broken model or a broken path to it, with room for the chance of twenty pictures. The accuracy itself is
# measured on 600, see docs/small_model.md.
ENOUGH = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.main(folder, demo.MODEL, PICTURES)
    return folder


def test_it_is_small():
    files = [path for folder in (demo.MODEL, LANGUAGE_MODEL) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert not [path for path in files if path.suffix == ".py"]


def test_it_answers(folder):
    result = json.loads((folder / "accuracy.json").read_text())
    assert result["accuracy"].keys() == {*KINDS, "all"}
    assert len({answer["image"] for answer in result["answers"]}) == PICTURES
    assert result["accuracy"]["all"] >= ENOUGH


def test_the_demo_draws_some_answers(folder):
    drawing = Image.open(folder / "answers.png")
    assert drawing.width > 3 * 400
    # Boxes and answers in colour.
    assert len(drawing.convert("RGB").getcolors(1 << 24)) > 1000
