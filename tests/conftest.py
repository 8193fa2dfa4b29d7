"""Fixtures that several folders use: the golden checkpoints, converted once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mgllava.conversion import convert_checkpoint
from tests.golden_cases import GOLDEN


@pytest.fixture(scope="session")
def convert(tmp_path_factory):
    """Convert a checkpoint of the golden set (a path, or its name under `xtuner/`) and return the repository."""

    def run(checkpoint="iter_10.pth", **kwargs):
        output = tmp_path_factory.mktemp("repository") / "model"
        convert_checkpoint(
            checkpoint=GOLDEN / "xtuner" / checkpoint,
            llm=GOLDEN / "llm",
            vision_tower=GOLDEN / "clip",
            high_res_tower=GOLDEN / "convnext",
            prompt_template="vicuna",
            output=output,
            **kwargs,
        )
        return output

    return run


@pytest.fixture(scope="session")
def repository(convert):
    """The stage-2 checkpoint as a model repository."""
    return convert()


@pytest.fixture(scope="session")
def model(repository):
    return AutoModel.from_pretrained(repository, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def processor(repository):
    return AutoProcessor.from_pretrained(repository, backend="pil")
