"""Reading benchmark files in the forms that they are distributed in."""

import base64
import json

import pytest

from mgllava.evaluation import BadRowError, EvaluationError, load_task
from mgllava.evaluation.tables import Row, find_image, read_rows

from .conftest import in_base64, png


def test_tsv_like_that_of_vlmevalkit(write_tsv):
    text = '"two ""quoted""\nlines"'
    path = write_tsv(
        [
            {"index": 1, "question": text, "A": "None", "B": "NA", "C": "", "zip": "012", "image": in_base64()},
            {"index": 1000001, "question": "Q", "A": "5", "B": "", "C": "nan", "zip": "13", "image": "1"},
        ]
    )
    first, second = read_rows([path])
    assert first.values == {"index": 1, "question": 'two "quoted"\nlines', "A": "None", "B": "NA", "zip": "012"}
    assert second.values == {"index": 1000001, "question": "Q", "A": "5", "zip": "13"}
    # A short text instead of an image is the index of the row that has it.
    assert find_image(second, path.parent) == find_image(first, path.parent) == png()


@pytest.mark.parametrize(("image", "problem"), [("9", "index 9, which is absent"), ("2", "in a circle")])
def test_image_of_another_row_that_is_not_there(image, problem, write_tsv):
    path = write_tsv([{"index": 1, "question": "Q", "image": "2"}, {"index": 2, "question": "Q", "image": image}])
    with pytest.raises(BadRowError, match=problem):
        find_image(read_rows([path])[0], path.parent)


def test_two_images_in_a_row(write_tsv):
    path = write_tsv([{"index": 1, "image": f"['{in_base64()}', '{in_base64()}']"}])
    with pytest.raises(BadRowError, match="2 images"):
        find_image(read_rows([path])[0], path.parent)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_under_either_name(name, write_lines):
    path = write_lines([{"question_id": 1, "image": "x.png"}, {"question_id": 2, "image": None}], name)
    assert [row.values for row in read_rows([path])] == [{"question_id": 1}, {"question_id": 2}]


def test_dictionary_of_problems_like_that_of_mathvista(tmp_path):
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps({"1": {"question": "Q", "image": "images/1.png"}}))
    (row,) = read_rows([path])
    assert row.values == {"pid": "1", "question": "Q"}


def test_parquet_with_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [{"question_id": "a", "image": {"bytes": png(), "path": None}, "hint": None}, {"question_id": "b"}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    first, second = read_rows([tmp_path])
    assert first.values == {"question_id": "a"} and find_image(first, tmp_path) == png()
    with pytest.raises(BadRowError, match="no image"):
        find_image(second, tmp_path)


@pytest.mark.parametrize("is_new", [True, False])
def test_folder_of_mme(is_new, tmp_path):
    images, texts = ("count/images", "count/questions_answers_YN") if is_new else ("count",) * 2
    for folder in (images, texts):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / images / "7.jpg").write_bytes(png())
    question = "Is it? Please answer yes or no."
    (tmp_path / texts / "7.txt").write_text(f"{question}\tYes\n{question}\tNo\n")
    task = load_task("mme", tmp_path)
    assert [(item.answer, item.category, item.box_key) for item in task.questions] == [
        ("Yes", "count", f"{images}/7.jpg"),
        ("No", "count", f"{images}/7.jpg"),
    ]
    assert task.find_image(task.questions[0]) == tmp_path / images / "7.jpg"


def test_images_of_mmvp_are_numbered(tmp_path):
    (tmp_path / "MMVP Images").mkdir()
    for number in (1, 2):
        (tmp_path / "MMVP Images" / f"{number}.jpg").write_bytes(png())
    data = tmp_path / "Questions.csv"
    data.write_text('Index,Question,Options,Correct Answer\n1,"Q, really?",(a) x (b) y,(a)\n2,Q,(a) x,(b)\n')
    task = load_task("mmvp", data)
    assert [(item.key, item.prompt) for item in task.questions] == [(1, "Q, really? (a) x (b) y"), (2, "Q (a) x")]
    assert task.find_image(task.questions[1]).name == "2.jpg"


def test_names_of_images_do_not_leave_their_folder(tmp_path, write_lines):
    inside = tmp_path / "images"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (inside / "a.png").write_bytes(png())
    names = ["../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png", str(inside / "a.png"), "b.png"]
    data = write_lines([{"question_id": n, "text": "Q", "image": name} for n, name in enumerate(names)])
    task = load_task("mmvet", data, image_folder=inside)
    assert [question.key for question in task.questions] == [3]
    reasons = [bad.reason for bad in task.bad_rows]
    assert all("outside the folder" in reason for reason in reasons[:3]) and "does not exist" in reasons[3]


