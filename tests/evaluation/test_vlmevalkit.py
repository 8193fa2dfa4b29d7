"""The wrapper of VLMEvalKit, with a stand-in for the parts of the kit that it uses."""

import json
import sys
import time

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from mgllava.box_files import write_boxes
from mgllava.evaluation import Answerer, EvaluationError
from mgllava.integrations import vlmevalkit
from mgllava.integrations.vlmevalkit import MGLlavaVLM, register

# What the kit does with a model in `vlmeval/vlm/base.py`, `vlmeval/inference.py` and `run.py`, at commit e8e78f05.
BASE = """
class BaseModel:
    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def generate(self, message, dataset=None):
        assert all(part["type"] in ("text", "image") for part in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import json
import pathlib
import sys
from vlmeval.config import supported_VLM

if __name__ != "__main__":
    sys.exit("run.py does nothing if it is imported")


class Dataset:
    def dump_image(self, line):
        return [line["image_path"]]

    def build_prompt(self, line):
        return [dict(type="image", value=path) for path in self.dump_image(line)] + [dict(type="text", value="Q?")]


name, dataset = sys.argv[sys.argv.index("--model") + 1], Dataset()
folder = pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1], name, "T20260818-032032")
folder.mkdir(parents=True, exist_ok=True)
status, line = {"status": "done"}, {"index": 7, "image_path": sys.argv[-1]}
try:
    model = supported_VLM[name]()
    model.set_dump_image(dataset.dump_image)
    struct = (model if model.use_custom_prompt("Custom") else dataset).build_prompt(
        line, **({"dataset": "Custom"} if model.use_custom_prompt("Custom") else {})
    )
    print("answer:", model.generate(message=struct, dataset="Custom"), type(model).__mro__[2].__name__, model.view)
except Exception as error:
    status["error_message"] = str(error)
(folder / "status.json").write_text(json.dumps({"datasets": {"Custom": status}}))
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
    assert isinstance(wrapper, BaseModel) and wrapper.dump_image_func is None
    image = Image.open(wide)
    shown = image if view == "full" else image.crop((10, 0, 50, 40))
    assert wrapper.generate(message(wide)) == Answerer(model, processor, 4).answer([shown], ["Q?"])[0]
    assert wrapper.INTERLEAVE, "the kit gives the parts of a message in their order"


def test_the_square_in_the_middle_is_shown(kit, loaded):
    wrapper = MGLlavaVLM("folder", view="center-crop")
    for size, box in (((31, 50), (0, 9, 31, 40)), ((50, 31), (9, 0, 40, 31))):
        image = Image.effect_noise(size, 80).convert("RGB")
        assert wrapper._open(image).tobytes() == image.crop(box).tobytes()


@pytest.mark.parametrize(
    ("config", "options", "detects"),
    [({"tagger": None}, {}, True), ({"tagger": None}, {"use_box_detector": False}, False), (None, {}, False)],
)
def test_the_detector_of_the_model_finds_boxes(config, options, detects, kit, wide, loaded, processor, monkeypatch):
    monkeypatch.setattr(processor, "_box_detector_config", config)
    wrapper, seen = MGLlavaVLM("folder", **options), []
    record = {"boxes": [[1, 1, 30, 30]], "labels": ["a"], "scores": [0.9]}
    wrapper.answerer.detect = lambda images: [record] * len(images)
    wrapper.answerer.answer_conversations = lambda conversations: seen.extend(conversations[0]) or ["yes"]
    assert wrapper.generate_inner(message(wide) * 2) == "yes"
    assert [message["role"] for message in seen] == ["user"]
    assert [part.get("boxes") for part in seen[0]["content"]] == [record if detects else {"boxes": []}, None] * 2
    assert not wrapper.use_custom_prompt(None)


def test_models_without_boxes_are_shown_none(kit, wide, stand_in, monkeypatch):
    monkeypatch.setattr(vlmevalkit, "load", lambda path, **options: stand_in)
    wrapper, seen = MGLlavaVLM("folder"), []
    wrapper.answerer.answer_conversations = lambda conversations: seen.extend(conversations[0][0]["content"]) or [""]
    wrapper.generate_inner(message(wide))
    assert not wrapper.detects and "boxes" not in seen[0]


class Benchmark:
    def dump_image(self, line):
        return [line["image_path"]]

    def build_prompt(self, line):
        return message(*self.dump_image(line))


def test_boxes_come_from_the_file_of_the_row(kit, wide, loaded, model, processor, tmp_path):
    """Also where the image file has another number in its name."""
    own = {"id": 3, "boxes": [[1, 1, 30, 30]], "labels": ["a"], "scores": [0.9]}
    other = {"id": 7, "boxes": [[20, 5, 60, 40], [0, 0, 9, 9]], "labels": ["a", "b"], "scores": [0.9, 0.8]}
    file = write_boxes(tmp_path / "b.json", [own, other])
    wrapper = MGLlavaVLM("folder", box_file=str(file), max_new_tokens=4)
    wrapper.set_dump_image(Benchmark().dump_image)
    assert wrapper.use_custom_prompt("Custom") and wide.stem == "7"
    seen = []
    wrapper.answerer.answer_conversations = lambda conversations: seen.append(conversations[0][0]["content"]) or [""]
    wrapper.generate_inner(wrapper.build_prompt({"index": 3, "image_path": str(wide)}, dataset="Custom"))
    assert seen[0][0]["boxes"]["boxes"] == own["boxes"]
    (shown, _) = wrapper.build_prompt({"index": np.int64(3), "image_path": str(wide)})
    assert type(shown["index"]) is int and wrapper.dump_image_func.__self__ is wrapper.dataset
    with pytest.raises(EvaluationError, match="no boxes for id 8"):
        wrapper.generate_inner(wrapper.build_prompt({"index": 8, "image_path": str(wide)}))
    with pytest.raises(EvaluationError, match="does not let models build the prompts"):
        wrapper.generate_inner(message(wide))
    with pytest.raises(EvaluationError, match="2 images, but a box file has one record"):
        wrapper.generate_inner([{**part, "index": 3} for part in message(wide)] * 2)


def test_without_a_box_file_the_kit_builds_prompts(kit, loaded):
    assert not MGLlavaVLM("folder").use_custom_prompt("Custom")


def test_names_of_the_kit_are_not_replaced(kit):
    with pytest.raises(EvaluationError, match="has a model taken already"):
        register("taken", "folder")


def test_other_parts_and_views_are_refused(kit, loaded):
    with pytest.raises(EvaluationError, match="'video'"):
        MGLlavaVLM("folder").generate_inner([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(EvaluationError, match="`view` must be one of full, center-crop"):
        MGLlavaVLM("folder", view="tiles")


@pytest.fixture
def command(kit, tmp_path):
    app = typer.Typer()
    app.command()(vlmevalkit.main)

    def run(*options, image):
        words = [*options, "--max-new-tokens", "2", "--", "--work-dir", str(tmp_path / "out"), str(image)]
        return CliRunner().invoke(app, ["org/small", *words])

    return run


def test_command_runs_the_kit(command, kit, wide, loaded):
    result = command("--kit", str(kit), "--view", "center-crop", "--dtype", "float32", "--device", "cpu", image=wide)
    assert result.exit_code == 0, result.output
    assert "answer:" in result.output and result.output.split()[-2:] == ["BaseModel", "center-crop"]
    path, options = loaded[0]
    assert path == "org/small" and (options["dtype"], options["device"], options["bits"]) == ("float32", "cpu", None)
    assert sys.path[0] == str(kit)
    result = command("--kit", "absent", image=wide)
    assert result.exit_code == 2 and "--kit must be the folder" in result.output
    result = command("--kit", str(kit), "--view", "tiles", image=wide)
    assert result.exit_code == 2 and "--view must be one of full, center-crop, got 'tiles'" in result.output


def test_options_of_the_command_reach_the_model(command, kit, wide, loaded, tmp_path):
    options = ["--revision", "v1", "--bits", "4", "--trust-remote-code", "--no-box-detector", "--name", "mine"]
    result = command("--kit", str(kit), *options, image=wide)
    assert result.exit_code == 0, result.output
    ((_, given),) = loaded
    expected = {"revision": "v1", "bits": 4, "dtype": "auto", "device": "auto", "trust_remote_code": True}
    assert given == {**expected, "use_box_detector": False, "box_file": None}
    assert (tmp_path / "out" / "mine").is_dir() and result.output.split()[-1] == "full"


def test_the_status_is_read_where_the_kit_writes_it(kit, wide, loaded, tmp_path, monkeypatch):
    """In `outputs`, or where the environment says."""
    run = (kit / "run.py").read_text().replace('sys.argv[sys.argv.index("--work-dir") + 1]', "FOLDER")
    app = typer.Typer()
    app.command()(vlmevalkit.main)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VLMEvalKit").symlink_to(kit)
    for folder, root in (("outputs", None), (str(tmp_path / "root"), str(tmp_path / "root"))):
        (kit / "run.py").write_text(run.replace("FOLDER", repr(folder)))
        if root:
            monkeypatch.setenv("MMEVAL_ROOT", root)
        result = CliRunner().invoke(app, ["a/b", "--name", f"n{bool(root)}", "--", str(wide)])
        assert result.exit_code == 0, result.output


def test_command_fails_where_the_kit_skips_a_benchmark(command, kit, wide, loaded, tmp_path):
    """The kit logs errors, goes on with the next benchmark, and exits with 0."""
    file = write_boxes(tmp_path / "b.json", [{"id": 1, "boxes": [], "labels": [], "scores": []}])
    result = command("--kit", str(kit), "--box-file", str(file), image=wide)
    assert result.exit_code == 1
    assert "did not evaluate everything" in result.output and "Custom: `box_file`: " in result.output
    assert "no boxes for id 7" in result.output


def test_a_run_without_a_status_counts_as_failed(tmp_path):
    assert vlmevalkit.failures(tmp_path, "small", 0) == [f"{tmp_path / 'small'} has no status.json of this run."]
    (tmp_path / "small" / "T1").mkdir(parents=True)
    statuses = {"a": {"status": "done", "metrics": {"acc": 1}}, "b": {"skip_reason": "invalid_dataset"}}
    (tmp_path / "small" / "T1" / "status.json").write_text(json.dumps({"datasets": statuses}))
    assert vlmevalkit.failures(tmp_path, "small", 0) == ["b: invalid_dataset"]
    assert "no status.json of this run" in vlmevalkit.failures(tmp_path, "small", time.time() + 60)[0]


def test_the_module_is_a_program(help_of):
    assert "Evaluate a model with VLMEvalKit" in help_of("mgllava.integrations.vlmevalkit")
