"""The extras of setup.cfg, and how errors and pages name them."""

import configparser
import re
from pathlib import Path

import pytest

from mgllava.extras import import_extra, install_hint

ROOT = Path(__file__).parents[1]


def test_error_for_a_missing_package_names_its_user_and_its_extra():
    with pytest.raises(
        ImportError, match=r"Plotting needs no_such \(.*no_such.*\).*pip install -e '\.\[train\]'"
    ) as caught:
        import_extra("no_such.figure", "train", "Plotting")
    assert isinstance(caught.value.__cause__, ImportError)
    assert import_extra("pathlib", "train", "Plotting").Path is Path


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
