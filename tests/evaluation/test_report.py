"""The report: one file, numbers of the paper next to ours, and no markup from files or answers."""

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mgllava.evaluation import BoxChanges, BoxSource, load_task
from mgllava.evaluation.evaluate import finish
from mgllava.evaluation.job import Boxes, answer_task
from mgllava.evaluation.report import write_report
from mgllava.evaluation.task import Task

from .conftest import Echo, in_base64

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.headings, self.open = [], [], "", [], []
        self.feed(text)
        assert not [tag for tag in self.open if tag not in ("html", "body")]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


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


def _summary(**values):
    rows = {"all": 1004, "answered": 3, "skipped": 1000, "left_out": 1}
    empty = {"main": None, "scores": {}, "categories": {}, "no_score": "", "paper": {}, "notes": [], "skipped": []}
    return {"title": "T", "model": "m", **empty, "rows": rows, "settings": {}, **values}


def _page(folder, task, summary, answers=None):
    write_report(folder / "report.html", task, summary, answers or {}, {})
    return Page((folder / "report.html").read_text())


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
    assert scores["paper"]["Vicuna-7B"] == 72.1 and scores["files"] == [] and not scores["notes"]
    assert "paper, Vicuna-7B" in page.text and "72.1" in page.text and "66.7" in page.text
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "figure"]
    assert kinds == ["right", "right", "wrong"]
    headings = ["MMBench dev", "By category", "Right answers (2)", "Wrong answers (1)", "Settings"]
    assert page.headings == headings and "benchmarkmmbench-dev" in page.text
    # The bar of the only category, as wide as its share.
    assert [attrs["style"] for tag, attrs in page.tags if tag == "i"] == ["width:66.7%"]


def test_benchmarks_that_the_paper_lacks_have_no_such_column(report):
    page, scores = report("mmmu", rows())
    assert scores["paper"] == {} and "paper," not in page.text


def test_without_answers_there_is_an_upload_file_and_no_score(report, tmp_path):
    page, scores = report("mmbench-test", [{k: v for k, v in row.items() if k != "answer"} for row in rows()])
    assert scores["main"] is None and scores["scores"] == {}
    assert scores["no_score"] == "the file has no answers." and scores["categories"] == {}
    assert "No score" in page.text and "predictions.tsv" in scores["files"]
    assert "predictions.tsv" in scores["notes"][0] and scores["notes"][0].endswith(": for the server of MMBench.")
    assert (tmp_path / "out" / "predictions.tsv").is_file()
    assert {attrs["class"] for tag, attrs in page.tags if tag == "figure"} == {"open"}


def test_files_for_others_are_written_next_to_scores(report):
    line = {"question": "Q?", "answer": "cat", "image": in_base64()}
    _, scores = report("gqa", [{"question_id": 1, **line}], "Cat")
    assert (scores["main"], scores["scores"]) == ("accuracy", {"accuracy": 100})
    assert scores["files"] == ["gqa_predictions.json"] and "for the evaluation script of GQA" in scores["notes"][0]
    _, scores = report("mmvet", [{"question_id": 1, **line}], "Cat")
    assert (scores["main"], scores["no_score"]) == (None, "that takes the server of MM-Vet.")


def test_rows_that_are_left_out_are_counted(report):
    line = {"question": "Q?", "answer": "yes", "category": "c"}
    rows = [{"index": "VD_a_b_1_2_3", **line, "image": in_base64()}, {"index": "VS_a_b_1_0_3", **line}]
    page, scores = report("hallusionbench", rows, "yes")
    assert scores["rows"] == {"all": 2, "answered": 1, "skipped": 0, "left_out": 1}
    assert scores["categories"] == {"c": 100} and "1 without an image left out" in page.text


def test_at_most_a_dozen_of_each_kind_are_shown(report):
    page, _ = report("seed", rows(60))
    assert sum(tag == "figure" for tag, _ in page.tags) == 24
    assert "Right answers (30)" in page.text and "Wrong answers (30)" in page.text


def test_bars_are_as_long_as_their_scores(tmp_path, task):
    """In proportion to 100, or to the largest score if that is larger, as points of MME are."""
    name = "a category with a name of more than thirty letters"
    for categories, widths in (
        ({"x": 50.0, name: 100.0}, ["50.0%", "100.0%"]),
        ({"x": 50.0, name: 200.0}, ["25.0%", "100.0%"]),
    ):
        page = _page(tmp_path, task, _summary(categories=categories))
        assert [attrs["style"] for tag, attrs in page.tags if tag == "i"] == [f"width:{width}" for width in widths]
        assert "x50.0" in page.text.split("\n") and f"{name}{categories[name]:.1f}" in page.text
    assert "By category" not in _page(tmp_path, task, _summary()).text


