"""The server with a model of another family: no boxes, and several views of an image."""

import asyncio
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgllava.cli import app as commands
from mgllava.serving import server
from tests.serving.requests import as_data_url, call, image, text

WIDE, TALL = Image.new("RGB", (30, 10), "red"), Image.new("RGB", (10, 30), "blue")


@pytest.fixture
def post(stand_in_path, monkeypatch):
    """Start `mgllava serve` up to its HTTP server, and send requests to its application."""
    apps = []
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: apps.append(app))
    result = CliRunner().invoke(commands, ["serve", stand_in_path])
    assert result.exit_code == 0, result.output

    def run(body, path="/v1/chat/completions"):
        return asyncio.run(call(apps[0], path, json.dumps({"max_tokens": 6, "temperature": 0, **body}).encode()))

    return run


def show(picture, **extra):
    return image(as_data_url(picture), **extra)


def ask(*content):
    return [{"role": "user", "content": [*content, text("What?")]}]


def test_answer_is_that_of_the_model_alone(post, stand_in):
    model, processor = stand_in
    status, body = post({"messages": ask(show(WIDE), show(TALL), show(WIDE))})
    assert status == 200, body
    blocks = [{"type": "image", "image": picture} for picture in (WIDE, TALL, WIDE)]
    inputs = processor.apply_chat_template(
        ask(*blocks), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6)
    length = inputs["input_ids"].shape[1]
    expected = processor.decode(output[0, length:], skip_special_tokens=True).lstrip()
    assert body["choices"][0]["message"]["content"] == expected
    assert body["usage"]["prompt_tokens"] == length and model.num_views == [5, 5]


def test_text_alone(post):
    status, body = post({"messages": ask()})
    assert status == 200, body


@pytest.mark.parametrize("boxes", [[], [[1, 2, 3, 4]], {"boxes": []}])
def test_boxes_are_refused(post, boxes):
    status, body = post({"messages": ask(show(WIDE, boxes=boxes))})
    assert (status, body["error"]["param"]) == (400, "messages[0].content[0].boxes")
    assert body["error"]["message"] == "`messages[0].content[0].boxes` must be absent: this model has no boxes."
    status, body = post({"messages": ask(show(WIDE)), "boxes": [boxes]})
    assert (status, body["error"]["param"]) == (400, "boxes[0]") and "has no boxes" in body["error"]["message"]


def test_options_of_boxes_are_refused(stand_in_path):
    result = CliRunner().invoke(commands, ["serve", stand_in_path, "--no-box-detector"])
    assert result.exit_code == 1
    assert "--no-box-detector must be left out: Stand-in has no boxes" in " ".join(result.output.split())
