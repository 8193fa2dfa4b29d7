"""The examples run as they are."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


def test_demo_answers_and_draws(tmp_path):
    output = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", output], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "576 fused tokens and 3 object tokens" in done.stdout
    assert "weights of this small checkpoint are random" in " ".join(done.stdout.split())
    assert Image.open(output / "boxes.png").size == (600, 400)


def test_notebook_of_boxes_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "examples" / "boxes.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec(compile(cell, "boxes.ipynb", "exec"), names)
    assert len(names["found"]["boxes"]) == len(names["found"]["labels"])
    picture = names["draw_boxes"](names["image"], names["by_hand"])
    assert picture.size == names["image"].size
