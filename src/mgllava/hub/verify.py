"""Check that a model folder loads where this package is not installed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mgllava.model_files.errors import ConversionError

_SCRIPT = Path(__file__).with_name("loading_check.py")
_LINES_SHOWN = 15


def verify_loading(folder: str | Path) -> None:
    """Load all classes that a model folder names, without weights, in a process that cannot import this package.

    Args:
        folder (`str` or `Path`): The model folder.

    Raises:
        ConversionError: If it does not load.
    """
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), str(folder)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-_LINES_SHOWN:]
        raise ConversionError(
            "\n".join([f"{folder} does not load where mgllava is not installed. It was left there.", *lines])
        )


__all__ = ["verify_loading"]
