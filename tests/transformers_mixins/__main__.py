"""Run transformers' own test mixins against our classes: `python -m tests.transformers_mixins [options of pytest]`.

These tests are not part of the suite: they need a connection to GitHub, and change with every release of transformers.
"""

import sys
from pathlib import Path

import pytest

from tests.transformers_mixins.source import fetch

if __name__ == "__main__":
    print(f"Test mixins of {fetch()}", flush=True)
    folder = Path(__file__).parent
    # The names of the files do not start with test_, so that the suite does not collect them.
    files = sorted(str(path) for path in folder.glob("mixins_of_*.py"))
    sys.exit(pytest.main(["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-rs", *files, *sys.argv[1:]]))
