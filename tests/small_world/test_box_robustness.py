"""The curves of box robustness, with a stand-in for the small model that is right if it gets a box."""

import json

import numpy as np
import pytest
from rich.console import Console

from small_world import box_robustness


class NeedsBoxes:
    takes_boxes = True
    placeholders = ("<image>",)

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def detect(self, images):
        assert not images  # boxes are found once, before
        return []

    def objects(self, record, image, is_frame=False):
        return record

    def answer(self, images, prompts, boxes=None, **options):
        self.asked += prompts
        return [
            self.answers[prompt] if given["boxes"] else "nothing" for prompt, given in zip(prompts, boxes, strict=True)
        ]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Return the measurement with few changes, and what was asked in it."""
    asked = []

    def detect(processor, questions, images):
        record = {"boxes": np.array([[1, 1, 9, 9]]), "labels": ["star"], "scores": np.array([0.9])}
        return {row["image_id"]: record for row in questions}

    def make_answerer(model, processor, tokens):
        rows = map(json.loads, (tmp_path / "pictures" / "questions.jsonl").read_text().splitlines())
        stand_in = NeedsBoxes({row["text"]: row["answer"] for row in rows})
        asked.append(stand_in.asked)
        return stand_in

    monkeypatch.setattr(box_robustness, "load_model", lambda path: (None, None))
    monkeypatch.setattr(box_robustness, "detect_boxes", detect)
    monkeypatch.setattr(box_robustness, "Answerer", make_answerer)
    monkeypatch.setattr(box_robustness, "DROPS", (0.0, 1.0))
    monkeypatch.setattr(box_robustness, "SHIFTS", (0, 8))
    monkeypatch.setattr(box_robustness, "_QUESTIONS_PER_PICTURE", 1)
    return lambda: box_robustness.measure(tmp_path, tmp_path / "model", 2, Console(quiet=True)), asked


def test_curves_are_those_of_the_changes(measure, tmp_path):
    run, asked = measure
    result = run()
    assert result["questions"] == 2 and result["pictures"] == 2
    assert result["drop"]["0.0"]["all"] == 100 and result["drop"]["1.0"]["all"] == 0
    assert {scores["all"] for scores in (*result["shift"].values(), result["shuffle"])} == {100}
    assert set(result["drop"]["0.0"]) > {"all"}  # and the kinds of questions
    assert len(asked[0]) == 5 * 2
    # What is finished is not asked again.
    assert run() == result and not asked[1]


def test_curves_are_drawn(tmp_path):
    scores = {"all": 90, "existence": 91, "shape": 92, "count": 80, "reading": 85}
    result = {"drop": {"0.0": scores, "1.0": scores}, "shift": {"0": scores, "8": scores}, "shuffle": scores}
    box_robustness.draw(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_published_results_have_all_settings():
    """The table in docs/evaluation.md is that of the file of results."""
    published = json.loads(box_robustness.RESULT.read_text())
    assert [float(drop) for drop in published["drop"]] == list(box_robustness.DROPS)
    assert [float(shift) for shift in published["shift"]] == list(box_robustness.SHIFTS)
    page = (box_robustness.PICTURE.parent / "evaluation.md").read_text()
    columns = (
        *(published["drop"][drop] for drop in ("0.0", "0.5", "1.0")),
        *(published["shift"][shift] for shift in ("8", "32")),
        published["shuffle"],
    )
    for kind in ("all", "reading", "count"):
        numbers = " | ".join(f"{column[kind]:.1f}" for column in columns)
        assert f"| {kind} | {numbers} |" in page