def test_tables_of_scores_and_settings(tmp_path, task):
    page = _page(
        tmp_path,
        task,
        _summary(
            main="b", scores={"a": 12.34, "b": 50.0}, paper={"X-7B": 72.1}, settings={"boxes": {"source": "file"}}
        ),
    )
    cells = [text for text in page.text.split("\n") if text]
    assert "scorethis runpaper, X-7B" in cells and "a12.3" in cells and "b50.072.1" in cells
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"][:3] == [None, None, "main"]
    assert "3 of 1,004 rows answered, 1,000 skipped, 1 without an image left out." in cells
    assert "boxes.sourcefile" in cells
    page = _page(tmp_path, task, _summary(no_score="that takes a judge.", paper={"X-7B": 72.1, "Y": 1.5}))
    assert "No score: that takes a judge." in page.text and "The paper reports: X-7B 72.1, Y 1.5." in page.text
    assert "paper" not in _page(tmp_path, task, _summary()).text


def test_pictures_are_small_with_the_boxes_in_their_places(tmp_path, write_tsv):
    line = {"question": "Q?", "A": "x", "answer": "A"}
    images = [in_base64("white", size) for size in ((720, 720), (40, 30), (4000, 1))]
    task = load_task(
        "seed", write_tsv([{"index": number, **line, "image": image} for number, image in enumerate(images)])
    )
    # The first box reaches over the right border.
    boxes = {"boxes": [[400, 100, 900, 300]], "labels": [""]}
    page = _page(tmp_path, task, _summary(), {0: {"answer": "A", **boxes}, 1: {"answer": "A"}, 2: {"answer": "A"}})
    shown = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in page.links]
    assert [image.size for image in shown] == [(360, 360), (40, 30), (360, 1)]
    colored = np.argwhere(np.ptp(np.asarray(shown[0].convert("RGB")).astype(int), axis=2) > 60)
    assert colored.min(axis=0) == pytest.approx([50, 200], abs=3)
    assert colored.max(axis=0) == pytest.approx([150, 359], abs=3)
    assert page.text.count("boxes") == 1 and "1 boxes" in page.text and "Answers (3)" in page.headings
    named = _page(tmp_path, task, _summary(), {0: {"answer": "A", **boxes, "labels": ["cup"]}})
    assert named.links[0] != page.links[0], "labels are drawn"


def test_captions_say_what_was_asked_answered_and_expected(report):
    line = {"question": "Q?", "ocr_tokens": "[]", "image": in_base64()}
    page, _ = report("textvqa", [{"question_id": 7, **line, "answers": json.dumps(["cat"] * 9 + ["a cat"])}], "dog")
    caption = page.text[page.text.index("Answer: dog") :]
    assert caption.split("\n")[:4] == ["Answer: dog", "Expected: cat | a cat", "1 boxes", "7"]


def test_skipped_rows_are_listed(tmp_path, task):
    page = _page(tmp_path, task, _summary(skipped=[{"place": "<a>", "id": 1, "reason": "no <b>"}], notes=["N <c>"]))
    assert "Skipped rows (1)" in page.headings and "<a>: no <b>" in page.text and "N <c>" in page.text
    assert "Skipped" not in _page(tmp_path, task, _summary()).text


@pytest.mark.parametrize(("count", "size"), [(1, (640, 320)), (6, (960, 240))])
def test_frames_of_a_video_are_a_strip(count, size, tmp_path, task, monkeypatch):
    frames = [Image.new("RGB", (480, 240), "white")] * count
    monkeypatch.setattr(Task, "open", lambda self, stored: SimpleNamespace(frames=frames))
    monkeypatch.setattr(Task, "find_image", lambda self, question: None)
    seen = [{"boxes": [[0, 0, 40, 40]], "labels": [""]}] + [{"boxes": []}] * (count - 1)
    page = _page(tmp_path, replace(task, num_frames=count), _summary(), {0: {"answer": "A", "frames": seen}})
    assert (
        "div",
        {"class": "grid wide"},
    ) in page.tags and f"{', '.join(['1', *'0' * (count - 1)])} boxes" in page.text
    strip = Image.open(io.BytesIO(base64.b64decode(page.links[0].partition(",")[2])))
    assert strip.size == pytest.approx(size, rel=0.06)
    colored = np.argwhere(np.ptp(np.asarray(strip.convert("RGB")).astype(int), axis=2) > 60)
    assert len(colored) and colored.max() < size[0] / min(count, 4) / 10


def test_names_of_files_need_not_be_unicode(tmp_path, task):
    _page(tmp_path, task, _summary(model=b"model\xe9".decode("utf-8", "surrogateescape")))
    assert b"model&#56553;" in (tmp_path / "report.html").read_bytes()


def test_an_image_that_is_gone_is_said(tmp_path, write_lines):
    (tmp_path / "a.png").write_bytes(base64.b64decode(in_base64()))
    task = load_task("exact-match", write_lines([{"question_id": 1, "image": "a.png", "text": "Q", "answer": "A"}]))
    (tmp_path / "a.png").unlink()
    page = _page(tmp_path, task, _summary(), {0: {"answer": "A"}})
    assert "a.png does not exist" in page.text and not page.links


def test_shown_answers_are_spread_over_all(tmp_path, write_tsv):
    line = {"question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    for count, expected in ((12, range(12)), (24, range(0, 24, 2)), (36, range(0, 36, 3))):
        task = load_task("seed", write_tsv([{"index": number, **line} for number in range(count)]))
        answers = {number: {"answer": f"@{number}@"} for number in range(count)}
        page = _page(tmp_path, task, _summary(), answers)
        assert [int(text) for text in page.text.split("@")[1::2]] == list(expected)
