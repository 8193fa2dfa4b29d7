"""The command `mgllava serve` before the server starts, and the example client."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgllava.cli import app

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


def test_example_client(server):
    command = [sys.executable, ROOT / "examples" / "serve_client.py", f"{server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens in the prompt, 100 in the answer" in done.stdout
