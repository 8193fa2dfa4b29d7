"""Which answers count as right, answers in batches, and the tables of the ablation."""

import json

import pytest
import typer

from mgllava.box_files import read_boxes
from small_world import ablation
from small_world.ablation import GROUPS, Row, summarize
from small_world.answer_picture import draw_answers
from small_world.dataset import write_dataset
from small_world.evaluation import Answer, accuracy, answer_questions, read_questions
from small_world.questions import KINDS
from tests.tiny import tiny_config

EFFORT = {"alignment": 1, "tuning": 1, "bf16": False, "pictures": 600}


def make_answer(kind, expected, answer, image="000001.jpg"):
    return Answer("test/1/0", image, kind, "What is it?", expected, answer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, "test", 3, questions=3, processes=1)
    return folder


def test_only_the_whole_answer_is_right():
    assert make_answer("reading", "K", " k ").is_right
    assert make_answer("position", "top left", "top left").is_right
    assert not make_answer("position", "top left", "top").is_right
    assert not make_answer("count", "one", "one two").is_right
    assert not make_answer("existence", "no", "").is_right


def test_accuracy_is_by_kind():
    answers = [make_answer("color", "red", said) for said in ("red", "red", "blue")]
    answers.append(make_answer("count", "two", "three"))
    assert accuracy(answers) == {"color": pytest.approx(2 / 3), "count": 0.0, "all": 0.5}


def test_a_limit_counts_pictures_not_questions(data):
    questions = read_questions(data, 2)
    assert {row["image_id"] for row in questions} == {"test/0", "test/1"}
    assert len(questions) < len(read_questions(data))


def test_answers_in_batches_are_those_of_one_question_at_a_time(data, model, processor):
    questions = read_questions(data)
    records = read_boxes(data / "boxes.json")
    boxes = {row["image_id"]: records[row["image_id"]] for row in questions}
    alone, together = (
        list(answer_questions(model, processor, questions, data / "images", boxes, batch_size=size))
        for size in (1, len(questions))
    )
    assert [answer.answer for answer in alone] == [answer.answer for answer in together]
    assert [answer.expected for answer in together] == [row["answer"] for row in questions]
    assert any(answer.answer for answer in together)


def test_the_drawing_has_room_for_every_question(data):
    answers = [make_answer("color", "red", "red", "000000.jpg") for _ in range(4)]
    answers.append(make_answer("count", "two", "three"))
    boxes = {f"{number:06d}.jpg": read_boxes(data / "boxes.json")[f"test/{number}"] for number in range(2)}
    short = draw_answers(answers[-2:], boxes, data / "images")
    tall = draw_answers(answers, boxes, data / "images")
    assert tall.width == short.width > 2 * 500
    assert tall.height > short.height
    # Right answers are green, wrong ones red.
    pixels = {color for _, color in tall.crop((0, short.height // 2, *tall.size)).getcolors(1 << 24)}
    assert {(20, 120, 50), (190, 30, 30)} <= pixels


def test_the_table_of_the_ablation_has_mean_and_spread():
    shares = dict.fromkeys((*KINDS, "all"), 0.5)
    table = summarize({"a row": {"0": shares, "1": {**shares, "reading": 0.7}}, "another": {"0": shares}})
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["reading"] == ["60.0 ± 14.1", "50.0"]
    assert cells["color"] == ["50.0 ± 0.0", "50.0"]
    assert cells["seeds"] == ["2", "1"]


def test_rows_that_tables_share_are_trained_once(tmp_path, monkeypatch):
    trained, shares = [], dict.fromkeys((*KINDS, "all"), 0.5)
    monkeypatch.setattr(ablation, "find_boxes", lambda *arguments: None)
    monkeypatch.setattr(ablation, "run", lambda row, seed, *others: trained.append((row, seed)) or shares)
    output = tmp_path / "ablation.json"
    ablation.main(["main", "fusion"], seeds=2, jobs=2, output=output, **EFFORT)
    assert len(trained) == len(set(trained))
    assert {(Row(), 0), (Row(), 1), (Row("none", "none"), 1)} <= set(trained)
    results = json.loads(output.read_text())["results"]
    of_both_seeds = {"0": shares, "1": shares}
    assert results["main"]["+ objects + Conv-Gate"] == results["fusion"]["fusion conv_gate"] == of_both_seeds


def test_results_with_different_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "find_boxes", lambda *arguments: None)
    monkeypatch.setattr(ablation, "run", lambda *arguments: dict.fromkeys((*KINDS, "all"), 0.5))
    output = tmp_path / "ablation.json"
    ablation.main(["main"], output=output, seeds=1, jobs=1, **EFFORT)
    before = output.read_text()
    with pytest.raises(typer.BadParameter, match="which cannot be compared"):
        ablation.main(["main"], output=output, seeds=1, jobs=1, **{**EFFORT, "tuning": 2})
    assert output.read_text() == before


def test_rows_of_the_ablation_are_configurations_of_the_model():
    for row in {row for rows in GROUPS.values() for row in rows.values()}:
        config = tiny_config(**row.config)
        assert (config.fusion_type, config.object_merging) == (row.fusion_type, row.object_merging)
