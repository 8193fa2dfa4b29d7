"""The models that this git repository ships answer questions about new pictures."""

import json
import shutil

import pytest
from PIL import Image
from transformers import AutoProcessor

from small_world import demo
from small_world.bundle import LANGUAGE_MODEL
from small_world.questions import KINDS
from small_world.refresh_code import MODELS, refresh_code

PICTURES = 20
# Low enough for the variance of twenty pictures; a broken model is far below. docs/small_model.md has the accuracy,
# measured on 600.
ENOUGH = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.main(folder, demo.MODEL, PICTURES)
    return folder


def test_its_size_is_limited():
    files = [path for folder in (demo.MODEL, LANGUAGE_MODEL) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6


def test_the_size_of_the_small_slime_is_limited():
    assert sum(path.stat().st_size for path in demo.SLIME.rglob("*") if path.suffix != ".pyc") <= 10e6


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_its_code_equals_that_of_the_package(model, tmp_path):
    fresh = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    refresh_code(fresh)
    shipped, wanted = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".py", ".json") and "__pycache__" not in path.parts
        }
        for folder in (model, fresh)
    )
    different = sorted(str(path) for path in shipped.keys() | wanted.keys() if shipped.get(path) != wanted.get(path))
    assert not different, f"Run `python -m small_world.refresh_code` (make refresh-code): {different} are out of date."
    assert len([path for path in shipped if path.suffix == ".py"]) > 5


def test_it_answers(folder):
    result = json.loads((folder / "accuracy.json").read_text())
    assert result["accuracy"].keys() == {*KINDS, "all"}
    assert len({answer["image"] for answer in result["answers"]}) == PICTURES
    assert result["accuracy"]["all"] >= ENOUGH


def test_the_demo_draws_some_answers(folder):
    drawing = Image.open(folder / "answers.png")
    assert drawing.width > 3 * 400
    # Boxes and answers in color.
    assert len(drawing.convert("RGB").getcolors(1 << 24)) > 1000


def test_the_demo_draws_what_slime_kept(folder):
    drawing = Image.open(folder / "kept.png").convert("RGB")
    assert drawing.width > 3 * 400
    assert len(drawing.getcolors(1 << 24)) > 1000


@pytest.mark.parametrize("size", [(1, 50), (3, 40), (40, 3), (3, 3), (4, 3)])
def test_its_detector_accepts_pictures_of_a_few_pixels(size):
    """The channels of such a picture cannot be distinguished from width and height by their number."""
    processor = AutoProcessor.from_pretrained(demo.MODEL)
    inputs = processor(Image.new("RGB", size, "red"), "USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert inputs["num_boxes"].tolist() == [len(inputs["boxes"][0])]
