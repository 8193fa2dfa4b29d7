import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mgllava.cli import app
from mgllava.conversion import convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


def run(*arguments):
    """Run a command of `mgllava`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def options_of(arguments):
    """Turn arguments of a function into options of its command."""
    return [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def sources():
    """The arguments of a conversion, except for checkpoint and output."""
    return {
        "llm": GOLDEN / "llm",
        "vision_tower": GOLDEN / "clip",
        "high_res_tower": GOLDEN / "convnext",
        "prompt_template": "vicuna",
    }


@pytest.fixture(scope="session")
def converted(tmp_path_factory, sources):
    """The fine-tuned golden checkpoint, converted once."""
    output = tmp_path_factory.mktemp("converted") / "repository"
    return convert_checkpoint(GOLDEN / "xtuner" / "iter_10.pth", **sources, output=output)


@pytest.fixture(scope="session")
def golden_state():
    """Load the state dict of a golden checkpoint by the name of its file."""

    def load(name):
        return torch.load(GOLDEN / "xtuner" / name, weights_only=True)["state_dict"]

    return load


@pytest.fixture
def edit_folder(tmp_path):
    """Copy a folder and change its config."""

    def edit(folder, file="config.json", **changes):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        config = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**config, **changes}))
        return copy

    return edit
