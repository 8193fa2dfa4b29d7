"""The examples run, and print and draw what they promise."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from torchvision.ops import box_iou

from mgllava.box_files import detect_images, open_detector, read_boxes, write_boxes
from mgllava.visualization import draw_boxes
from tests import processes

EXAMPLES = Path(__file__).parent.parent / "examples"
# A module that examples import.
HELPER = "small_model.py"
FILES = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") and path.name != HELPER)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script as `python examples/NAME ARGUMENTS` in an empty folder; return its names and its output."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out

    return run


@pytest.fixture
def run_notebook(monkeypatch, capsys):
    """Run the cells of a notebook in its folder, with other values of its parameters."""

    def run(name, **parameters):
        monkeypatch.chdir(EXAMPLES)
        names = {}
        for cell in code_cells(name):
            exec(compile("".join(cell["source"]), name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert parameters.keys() <= names.keys()
                names.update(parameters)
        return names, capsys.readouterr().out

    return run


def code_cells(name):
    return [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]


def answers(out):
    return re.findall(r"^Answer: +(.*)", out, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_example_is_short_and_in_the_index(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
        # Saved outputs would become outdated.
        assert all(cell.get("outputs", []) == [] for cell in cells)
    assert len(text.splitlines()) < 80
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()


def test_index_lists_existing_examples_only():
    listed = re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == [path.name for path in FILES]


def test_first_answer_is_right(run):
    _, out = run("first_answer.py")
    assert "Question: What letter is on the cyan square?" in out and answers(out) == ["A"]


def test_option_model_loads_another_model(run, repository):
    _, out = run("first_answer.py", "--model", repository)
    assert len(answers(out)) == 1 and answers(out) != ["A"]


def test_chat_session_answers_several_questions(run):
    _, out = run("chat_session.py")
    assert answers(out) == ["two", "L", "center"]
    assert out.count("tokens, ") == 3


def test_streaming_comes_in_pieces(run):
    _, out = run("streaming.py")
    assert "a pink star, a purple triangle with the digit 8" in out
    assert int(re.search(r"\((\d+) pieces\)", out)[1]) > 5


def test_batch_answers_every_prompt(run):
    names, out = run("batch.py")
    counts = [tuple(map(int, found)) for found in re.findall(r"\((\d) images, (\d+) tokens\)", out)]
    assert [images for images, _ in counts] == [1, 1, 2, 0]
    assert all(tokens > 64 * images for images, tokens in counts)
    assert all(content[-1]["text"] in out for content in names["PROMPTS"])
    assert [out.splitlines()[line].strip() for line in (1, 3)] == ["yes", "no"]


def test_own_boxes_get_one_token_each(run_notebook):
    names, out = run_notebook("own_boxes.ipynb")
    assert names["tokens"] == 64 + 3 and names["tokens_without"] == 64 + 1
    assert "67 tokens stand for the picture: 64 for all of it, 3 for boxes" in out
    assert names["answer"].strip() == "L"
    assert ImageChops.difference(names["picture"], names["image"].convert("RGB")).getbbox() is not None
    assert names["picture"].size == tuple(2 * side for side in names["image"].size)  # small pictures are enlarged


def test_found_boxes_are_listed_and_drawn(run_notebook):
    names, out = run_notebook("find_boxes.ipynb")
    assert 0 < len(names["found"]["boxes"]) == len(out.splitlines())
    square, star = [228, 49, 303, 122], [76, 96, 98, 117]
    shown = [star, [50, 122, 89, 155], [140, 70, 168, 98], [124, 120, 149, 142], [201, 170, 227, 200]]
    assert (box_iou(torch.tensor(shown), names["found"]["boxes"]).amax(1) > 0.5).all()
    # The tagger does not see the square; searching for its name finds it.
    assert (box_iou(torch.tensor([square]), names["found"]["boxes"]) < 0.5).all()
    picked = names["picked"]
    assert set(picked["labels"]) == {"square", "star"}
    assert (box_iou(torch.tensor([square, star]), picked["boxes"]).amax(1) > 0.5).all()
    assert ImageChops.difference(names["picture"], names["image"].convert("RGB")).getbbox() is not None


def test_boxes_of_a_box_file_are_drawn(run, tmp_path):
    _, out = run("draw_boxes.py")
    assert "Drew 3 boxes" in out and Image.open(tmp_path / "boxes.png").size == (600, 400)
    entry = {"boxes": [[172, 17, 410, 308]], "labels": ["cup"], "scores": [0.9]}
    write_boxes(tmp_path / "boxes.json", [{"id": "coffee.jpg", **entry}])
    _, out = run("draw_boxes.py", tmp_path / "boxes.json", EXAMPLES, "coffee.jpg", tmp_path / "one.png")
    assert "Drew 1 boxes" in out
    assert Image.open(tmp_path / "one.png").convert("RGB") == draw_boxes(EXAMPLES / "coffee.jpg", entry)


def test_four_bits_are_smaller(run):
    _, out = run("four_bit.py")
    whole, quantized = (float(size) for size in re.findall(r"bits: ([\d.]+) MB", out))
    assert quantized < whole
    assert "with 28 quantized layers" in out and answers(out) == ["left"]


LORA_WITHOUT_THE_PACKAGE = """
import runpy, sys
sys.modules["mgllava"] = None  # makes imports of it fail
sys.path.insert(0, sys.argv.pop(1))
import small_model, pathlib
small_model.ROOT = pathlib.Path.cwd()
runpy.run_path(sys.path[0] + "/lora.py", run_name="__main__")
"""


def test_lora_learns_the_answer_without_the_package(repository, tmp_path):
    command = ("-c", LORA_WITHOUT_THE_PACKAGE, EXAMPLES, "--model", repository)
    done = processes.capture(*command, cwd=tmp_path, HF_MODULES_CACHE=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] > 5 and losses[-1] < 0.5
    answers = dict(re.findall(r"(Before|After|Loaded): +(.*)", done.stdout))
    assert answers["After"] == answers["Loaded"] == "Below the cyan square." != answers["Before"]
    assert (tmp_path / "demo-output" / "lora" / "adapter_model.safetensors").is_file()


def test_conversion_prints_a_report(run, tmp_path):
    _, out = run("convert.py", tmp_path / "converted")
    assert "the checkpoint being of kind 'sft'" in out and "tensors of vision_tower, text tower of CLIP" in out
    assert (tmp_path / "converted" / "model.safetensors").is_file()


def test_ray_example_finds_what_the_job_finds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = runpy.run_path(str(EXAMPLES / "detect_with_ray.py"))
    model, folder = names["DEFAULT"], tmp_path / "images"
    folder.mkdir()
    for picture in ("coffee.jpg", "shapes.jpg"):
        (folder / picture).write_bytes((EXAMPLES / picture).read_bytes())
    (folder / "damaged.jpg").write_bytes(b"no picture")
    columns = names["FindBoxes"](str(folder), str(model))({"id": [0, 1, 2]})
    assert columns["number"] == [0, 2]
    detect_images(folder, tmp_path / "boxes.json", open_detector(str(model)))
    expected = read_boxes(tmp_path / "boxes.json")
    for record in map(json.loads, columns["record"]):
        assert {name: record[name] for name in ("id", "boxes", "labels")} == {
            name: expected[record["id"]][name] for name in ("id", "boxes", "labels")
        }


@pytest.mark.slow
def test_ray_example_writes_a_box_file(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, EXAMPLES / "detect_with_ray.py", EXAMPLES, tmp_path / "boxes.parquet"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=EXAMPLES, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(read_boxes(tmp_path / "boxes.parquet")) == ["coffee.jpg", "shapes.jpg"]
