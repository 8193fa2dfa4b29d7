"""Files for servers and judges: names of keys, order and normal forms that these expect."""

import csv
import json

import pytest

from mgllava.evaluation import uploads
from mgllava.evaluation.questions import Question
from mgllava.evaluation.tables import Row


def question(key, answer=None, **values):
    return Question(0, key, key, f"Prompt {key}", answer, "", Row(values, "row", "data", dict, {}))


def read(path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def test_choices(tmp_path):
    asked = [question(2, question="=1+1", A="x\ty", B="z", category="c"), question(10, question='"Q"', A="x")]
    path = uploads.upload_choices(tmp_path, asked, ["A", "=B"])[0]
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "prediction", "category"],
        ["2", "=1+1", "x\ty", "z", "", "", "A", "c"],
        ["10", '"Q"', "x", "", "", "", "=B", ""],
    ]


def test_workbook_has_no_formulas(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    asked = [question(2, question="=1+1", A="x\x00y")]
    path = uploads.upload_choices(tmp_path, asked, ["A"])[1]
    cells = openpyxl.load_workbook(path).active[2]
    assert [cell.value for cell in cells[:3]] == [2, "=1+1", "xy"] and cells[1].data_type == "s"


def test_vqav2_answers_are_normal(tmp_path):
    (path,) = uploads.upload_vqav2(tmp_path, [question(9), question(5)], ["The two Cats.", "Yes"])
    assert read(path) == [{"question_id": 9, "answer": "2 cats"}, {"question_id": 5, "answer": "yes"}]


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
