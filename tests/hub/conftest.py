import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mgllava import BoxDetector, MGLlavaProcessor
from mgllava.conversion import convert_ram_plus
from mgllava.hub import export_repository
from tests import processes
from tests.hub.repositories import FAMILIES, save_family, save_slime
from tests.processing.detectors import OWLV2
from tests.ram_plus.golden import SOURCES

# A process that the tests fork; this interpreter, started again; in `make hub-check`, one with another transformers.
FORKED = "forked"
PYTHONS = [FORKED, pytest.param(sys.executable, marks=pytest.mark.slow, id="started")]
if other := os.environ.get("MGLLAVA_OTHER_PYTHON"):
    # Links are not resolved: an environment's Python is a link.
    PYTHONS[1:] = [pytest.param(os.path.abspath(other), id="other")]


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Exported model folders by the name of their chat template."""
    folder = tmp_path_factory.mktemp("families")
    return {
        family: export_repository(save_family(folder / f"{family}-saved", family, seed), folder / family, verify=False)
        for seed, family in enumerate(FAMILIES)
    }


@pytest.fixture(scope="session")
def slime_repository(tmp_path_factory):
    """An exported repository of SliME."""
    folder = tmp_path_factory.mktemp("slime")
    return export_repository(save_slime(folder / "saved"), folder / "slime", verify=False)


@pytest.fixture(scope="session")
def tagger_repository(tmp_path_factory):
    """A converted RAM++ model."""
    return convert_ram_plus(**SOURCES, output=tmp_path_factory.mktemp("tagger") / "ram-plus")


@pytest.fixture(scope="session")
def with_detector(families, tagger_repository, tmp_path_factory):
    """A model folder with tagger and object detector inside."""
    folder = tmp_path_factory.mktemp("with_detector")
    return export_repository(
        families["vicuna"],
        folder / "complete",
        tagger=str(tagger_repository),
        detector=str(OWLV2),
        with_detector=True,
        verify=False,
    )


@pytest.fixture(scope="session")
def processor_with_detector(families, tagger_repository):
    processor = MGLlavaProcessor.from_pretrained(families["vicuna"])
    processor.box_detector = BoxDetector(tagger_repository, OWLV2)
    return processor


@pytest.fixture
def without_package(tmp_path):
    """Run jobs of `session.py` in a process that cannot import the package; return tensors and facts of each job."""

    def run(python, jobs, home=None):
        home, results = home or tmp_path / "home", tmp_path / "results"
        results.mkdir()
        (tmp_path / "jobs.json").write_text(json.dumps(jobs, default=str))
        script = Path(__file__).with_name("session.py")
        command = [script, tmp_path / "jobs.json", results]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_MODULES_CACHE": str(home / "modules"),
        }
        if python == FORKED:
            done = processes.capture(*command, env=environment)
        else:
            command[:0] = [python, "-W", "error::DeprecationWarning:transformers_modules"]
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return {
            name: (load_file(results / f"{name}.safetensors"), json.loads((results / f"{name}.json").read_text()))
            for name in jobs
        }, done.stderr

    return run
