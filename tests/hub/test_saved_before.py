"""Model folders of earlier versions of the package load, with the package and by remote code."""

import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file

from tests.hub import session
from tests.hub.conftest import PYTHONS

SAVED = Path(__file__).parent / "saved"
SMALL_MODEL = Path(__file__).parents[2] / "small_world/model"
PICTURE = Path(__file__).parents[2] / "examples/shapes.jpg"
DAYS = ("2026-11-27", "2026-11-28")
# Job and key of computed tensors by the name of the expected ones; all others are from the job `exported`.
COMPUTED = {
    "detection.boxes": ("detection", "boxes"),
    "detection.scores": ("detection", "scores"),
    "detection.inputs": ("detection", "inputs"),
    "small.boxes": ("small", "boxes"),
    "small.answer": ("small", "answer"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders that were saved on each day, with their weights and the results of that day."""
    folders = {}
    for day in DAYS:
        folder = folders[day] = tmp_path_factory.mktemp(day)
        with ZipFile(SAVED / f"{day}.zip") as archive:
            archive.extractall(folder)
        for name in ("tagger", "detector"):
            to = folder / "exported/box_detector" / name / "model.safetensors"
            shutil.copyfile(SAVED / f"{name}.safetensors", to)
        for weights in SMALL_MODEL.rglob("model.safetensors"):
            shutil.copyfile(weights, folder / "small_model" / weights.relative_to(SMALL_MODEL))
    return folders


def jobs(folder):
    """Jobs of `session.py` for the folders of a day, by name."""
    return {
        "exported": ("mgllava", {"name": folder / "exported"}),
        "detection": ("detection", {"name": folder / "exported"}),
        "small": ("question", {"name": folder / "small_model", "image": PICTURE}),
    }


def assert_results_of_the_day(results, folder):
    """Compare boxes, scores, logits and answers with those of the day; only the dtype of boxes has changed since."""
    for name, wanted in load_file(folder / "expected.safetensors").items():
        job, key = COMPUTED.get(name, ("exported", name))
        if job in results:
            actual = results[job][0][key]
            torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("day", DAYS)
def test_package_loads_older_model_folders(saved, day):
    results = {
        name: getattr(session, action)(**{key: str(value) for key, value in arguments.items()})
        for name, (action, arguments) in jobs(saved[day]).items()
    }
    assert results["exported"][1]["classes"][0] == "mgllava:MGLlavaForConditionalGeneration"
    assert_results_of_the_day(results, saved[day])


@pytest.mark.parametrize("python", PYTHONS)
def test_code_in_older_model_folders_still_runs(python, saved, without_package):
    asked = {(day, name): job for day, folder in saved.items() for name, job in jobs(folder).items()}
    del asked["2026-11-27", "small"]  # it has no code
    results, _ = without_package(python, {f"{day} {name}": job for (day, name), job in asked.items()})
    for day, folder in saved.items():
        of_day = {name: results[f"{day} {name}"] for other, name in asked if other == day}
        assert of_day["exported"][1]["classes"][0].startswith("transformers_modules:")
        assert_results_of_the_day(of_day, folder)
