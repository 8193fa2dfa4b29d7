"""`mgllava eval` with small models: answers as of single prompts, boxes of models that have some, and of others."""

import importlib
import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgllava.box_files import write_boxes
from mgllava.cli import app
from mgllava.evaluation import Answerer, EvaluationError, evaluate
from mgllava.evaluation.evaluate import Evaluation

from .conftest import in_base64


def command(model, data, output, *options):
    arguments = ["eval", model, "--benchmark", "multiple-choice", "--data", data, "--output", output]
    arguments += ["--dtype", "float32", "--max-new-tokens", "5", *options]
    return CliRunner().invoke(app, list(map(str, arguments)))


def alone(model, processor, prompt, color, boxes):
    """Answer one prompt, encoded from its text instead of a conversation."""
    text = f"USER: <image>\n{prompt} ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (40, 30), color), text=text, boxes=[boxes], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_single_prompts(repository, model, processor, choices, tmp_path):
    lists = [[[3, 3, 20, 20]], [], [[0, 0, 40, 30], [5, 5, 12, 12]], [[1, 1, 9, 9]]]
    records = [
        {"id": n, "boxes": boxes, "labels": ["a", "b"][: len(boxes)], "scores": [0.9, 0.8][: len(boxes)]}
        for n, boxes in enumerate(lists)
    ]
    file = write_boxes(tmp_path / "boxes.json", records)
    result = command(repository, choices, tmp_path / "out", "--box-file", file, "--batch-size", "3")
    assert result.exit_code == 0, result.output
    assert "accuracy: " in result.output and "report.html" in result.output
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    colors = ("red", "green", "blue", "red")
    request = "Answer with the option's letter from the given choices directly."
    for number, (color, record) in enumerate(zip(colors, records, strict=True)):
        prompt = f"Q{number}?\nA. one\nB. two\n{request}"
        assert answers[number]["answer"] == alone(model, processor, prompt, color, record)
        assert len(answers[number]["boxes"]) == len(record["boxes"])
    settings = json.loads((tmp_path / "out" / "scores.json").read_text())["settings"]
    assert settings["boxes"]["source"] == "file" and settings["boxes"]["file"].startswith("sha256:")


def test_boxes_of_the_truth_are_not_suppressed(repository, write_tsv, tmp_path):
    """Two boxes that overlap, with the same label: a detector's would be one object."""
    line = {"question": "Q?", "A": "x", "answer": "A", "boxes": "[[2, 2, 20, 20], [2, 2, 21, 20]]"}
    data = write_tsv([{"index": 1, **line, "image": in_base64()}])
    result = evaluate(
        str(repository), "seed", str(data), str(tmp_path / "out"), boxes="oracle", dtype="float32", max_new_tokens=2
    )
    (answer,) = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert result.answered == 1 and len(answer["boxes"]) == 2


def test_bad_rows_stop_before_the_model_answers_or_are_skipped(repository, write_tsv, tmp_path):
    line = {"question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    data = write_tsv(
        [
            {"index": 0, **line, "question": "Where is <image>?"},
            {"index": 1, **line},
            {"index": 2, **line, "image": ""},
            {"index": 3, **line, "A": ""},
            {"index": 4, **line, "answer": "F"},
            {"index": 5, **line},
        ]
    )
    file = write_boxes(tmp_path / "b.json", [{"id": n, "boxes": [], "labels": [], "scores": []} for n in range(5)])
    reasons = ["no image", "its options are empty", "'F' is not one of its options A", "no boxes for the id 5"]
    reasons.insert(3, "its text has <image>, which is a placeholder")
    result = command(repository, data, tmp_path / "out", "--box-file", file)
    assert result.exit_code == 1 and "5 rows cannot be asked" in result.output and "--on-error" in result.output
    assert all(reason in result.output for reason in reasons)
    assert not (tmp_path / "out").exists()
    result = command(repository, data, tmp_path / "out", "--box-file", file, "--on-error", "skip")
    assert result.exit_code == 0 and "1 answers, 5 rows skipped" in result.output
    skipped = json.loads((tmp_path / "out" / "scores.json").read_text())["skipped"]
    assert all(reason in row["reason"] for reason, row in zip(reasons, skipped, strict=True))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--boxes", "file"], "--boxes is file, so --box-file must name one"),
        (["--boxes", "none", "--drop-boxes", "0.5"], "but --boxes is none"),
        (["--boxes", "none", "--box-file", "b.json"], "--box-file must be left out if --boxes is none"),
        (["--boxes", "detector"], "has none. Choose none, file or oracle"),
        (["--shift-boxes", "3"], "the model has no box detector, so there are no boxes to change"),
        (["--drop-boxes", "2"], "--drop-boxes must be from 0 to 1, got 2.0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--resume", "--overwrite"], "pass one of them"),
        (["--annotations", "absent.json"], "absent.json"),
        (["--image-folder", "absent"], "--image-folder must be a folder"),
        (["--box-key", "name"], "it has no name as text or a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, problem, repository, choices, tmp_path):
    result = command(repository, choices, tmp_path / "out", *options)
    assert result.exit_code == 1 and problem in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"boxes": "all"}, "`boxes` must be one of none, file, detector, oracle, got 'all'"),
        ({"on_error": "ignore"}, "`on_error` must be stop or skip, got 'ignore'"),
    ],
)
def test_arguments_that_the_command_does_not_let_through(options, problem, tmp_path):
    with pytest.raises(EvaluationError, match=problem):
        evaluate("absent", "seed", tmp_path / "absent.tsv", tmp_path / "out", **options)


