"""The steps of docs/finetune.md run, and with twenty pictures they teach the small model to answer a new question."""

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from mgllava.box_files import read_boxes
from mgllava.cli import app
from small_world.dataset import write_dataset
from small_world.scenes import make_scene

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "finetune.md"
QUESTION = "Shall we keep it?"
PICTURES = 20  # so many does the page name


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def write_pictures(folder, number):
    """Make pictures and a table, as the page says. The right answer is yes if an object has a character."""
    seeds = range(500_000, 500_000 + 2 * number)
    write_dataset(folder / "drawn", "test", len(seeds), questions=1, first=seeds[0], processes=1)
    kept = {seed: any(item.character for item in make_scene("test", seed).objects) for seed in seeds}
    chosen = [seed for wanted in (True, False) for seed in [s for s in seeds if kept[s] is wanted][: number // 2]]
    pictures = folder / "my-pictures"
    pictures.mkdir()
    with (pictures / "questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for name, seed in enumerate(sorted(chosen), 1):
            source = folder / "drawn" / "images" / f"{seed:06d}.jpg"
            (pictures / f"{name:04d}.jpg").write_bytes(source.read_bytes())
            table.writerow([f"{name:04d}.jpg", QUESTION, "yes" if kept[seed] else "no"])
    (folder / "small_world").symlink_to(ROOT / "small_world")


def commands(script):
    """Return the arguments of each `mgllava` command of a script, as the shell expands them."""
    noted = "mgllava() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
    done = subprocess.run(["bash", "-ec", noted + script], capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def run_page(folder, monkeypatch, capsys, number, *changes):
    """Run all blocks in this process, since imports would take longer than the rest in a new one for each.

    `changes` are more settings of the training. Return the model that the page starts from, and the answer.
    """
    write_pictures(folder, number)
    capsys.readouterr()
    monkeypatch.chdir(folder)
    shell, python = blocks("sh"), blocks("python")
    assert (len(shell), len(python)) == (3, 2)
    settings, detect, train = shell
    make_samples, ask = python
    model = re.search(r"^MODEL=(.*)$", settings, re.MULTILINE)[1]

    def run(script, *more):
        (arguments,) = commands(settings + script)
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output

    exec(make_samples, {})
    assert capsys.readouterr().out.strip() == f"{number} samples about {number} pictures"
    run(detect)
    assert len(list((folder / "my-pictures" / "drawn").iterdir())) == number
    run(train, *changes)
    capsys.readouterr()
    exec(ask, {})
    return ROOT / model, capsys.readouterr().out.splitlines()[-1].strip()


def test_every_step_runs(tmp_path, monkeypatch, capsys):
    short = ("training.num_train_epochs=1", "training.warmup_steps=0")
    model, answer = run_page(tmp_path, monkeypatch, capsys, 4, *short)
    assert answer
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "my-model"))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value.float(), after[name].float())}
    assert any("language_model" in name for name in changed)


@pytest.mark.slow
def test_page_teaches_the_new_answer(tmp_path, monkeypatch, capsys):
    model, answer = run_page(tmp_path, monkeypatch, capsys, PICTURES)
    samples = json.loads((tmp_path / "my-pictures" / "samples.json").read_text())
    boxes = read_boxes(tmp_path / "my-pictures" / "boxes.json")
    before, after = (
        right_answers(name, tmp_path / "my-pictures", samples, boxes) for name in (model, tmp_path / "my-model")
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
