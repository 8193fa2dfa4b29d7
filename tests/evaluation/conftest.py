import base64
import io
import json
import runpy
import sys

import pytest
from PIL import Image

from mgllava.evaluation.task import load_task

COLORS = ("red", "green", "blue", "white")


def png(color="red", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def in_base64(color="red", size=(40, 30)):
    return base64.b64encode(png(color, size)).decode()


class Echo:
    """Answers with the value of a function of prompt and boxes; finds one box in the middle of each image."""

    takes_boxes = True

    def __init__(self, reply=lambda prompt, boxes: "A"):
        self.reply = reply
        self.detected = []
        self.options = []
        self.sizes = []

    def detect(self, images):
        self.detected.append(len(images))
        return [
            {"boxes": [[0, 0, image.width // 2, image.height // 2]], "labels": ["x"], "scores": [0.9]}
            for image in images
        ]

    def objects(self, record, image, is_frame=False):
        return record

    def answer(self, images, prompts, boxes=None, **options):
        self.options.append(options)
        self.sizes += [image.size for image in images]
        return [self.reply(prompt, given["boxes"]) for prompt, given in zip(prompts, boxes, strict=True)]


@pytest.fixture
def write_tsv(tmp_path):
    def write(rows, name="data.tsv"):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        path = tmp_path / name
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_lines(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def choices(write_tsv):
    """Four questions about images of different colors, two of which are about the same one."""
    rows = [
        {
            "index": number,
            "question": f"Q{number}?",
            "A": "one",
            "B": "two",
            "answer": "AB"[number % 2],
            "image": image,
        }
        for number, image in enumerate([*map(in_base64, COLORS[:3]), "0"])
    ]
    return write_tsv(rows)


@pytest.fixture
def task(choices):
    return load_task("multiple-choice", choices)


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Run a module as a program, and return its help."""

    def run(module):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run