@pytest.mark.parametrize(
    "options",
    [
        ["--boxes", "detector"],
        ["--box-file", "b.json"],
        ["--boxes", "oracle"],
        ["--drop-boxes", "0.5"],
        ["--shift-boxes", "1"],
        ["--shuffle-boxes"],
    ],
)
def test_options_of_boxes_are_refused_for_models_without_boxes(options, stand_in_path, choices, tmp_path):
    result = command(stand_in_path, choices, tmp_path / "out", *options)
    assert result.exit_code == 1 and "must be left out: Stand-in has no boxes" in " ".join(result.output.split())
    assert options[0] in result.output


def test_models_without_boxes_are_asked_without(stand_in_path, choices, tmp_path):
    result = command(stand_in_path, choices, tmp_path / "out")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert len(answers) == 4 and all("boxes" not in answer for answer in answers)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings == {
        "benchmark": "multiple-choice",
        "model": "stand-in@None",  # a Hub id, and its commit
        "dtype": "float32",
        "bits": None,
        "attn_implementation": None,
        "max_new_tokens": 5,
        "boxes": {"source": "none"},
    }


def test_answers_are_greedy_whatever_the_model_suggests(model, processor, monkeypatch):
    image = Image.new("RGB", (40, 30))
    expected = Answerer(model, processor, 5).answer([image], ["Q?"])
    suggestion = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 3.0, "num_beams": 2}
    suggestion |= {"num_return_sequences": 2, "no_repeat_ngram_size": 1, "min_length": 1000, "max_length": 3}
    suggestion |= {"return_dict_in_generate": True}
    for name, value in suggestion.items():
        monkeypatch.setattr(model.generation_config, name, value)
    torch.manual_seed(1)
    assert Answerer(model, processor, 5).answer([image], ["Q?"]) == expected


def test_answers_of_another_model_are_not_scored_again(repository, choices, tmp_path):
    """A model is told by the content of its folder, so a copy is the same model."""
    options = {"boxes": "none", "dtype": "float32", "max_new_tokens": 1, "limit": 1}
    first, other = (shutil.copytree(repository, tmp_path / name) for name in "ab")
    evaluate(str(first), "multiple-choice", choices, tmp_path / "out", **options)
    assert evaluate(str(other), "multiple-choice", choices, tmp_path / "out", **options, resume=True).answered == 1
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(EvaluationError, match=r"answers of other settings: settings\.model is"):
        evaluate(str(other), "multiple-choice", choices, tmp_path / "out", **options, resume=True)


def test_no_row_with_boxes_is_an_error(repository, choices, tmp_path):
    file = write_boxes(tmp_path / "b.json", [{"id": 99, "boxes": [], "labels": [], "scores": []}])
    with pytest.raises(EvaluationError, match=r"no row can be asked\. .*row 1: the box file has no boxes"):
        evaluate(str(repository), "seed", choices, tmp_path / "out", box_file=file, on_error="skip")


@pytest.mark.parametrize(
    ("count", "device", "expected"),
    [(1, "auto", "auto"), (2, "auto", "cuda:1"), (2, None, "cuda:1"), (2, "cpu", "cpu")],
)
def test_each_process_loads_the_model_on_its_own_device(count, device, expected, choices, tmp_path, monkeypatch):
    def load(model, **options):
        raise RuntimeError(f"loads on {options['device']}")

    state = SimpleNamespace(num_processes=count, device="cuda:1")
    monkeypatch.setattr(importlib.import_module("mgllava.evaluation.evaluate"), "processes", lambda: state)
    monkeypatch.setattr("mgllava.chat.loading.load", load)
    options = {} if device is None else {"device": device}
    with pytest.raises(RuntimeError, match=f"loads on {expected}"):
        evaluate("model", "seed", choices, tmp_path / "out", **options)


def test_the_command_has_the_defaults_of_the_function():
    from mgllava.commands.eval import evaluate as command

    given = {name: option.default for name, option in inspect.signature(command).parameters.items()}
    for name, option in inspect.signature(evaluate).parameters.items():
        if name in given and option.default is not option.empty:
            assert getattr(given[name], "value", given[name]) == option.default, name


def test_a_result_is_said_in_one_line(tmp_path):
    found = Evaluation(tmp_path, "accuracy", {"accuracy": 66.66}, {}, 1200, 1003, [])
    assert str(found) == (
        f"accuracy: 66.7 (1,200 answers, 1,003 rows skipped). Wrote {tmp_path / 'report.html'} and scores.json."
    )
    found = Evaluation(tmp_path, None, {}, {}, 1, 0, [tmp_path / "a.json", tmp_path / "b.json"])
    assert str(found) == (
        f"No score without a judge (1 answers). Wrote {tmp_path / 'report.html'} and a.json, b.json."
    )
