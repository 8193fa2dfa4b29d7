"""The report: one file, numbers of the paper next to ours, and no markup from files or answers."""

import json
from html.parser import HTMLParser

import pytest

from mgllava.evaluation import BoxChanges, BoxSource, load_task
from mgllava.evaluation.evaluate import finish
from mgllava.evaluation.job import Boxes, answer_task

from .conftest import Echo, in_base64

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(write_tsv, tmp_path):
    def write(benchmark, rows, reply="A"):
        task = load_task(benchmark, write_tsv(rows))
        boxes = Boxes(BoxSource.DETECTOR, None, BoxChanges())
        output = tmp_path / "out"
        echo = Echo(lambda prompt, boxes: reply)
        answers = answer_task(task, lambda: echo, boxes, output, {"benchmark": benchmark}, overwrite=True)
        finish(task, answers, output, {"benchmark": benchmark}, ATTACK)
        return Page((output / "report.html").read_text()), json.loads((output / "scores.json").read_text())

    return write


def rows(count=3, **values):
    line = {"question": ATTACK, "A": ATTACK, "B": "y", "answer": "A", "category": ATTACK, "image": in_base64()}
    return [{"index": n, **line, "answer": "AB"[n % 2], **values} for n in range(count)]


def test_texts_are_not_markup(report):
    page, _ = report("mmbench-dev", rows(), reply=f"A {ATTACK}")
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert all(name not in ("onerror", "onload") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert(1)</script>") > 3
    # Nothing is loaded from anywhere.
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)


def test_numbers_of_the_paper_stand_next_to_the_main_score(report):
    page, scores = report("mmbench-dev", rows())
    assert scores["main"] == "accuracy" and scores["scores"]["accuracy"] == pytest.approx(200 / 3)
    assert scores["paper"]["Vicuna-7B"] == 72.1
    assert "paper, Vicuna-7B" in page.text and "72.1" in page.text and "66.7" in page.text
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "figure"]
    assert kinds == ["right", "right", "wrong"]
    assert sum(tag == "rect" for tag, _ in page.tags) == 1


def test_benchmarks_that_the_paper_lacks_have_no_such_column(report):
    page, scores = report("mmmu", rows())
    assert scores["paper"] == {} and "paper," not in page.text


def test_without_answers_there_is_an_upload_file_and_no_score(report, tmp_path):
    page, scores = report("mmbench-test", [{k: v for k, v in row.items() if k != "answer"} for row in rows()])
    assert scores["main"] is None and scores["scores"] == {}
    assert "No score" in page.text and "predictions.tsv" in scores["files"]
    assert (tmp_path / "out" / "predictions.tsv").is_file()
    assert {attrs["class"] for tag, attrs in page.tags if tag == "figure"} == {"open"}


def test_at_most_a_dozen_of_each_kind_are_shown(report):
    page, _ = report("seed", rows(60))
    assert sum(tag == "figure" for tag, _ in page.tags) == 24
    assert "Right answers (30)" in page.text and "Wrong answers (30)" in page.text
