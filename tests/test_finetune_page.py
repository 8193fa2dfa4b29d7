"""The steps of docs/finetune.md, run with twenty pictures, teach the small model to answer a new question."""

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from mgllava.box_files import read_boxes
from mgllava.cli import app
from small_world.dataset import write_dataset
from small_world.scenes import make_scene

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "finetune.md"
QUESTION = "Shall we keep it?"
PICTURES = 20


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    """Make twenty pictures and a table, as the page says. The right answer is yes if an object has a character."""
    seeds = range(500_000, 500_040)
    write_dataset(tmp_path / "drawn", "test", len(seeds), questions=1, first=seeds[0], processes=1)
    kept = {seed: any(item.character for item in make_scene("test", seed).objects) for seed in seeds}
    chosen = [seed for wanted in (True, False) for seed in [s for s in seeds if kept[s] is wanted][: PICTURES // 2]]
    pictures = tmp_path / "my-pictures"
    pictures.mkdir()
    with (pictures / "questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for name, seed in enumerate(sorted(chosen), 1):
            source = tmp_path / "drawn" / "images" / f"{seed:06d}.jpg"
            (pictures / f"{name:04d}.jpg").write_bytes(source.read_bytes())
            table.writerow([f"{name:04d}.jpg", QUESTION, "yes" if kept[seed] else "no"])
    (tmp_path / "small_world").symlink_to(ROOT / "small_world")
    return tmp_path


def commands(script):
    """Return the arguments of each `mgllava` command of a script, as the shell expands them."""
    noted = "mgllava() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
    done = subprocess.run(["bash", "-ec", noted + script], capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def test_page_works(folder, monkeypatch, capsys):
    """All blocks run in this process, since imports would take longer than the rest in a new one for each."""
    monkeypatch.chdir(folder)
    shell, python = blocks("sh"), blocks("python")
    assert (len(shell), len(python)) == (3, 2)
    settings, detect, train = shell
    make_samples, ask = python
    model = re.search(r"^MODEL=(.*)$", settings, re.MULTILINE)[1]

    def run(script):
        (arguments,) = commands(settings + script)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    exec(make_samples, {})
    assert capsys.readouterr().out.strip() == f"{PICTURES} samples about {PICTURES} pictures"
    run(detect)
    assert len(list((folder / "my-pictures" / "drawn").iterdir())) == PICTURES
    run(train)
    capsys.readouterr()
    exec(ask, {})
    answer = capsys.readouterr().out.splitlines()[-1].strip()

    samples = json.loads((folder / "my-pictures" / "samples.json").read_text())
    boxes = read_boxes(folder / "my-pictures" / "boxes.json")
    before, after = (
        right_answers(name, folder / "my-pictures", samples, boxes) for name in (ROOT / model, folder / "my-model")
    )
    assert after >= 0.9 * PICTURES > before
    assert answer in ("yes", "no")


def right_answers(name, pictures, samples, boxes):
    model, processor = AutoModel.from_pretrained(name, dtype="float32").eval(), AutoProcessor.from_pretrained(name)
    right = 0
    for sample in samples:
        prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
        found = [boxes[sample["id"]]["boxes"]]
        inputs = processor(str(pictures / sample["image"]), prompt, boxes=[found], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
        right += text.strip() == sample["conversations"][1]["value"]
    return right
