import json
from pathlib import Path

import pytest
import torch

from mgllava.conversion import convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def sources():
    """All that a conversion needs besides the checkpoint and the output."""
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
    """Give the state dict of a golden checkpoint, by the name of its file."""

    def load(name):
        return torch.load(GOLDEN / "xtuner" / name, weights_only=True)["state_dict"]

    return load


@pytest.fixture
def edit_folder(tmp_path):
    """Copy a folder and change its config."""
    import shutil

    def edit(folder, file="config.json", **changes):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        config = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**config, **changes}))
        return copy

    return edit
