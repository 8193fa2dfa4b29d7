"""The command `mgllava serve` before the server starts, and the example client."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgllava.cli import app
from mgllava.serving import server

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--allowed-image-hosts", "http://a"], "--allowed-image-hosts"),
        (["--max-images", "0"], "--max-images"),
        (["--log-level", "loud"], "--log-level"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs"),
        (["--chat-template-kwargs", '{"tokenize": false}'], "tokenize"),
        (["--allowed-hosts", "http://a"], "--allowed-hosts"),
        (["--api-key", ""], "--api-key"),
        (["--max-pixels", "-1"], "--max-pixels"),
        (["--dtype", "floof"], "floof"),
        (["--image-timeout", "nan"], "--image-timeout"),
        (["--bits", "3"], "--bits must be 4 or 8, got 3"),
    ],
)
def test_bad_option_is_one_message(repository, options, message):
    result = CliRunner().invoke(app, ["serve", str(repository), *options])
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


def test_detector_is_loaded_before_the_first_request(served_repository, monkeypatch):
    processors, load = [], server.load

    def load_and_note(*arguments, **options):
        model, processor = load(*arguments, **options)
        processors.append(processor)
        return model, processor

    monkeypatch.setattr(server, "load", load_and_note)
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: None)
    result = CliRunner().invoke(app, ["serve", str(served_repository)])
    assert result.exit_code == 0, result.output
    assert processors[0]._box_detector is not None


def test_example_client(server):
    command = [sys.executable, ROOT / "examples" / "serve_client.py", f"{server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens in the prompt, 100 in the answer" in done.stdout
