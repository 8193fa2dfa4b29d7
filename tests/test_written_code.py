"""The code in README, docs/ and docstrings runs."""

import contextlib
import copy
import doctest
import inspect
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mgllava.box_files import write_boxes
from mgllava.cli import app
from mgllava.conversion import convert_checkpoint
from mgllava.training import load_recipe
from tests.processing.videos import make_frames, write
from tests.test_docstrings import OBJECTS

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SMALL_MODEL = ROOT / "small_world" / "model"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Model folders and repositories that the pages name, and the folders that replace them here.
FOLDERS = {
    "mg-llava-vicuna7b": SMALL_MODEL,
    "path/to/mg-llava-vicuna7b": SMALL_MODEL,
    "stage-1-vicuna-7b": SMALL_MODEL,
    "org/name": SMALL_MODEL,
    "ram-plus": SMALL_MODEL / "box_detector" / "tagger",
    "ram_plus": SMALL_MODEL / "box_detector" / "tagger",
    "google/owlv2-large-patch14-ensemble": SMALL_MODEL / "box_detector" / "detector",
    "lmsys/vicuna-7b-v1.5": GOLDEN / "llm",
    "openai/clip-vit-large-patch14-336": GOLDEN / "clip",
    "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": GOLDEN / "convnext",
}
PICTURES = ("table.jpg", "photo.jpg", "cup.jpg", "street.jpg", "images/coco/000000039769.jpg")
# Replacements in the code of a page, to run it faster.
REPLACED = {
    "docs/detect.md": {"task in range(64)": "task in [0]", "num_shards=64": "num_shards=2"},
    "docs/running.md": {"max_new_tokens=256": "max_new_tokens=4"},
    # The small model was saved before models took videos.
    "docs/video.md": {"boxes = [[[10": "mgllava.add_videos(model, processor)\nboxes = [[[10"},
    "docs/training.md": {"SFTConfig(": "SFTConfig(use_cpu=True, max_steps=1, report_to=[], "},
}
# Compiling takes a minute. The other pages have tests of their own.
SLOW = ("torch.compile",)
ELSEWHERE = {
    "docs/finetune.md": "tests/test_finetune_page.py",
    "docs/serving.md": "tests/serving/test_clients.py",
    "docs/vllm.md": "tests/vllm_check/test_engine.py",
}


FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def code_blocks(text, *languages):
    """Return the fenced blocks in these languages."""
    fences = FENCE.findall(text)
    return [textwrap.dedent(block) for language, block in fences if language in languages]


class StrangeConfig(LlamaConfig):
    """The third-party language model of docs/language_models.md."""

    model_type = "strange_llm"


class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Make a folder with all files that the examples name."""
    folder = tmp_path_factory.mktemp("desk")
    for name, target in FOLDERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    for name in PICTURES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "examples" / "coffee.jpg", folder / name)
    shutil.copy(GOLDEN / "xtuner" / "iter_10.pth", folder / "iter_10805.pth")
    convert_checkpoint(
        ROOT / "tests" / "golden_slime" / "checkpoint", output=folder / "slime-vicuna-7b", dtype="float32"
    )
    (folder / "path" / "to" / "slime-vicuna-7b").symlink_to(folder / "slime-vicuna-7b")
    (folder / "clip.mp4").write_bytes(write(make_frames(), "mpeg4", "yuv420p"))
    rows = [
        {"question_id": number, "image": "cup.jpg", "text": "Is there a cup?", "label": label}
        for number, label in enumerate(("yes", "no"))
    ]
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "val2014").mkdir()
    (folder / "val2014" / "cup.jpg").symlink_to(folder / "cup.jpg")
    return folder


@pytest.fixture(scope="module")
def names(desk):
    """Return the variables that the examples use without defining them."""
    with contextlib.chdir(desk):
        processor = AutoProcessor.from_pretrained("mg-llava-vicuna7b")
        picture = Image.open("table.jpg")
        adapters = LoraConfig(target_modules=r".*language_model.*q_proj")
        get_peft_model(AutoModel.from_pretrained("stage-1-vicuna-7b"), adapters).save_pretrained("stage-2-vicuna-7b")
        rows = [{"id": str(index), "image": picture.resize((64, 64))} for index in range(3)]
        datasets.Dataset.from_list(rows).save_to_disk("owner-name")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cup"}]}
    entry = {"boxes": [[172, 17, 410, 308]], "labels": ["cup"], "scores": [0.9]}
    sample = {"messages": [message, answer], "images": [picture], "boxes": [entry]}
    return {
        "processor": processor,
        "image": picture,
        "prompt": "USER: <image>\nWhat is it? ASSISTANT:",
        "boxes": [[[10, 20, 110, 70]]],
        "folder": "mg-llava-vicuna7b",
        "dataset": datasets.Dataset.from_list([sample, sample]),
        "picture": picture,
        "StrangeConfig": StrangeConfig,
        "StrangeForCausalLM": StrangeForCausalLM,
        "task": 0,
    }


@pytest.fixture(scope="module")
def small_model():
    return AutoModel.from_pretrained(SMALL_MODEL, dtype="float32")


@pytest.fixture
def scope(names, desk, small_model, monkeypatch):
    """Return a new namespace in the folder, with a new model, since an example may change it."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.load_from_disk("owner-name"))
    return {**names, "model": copy.deepcopy(small_model)}


