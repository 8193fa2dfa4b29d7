"""The extras of setup.cfg, and how errors and pages name them."""

import configparser
import re
import sys
from pathlib import Path

import pytest

from mgllava.box_files import list_images
from mgllava.extras import import_extra, install_hint
from mgllava.training import ConversationDataset, load_recipe, lora_config, stream_samples
from mgllava.training.loss_plot import plot_losses

ROOT = Path(__file__).parents[1]


def test_error_for_a_missing_package_names_its_user_and_its_extra():
    with pytest.raises(
        ImportError, match=r"Plotting needs no_such \(.*no_such.*\).*pip install -e '\.\[train\]'"
    ) as caught:
        import_extra("no_such.figure", "train", "Plotting")
    assert isinstance(caught.value.__cause__, ImportError)
    assert import_extra("pathlib", "train", "Plotting").Path is Path


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("datasets", "train", lambda: ConversationDataset([], None)),
        ("datasets", "train", lambda: stream_samples([])),
        ("datasets", "datasets", lambda: list_images(object())),
        ("matplotlib.figure", "train", lambda: plot_losses([{"step": 1, "loss": 1.0}], "loss.png")),
        ("peft", "train", lambda: load_recipe("lora.yaml")),
        ("peft", "train", lora_config),
    ],
)
def test_what_needs_a_missing_package_names_the_extra_that_has_it(monkeypatch, package, extra, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package.partition('.')[0]} .*pip install -e '\.\[{extra}\]'"):
        call()


def test_every_extra_that_code_and_pages_name_exists():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    code = "".join(path.read_text() for path in (ROOT / "src" / "mgllava").rglob("*.py"))
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    in_calls = re.findall(r'import_extra\([^)]*?, "(\w+)",|install_hint\([\'"](\w+)[\'"]\)', code)
    named = {first or second for first, second in in_calls} | set(re.findall(r"pip install[^`\n]*\[(\w+)\]", pages))
    assert {"serve", "train", "datasets", "zero"} <= named <= extras
    # The package is not on PyPI.
    assert not re.findall(r"pip install \S*mgllava", code + pages)
    assert "'.[serve]'" in install_hint("serve")
