"""Files for servers and judges: names of keys, order and normal forms that these expect."""

import csv
import json
from pathlib import Path

import pytest

from mgllava.evaluation import BENCHMARKS, uploads
from mgllava.evaluation.questions import Question
from mgllava.evaluation.tables import Row


def question(key, answer=None, **values):
    return Question(0, key, key, f"Prompt {key}", answer, "", Row(values, "row", "data", dict, {}))


def read(path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def test_choices(tmp_path):
    more = {"category": "c", "l2-category": "l", "split": "dev"}
    asked = [question(2, question="=1+1", A="x\ty", B="z", **more), question(10, question='"Q"', A="x", E="e")]
    asked[0].row.values["answer"] = "A"
    path = uploads.upload_choices(tmp_path, asked, ["A", "=B"])[0]
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "E", "prediction", "category", "l2-category", "split", "answer"],
        ["2", "=1+1", "x\ty", "z", "", "", "", "A", "c", "l", "dev", "A"],
        ["10", '"Q"', "x", "", "", "", "e", "=B", "", "", "", ""],
    ]
    asked = [question(3)]
    assert "Prompt 3" in uploads.upload_choices(tmp_path, asked, ["A"])[0].read_text()


def test_workbook_has_no_formulas(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    asked = [question(2, question="=1+1", A="x\x00y")]
    path = uploads.upload_choices(tmp_path, asked, ["A"])[1]
    cells = openpyxl.load_workbook(path).active[2]
    assert [cell.value for cell in cells[:3]] == [2, "=1+1", "xy"] and cells[1].data_type == "s"


def test_workbooks_are_written_if_their_writer_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "find_spec", lambda name: None)
    assert [path.name for path in uploads.upload_choices(tmp_path, [question(1)], ["A"])] == ["predictions.tsv"]


def test_vqav2_answers_are_normal(tmp_path):
    (path,) = uploads.upload_vqav2(tmp_path, [question(9), question(5)], ["The two Cats.", "Yes"])
    assert read(path) == [{"question_id": 9, "answer": "2 cats"}, {"question_id": 5, "answer": "yes"}]
    assert path.name == "vqav2_results.json"


def test_gqa(tmp_path):
    (path,) = uploads.upload_gqa(tmp_path, [question("201")], ["Cat."])
    assert read(path) == [{"questionId": "201", "prediction": "cat"}]


def test_docvqa(tmp_path):
    (path,) = uploads.upload_docvqa(tmp_path, [question(0, questionId=57344), question(1)], ["a", "b"])
    assert read(path) == [{"questionId": 57344, "answer": "a"}, {"questionId": 1, "answer": "b"}]


def test_mmvet_and_lines_in_order_of_ids(tmp_path):
    result, lines = uploads.upload_mmvet(tmp_path, [question(10), question(9)], ["b", "a"])
    assert list(read(result).items()) == [("v1_9", "a"), ("v1_10", "b")]
    assert read(lines)[0] == {"question_id": 9, "prompt": "Prompt 9", "text": "a", "metadata": {}}
    assert (result.name, lines.name) == ("mmvet_results.json", "answers_llava.jsonl")
    named, _ = uploads.upload_mmvet(tmp_path, [question("v1_9"), question("v1_10")], ["a", "b"])
    assert list(read(named)) == ["v1_10", "v1_9"]


def test_mathvista_keeps_the_problem(tmp_path):
    """Also fields that are null, which its scripts read."""
    asked = [question("3", pid="3", unit="m"), question("4", pid="4")]
    (path,) = uploads.upload_mathvista(tmp_path, asked, ["7", "8"])
    assert read(path) == {
        "3": {"pid": "3", "unit": "m", "query": "Prompt 3", "response": "7"},
        "4": {"pid": "4", "unit": None, "query": "Prompt 4", "response": "8"},
    }


def test_mmvp(tmp_path):
    (path,) = uploads.upload_mmvp(tmp_path, [question(1, "(a)")], ["x"])
    expected = {"question_id": 1, "prompt": "Prompt 1", "answer": "(a)", "response": "x", "metadata": {}}
    assert read(path) == [expected]


def test_videos(tmp_path):
    (path,) = uploads.upload_videos(tmp_path, [question("v1", "a cat")], ["The cat"])
    assert read(path) == [{"id": "v1", "question": "Prompt v1", "answer": "a cat", "pred": "The cat"}]


def test_names_of_files_are_those_of_the_page(tmp_path):
    """Users find them in docs/evaluation.md."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for benchmark in BENCHMARKS.values():
        if benchmark.upload is not None:
            for path in benchmark.upload(tmp_path, [question(1, "a")], ["x"]):
                assert path.name.replace("predictions.xlsx", "`.xlsx`") in page and path.is_file(), benchmark.name
    assert {path.name for path in tmp_path.iterdir()} >= {"gqa_predictions.json", "mathvista_results.json"}