@pytest.fixture
def slime_scope(scope):
    """Return a new namespace with a SliME model."""
    image = Image.open("street.jpg").resize((600, 800))
    model = AutoModel.from_pretrained("slime-vicuna-7b")
    return {**scope, "model": model, "processor": AutoProcessor.from_pretrained("slime-vicuna-7b"), "image": image}


def python_pages():
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        blocks = code_blocks(page.read_text(), "python")
        if blocks and name not in ELSEWHERE:
            is_slow = any(word in block for block in blocks for word in SLOW)
            yield pytest.param(name, blocks, id=name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("name, blocks", python_pages())
def test_python_of_a_page_runs_from_top_to_bottom(name, blocks, request):
    scope = request.getfixturevalue("slime_scope" if "slime" in name else "scope")
    # Pages read the output of commands that they print before.
    record = {"id": "coco/000000039769.jpg", "boxes": [[172, 17, 410, 308]], "labels": ["cup"], "scores": [0.9]}
    from mgllava.box_files import detection_settings

    if (detector := getattr(scope["processor"], "box_detector_config", None)) is not None:
        write_boxes("boxes.parquet", [record], detection_settings(detector, repository="mg-llava-vicuna7b"))
    for block in blocks:
        for old, new in REPLACED.get(name, {}).items():
            block = block.replace(old, new)
        exec(compile(block, name, "exec"), scope)


def docstring_examples():
    for name, (module, value) in OBJECTS.items():
        for block in code_blocks(inspect.getdoc(value) or "", "python"):
            yield pytest.param(module, block, id=name)


@pytest.mark.parametrize("module, block", docstring_examples())
def test_example_of_a_docstring_runs(module, block, request):
    names = request.getfixturevalue("slime_scope" if "slime" in module.__name__ else "scope")
    scope = {**vars(module), **names}
    if not block.startswith(">>>"):
        exec(compile(block, module.__name__, "exec"), scope)
        return
    # Models of the published sizes have no values here.
    device = torch.device("meta" if "(configuration)" in block else "cpu")
    test = doctest.DocTestParser().get_doctest(block + "\n", scope, module.__name__, None, 0)
    written = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with device:
        runner.run(test, out=written.append, clear_globs=False)
    assert not runner.failures, "".join(written)


def test_every_example_of_a_docstring_is_in_a_python_block():
    for name, (_, value) in OBJECTS.items():
        text = inspect.getdoc(value) or ""
        assert ("```python" in text) == ("Example:" in text and "```" in text), name
        assert ">>>" not in re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL), name


COMMANDS = typer.main.get_command(app)
COMMAND = re.compile(r"\bmgllava (?=[a-z])(.*)")


def printed_commands():
    """Yield each `mgllava` command of a page, split like a shell does it, with the variables of the page."""
    for page in PAGES:
        text = page.read_text()
        lines = [
            line for block in code_blocks(text, "", "sh", "bash") for line in block.replace("\\\n", " ").splitlines()
        ]
        for name, value in re.findall(r'^([A-Z]+)="?(.*?)"?$', "\n".join(lines), re.MULTILINE):
            lines = [re.sub(rf"\${name}\b", value, line) for line in lines]
        for line in [*lines, *(" ".join(inline.split()) for inline in re.findall(r"`([^`]*)`", FENCE.sub("", text)))]:
            found = COMMAND.search(line)
            words = shlex.split(found[1], comments=True) if found else []
            if words and words[0] in COMMANDS.commands and "pip install" not in line:
                yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", printed_commands())
def test_printed_command_has_options_that_exist(words):
    command = COMMANDS.commands[words[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= {*known, "--help"}
    if words[0] == "train":
        load_recipe(*[word.replace("…", "x") for word in words[1:] if not word.startswith("--") and word != "…"])


# Commands to run: they need no Hub, no other machine and no user. Options that need the Hub are left out.
RUN = {"convert.md": ("convert --checkpoint iter",), "detect.md": ("detect images/",), "hub.md": ("export mg-",)}
LEFT_OUT = ("--push", "org/name")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words.values[0], id=words.id)
        for words in printed_commands()
        if " ".join(words.values[0]).startswith(RUN.get(words.id.partition(":")[0], ("-",)))
    ],
)
def test_printed_command_runs(words, desk, monkeypatch, tmp_path):
    for entry in desk.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    output = tmp_path / words[words.index("--output") + 1]
    output.unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    # tests/hub does this, in another process.
    monkeypatch.setattr("mgllava.hub.export.verify_loading", lambda folder: None)
    result = CliRunner().invoke(app, [word for word in words if word not in LEFT_OUT])
    assert result.exit_code == 0, result.output
    assert output.exists()
