"""The wrapper of VLMEvalKit, with a stand-in for the parts of the kit that it uses."""

import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from mgllava.box_files import write_boxes
from mgllava.evaluation import Answerer, EvaluationError
from mgllava.integrations import vlmevalkit
from mgllava.integrations.vlmevalkit import MGLlavaVLM, register

BASE = """
class BaseModel:
    def generate(self, message, dataset=None):
        assert all(part["type"] in ("text", "image") for part in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import sys
from vlmeval.config import supported_VLM

model = supported_VLM[sys.argv[sys.argv.index("--model") + 1]]()
message = [dict(type="image", value=sys.argv[-1]), dict(type="text", value="Q?")]
print("answer:", model.generate(message, dataset="Custom"), type(model).__mro__[2].__name__, model.view)
"""


@pytest.fixture
def kit(tmp_path, monkeypatch):
    folder = tmp_path / "kit"
    for path, text in {
        "vlmeval/__init__.py": "",
        "vlmeval/config.py": "supported_VLM = {'taken': None}\n",
        "vlmeval/vlm/__init__.py": "",
        "vlmeval/vlm/base.py": BASE,
        "run.py": RUN,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


@pytest.fixture
def wide(tmp_path):
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    image.save(tmp_path / "7.png")
    return tmp_path / "7.png"


@pytest.fixture
def loaded(model, processor, monkeypatch):
    """Answers take milliseconds with the loaded model."""
    asked = []
    monkeypatch.setattr(
        vlmevalkit, "load", lambda path, **options: asked.append((path, options)) or (model, processor)
    )
    return asked


def message(path):
    return [{"type": "image", "value": str(path)}, {"type": "text", "value": "Q?"}]


@pytest.mark.parametrize("view", ["full", "center-crop"])
def test_a_model_answers_through_the_table_of_the_kit(view, kit, wide, loaded, model, processor):
    names = register("small", "folder", max_new_tokens=4)
    assert names == ["small", "small-center-crop"]
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    wrapper = supported_VLM[names[view != "full"]]()
    assert isinstance(wrapper, BaseModel)
    image = Image.open(wide)
    shown = image if view == "full" else image.crop((10, 0, 50, 40))
    assert wrapper.generate(message(wide)) == Answerer(model, processor, 4).answer([shown], ["Q?"])[0]


def test_boxes_come_from_the_file_of_the_row(kit, wide, loaded, model, processor, tmp_path):
    record = {"id": 7, "boxes": [[1, 1, 30, 30]], "labels": ["a"], "scores": [0.9]}
    file = write_boxes(tmp_path / "b.json", [record])
    wrapper = MGLlavaVLM("folder", box_file=str(file), max_new_tokens=4)
    expected = Answerer(model, processor, 4).answer([Image.open(wide)], ["Q?"], [record])
    assert [wrapper.generate_inner(message(wide))] == expected
    wide.rename(tmp_path / "8.png")
    with pytest.raises(EvaluationError, match="no boxes for id '8'"):
        wrapper.generate_inner(message(tmp_path / "8.png"))


def test_names_of_the_kit_are_not_replaced(kit):
    with pytest.raises(EvaluationError, match="has a model taken already"):
        register("taken", "folder")


def test_other_parts_and_views_are_refused(kit, loaded):
    with pytest.raises(EvaluationError, match="'video'"):
        MGLlavaVLM("folder").generate_inner([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(EvaluationError, match="`view` must be one of full, center-crop"):
        MGLlavaVLM("folder", view="tiles")


def test_command_runs_the_kit(kit, wide, loaded):
    import typer

    app = typer.Typer()
    app.command()(vlmevalkit.main)
    result = CliRunner().invoke(
        app, ["org/small", "--kit", str(kit), "--view", "center-crop", "--max-new-tokens", "2", "--", str(wide)]
    )
    assert result.exit_code == 0, result.output
    assert "answer:" in result.output and result.output.split()[-2:] == ["BaseModel", "center-crop"]
    assert loaded[0][0] == "org/small"
    result = CliRunner().invoke(app, ["org/small", "--kit", "absent"])
    assert result.exit_code == 2 and "--kit must be the folder" in result.output