def test_a_named_folder_wins_over_pixels_in_the_file(tmp_path, write_tsv):
    (tmp_path / "a.png").write_bytes(png("blue"))
    (row,) = read_rows([write_tsv([{"index": 1, "image": in_base64(), "image_path": "a.png"}])])
    assert find_image(row, tmp_path) == png()
    assert find_image(row, tmp_path, prefers_files=True) == tmp_path / "a.png"


def test_data_urls(write_lines, tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    (row,) = read_rows([write_lines([{"question_id": 1, "image": url}])])
    assert find_image(row, tmp_path) == png()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "x", "must be a folder or end in"),
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2 is not JSON"),
        ("a.json", "[1]", "row 1 must be a dictionary, got int"),
        ("a.json", "[]", "has no rows"),
        ("a.tsv", "index\tquestion\n1\tQ\textra\n", "has 3 cells in row 1, but 2 columns"),
        ("a.parquet", "x", "is not a Parquet file"),
    ],
)
def test_other_files_are_refused(name, content, problem, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=problem):
        read_rows([tmp_path / name])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": [{"question_id": 1}, {"question_id": 2, "hint": null}]}', [{"question_id": 1}, {"question_id": 2}]),
        ('{"question_id": 1}', [{"question_id": 1}]),
    ],
)
def test_json_with_one_dictionary(content, expected, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert [row.values for row in read_rows([tmp_path / "a.json"])] == expected


def test_json_with_neither_rows_nor_lines(tmp_path):
    (tmp_path / "a.json").write_text("5")
    with pytest.raises(EvaluationError, match="must hold a list of rows, got int"):
        read_rows([tmp_path / "a.json"])


def _row(**stored):
    return Row({}, "row", "data", lambda: stored, {})


def test_all_forms_of_stored_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    forms = [
        {"image": {"bytes": png(), "path": "b.png"}},
        {"image": bytearray(png())},
        {"decoded_image": {"bytes": png()}, "image": "images/1.jpg"},
        {"img": in_base64()},
        {"image": [in_base64()]},
        {"image": f"['{in_base64()}']"},
    ]
    assert [find_image(_row(**stored), tmp_path) for stored in forms] == [png()] * len(forms)
    paths = [{"image": {"bytes": None, "path": "a.png"}}, {"image_path": "a.png", "image": None}, {"image": "a.png"}]
    assert [find_image(_row(**stored), tmp_path) for stored in paths] == [tmp_path / "a.png"] * 3
    assert find_image(_row(image=""), tmp_path, default="a.png") == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"image": [in_base64()] * 2}, "2 images"),
        ({"image": "*" * 20}, r"not base64 .* begins with '\*{20}'"),
        ({"image": "[iVBORw0KGgoAAAANSUh"}, "not base64"),
        ({"image": "data:image/png;base64,"}, "its image is empty"),
        ({"image": {"bytes": b"", "path": ""}}, "no image"),
        ({"image": b""}, "not base64"),
    ],
)
def test_images_that_cannot_be_read_are_named(stored, problem, tmp_path):
    with pytest.raises(BadRowError, match=problem):
        find_image(_row(**stored), tmp_path)


def test_rows_of_parquet_share_images_and_are_numbered(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [{"index": 1, "image": in_base64()}, {"index": 7, "image": "1"}, {"index": 1, "image": in_base64("blue")}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second, _ = read_rows([tmp_path / "a.parquet"])
    assert find_image(second, tmp_path) == find_image(first, tmp_path) == png()
    assert (first.stem, second.place) == ("a", f"{tmp_path / 'a.parquet'}, row 2")


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="has no Parquet files, and no questions of MME"):
        read_rows([tmp_path])


def test_questions_about_text_are_left_out(write_tsv):
    """HallusionBench has such questions by design; in other benchmarks, an image is missing."""
    line = {"question": "Q?", "answer": "yes"}
    rows = [{"index": "VD_a_b_1_2_3", **line, "image": in_base64()}, {"index": "VS_a_b_1_0_3", **line}]
    task = load_task("hallusionbench", write_tsv(rows))
    assert (len(task.questions), task.bad_rows, task.left_out) == (1, [], 1)
    with pytest.raises(EvaluationError, match="must name at least one file"):
        load_task("hallusionbench", [])
