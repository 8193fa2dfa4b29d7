"""What works without the plugin, as docs/vllm.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from .conftest import MODEL, answer, ask, picture
from .test_http import as_request

pytestmark = pytest.mark.slow


def test_images_without_boxes(generate, tmp_path):
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    asked = [
        [ask("What is in the picture?", (picture(1), None))],
        [ask("Compare the pictures.", (picture(1), None), (picture(3, (90, 200)), None))],
        [system, ask("How many shapes are there?", (picture(2), None))],
        [ask("What do you see?")],
        [ask("What is in the picture?", (picture(1), None)), answer("a red circle"), ask("Which color is it?")],
    ]
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps([as_request(conversation) for conversation in asked]))
    script = Path(__file__).parent / "without_plugin.py"
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    subprocess.run([sys.executable, str(script), str(MODEL), str(file)], check=True, env=environment)
    found = json.loads(file.read_text())
    expected = [generate(conversation) for conversation in asked]
    for index, ((prompt, tokens), (wanted, text)) in enumerate(zip(found, expected, strict=True)):
        # Chunks are not encoded apart: an answer in the prompt starts with another id.
        assert (prompt == wanted) == (index != 4), index
        assert index == 4 or [token for token in tokens if token != 2] == text, index
