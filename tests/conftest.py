"""Fixtures that several folders use: the golden checkpoints, converted once.

The packages are imported in the fixtures, because the process that hands tests to others imports this file too.
"""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests import processes


def pytest_configure(config):
    processes.SERVER.set_forkserver_preload(processes.IMPORTED)
    # With more threads than cores, threads wait for each other. Test processes inherit the number from this one.
    if number := config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))


def pytest_collection_finish():
    """Spare the garbage collector the objects of imported modules: every training collects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_warnings_were_given():
    """Let warnings that are given only once come again in every test."""
    from transformers.utils import logging

    logging.warning_once.cache_clear()


@pytest.fixture(scope="session")
def convert(tmp_path_factory):
    """Convert a checkpoint of the golden set (a path, or its name under `xtuner/`) and return the model folder."""
    from mgllava.conversion import convert_checkpoint
    from tests.golden_cases import GOLDEN

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
    """Convert the stage-2 checkpoint, and return the model folder."""
    return convert()


@pytest.fixture(scope="session")
def model(repository):
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(repository, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def processor(repository):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(repository, backend="pil")


@pytest.fixture
def stand_in(processor, monkeypatch):
    """Register the tiny family without boxes, and return its model and processor."""
    from mgllava.families import FAMILIES
    from tests.stand_in_family import FAMILY, StandInConfig, StandInImageProcessor, StandInProcessor, make_model

    monkeypatch.setitem(FAMILIES, StandInConfig.model_type, FAMILY)
    other = StandInProcessor(StandInImageProcessor(), processor.tokenizer, chat_template=processor.chat_template)
    return make_model(processor.tokenizer, other.image_token_id), other


@pytest.fixture
def stand_in_path(stand_in, monkeypatch):
    """Make the Auto classes load the tiny family by a name."""
    import transformers

    model, processor = stand_in
    loaded = {"AutoConfig": model.config, "AutoProcessor": processor, "AutoModelForImageTextToText": model}
    for name, value in loaded.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, value=value, **__: value)
    return "stand-in"
