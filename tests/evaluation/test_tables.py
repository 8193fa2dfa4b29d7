"""Reading benchmark files in the forms that they are distributed in."""

import base64
import json
import sys

import pytest

from mgllava.evaluation import BadRowError, EvaluationError, load_task
from mgllava.evaluation.tables import Row, find_image, find_video, read_rows

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
    assert row.values == {"index": 1, "image_path": "a.png"}, "MME counts questions by it"


def test_data_urls(write_lines, tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    (row,) = read_rows([write_lines([{"question_id": 1, "image": url}])])
    assert find_image(row, tmp_path) == png()


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_marks_of_editors_at_the_beginning(name, tmp_path):
    separator = {"a.tsv": "\t", "a.csv": ","}.get(name)
    content = f"index{separator}question\n1{separator}Q\n" if separator else '{"index": 1, "question": "Q"}\n'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [row.values for row in read_rows([tmp_path / name])] == [{"index": 1, "question": "Q"}]


def test_json_lines_with_separators_of_unicode_and_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"index": 1, "question": "a\u2028b\x85c"}\r\n\n  \n{"index": 2, "question": "d"}\n')
    assert [row.values["question"] for row in read_rows([path])] == ["a\u2028b\x85c", "d"]


def test_cells_with_quotation_marks_and_many_digits(tmp_path):
    (tmp_path / "a.csv").write_text('index,question,id\n1,"a ""b"", c\nd",' + "9" * 5000 + '\n2,5" pipe,1\n')
    first, second = read_rows([tmp_path / "a.csv"])
    assert first.values == {"index": 1, "question": 'a "b", c\nd', "id": "9" * 5000}
    assert second.values["question"] == '5" pipe'


def test_empty_values_are_absent(tmp_path, write_lines):
    rows = [{"index": 1, "answer": None, "hint": "", "boxes": float("nan")}]
    assert [row.values for row in read_rows([write_lines(rows)])] == [{"index": 1}]


def test_lists_of_one_image_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    image = {"bytes": png(), "path": "a.png"}
    rows = [{"index": 1, "image": [image]}, {"index": 2, "image": [image, image]}, {"index": 3, "image": []}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, *others = read_rows([tmp_path / "a.parquet"])
    assert find_image(first, tmp_path) == png()
    for row, problem in zip(others, ("2 images", "0 images"), strict=True):
        with pytest.raises(BadRowError, match=problem):
            find_image(row, tmp_path)


@pytest.mark.parametrize(("column", "categories"), [(None, ["", ""]), ("category", ["adversarial", "adversarial"])])
def test_ids_that_occur_twice(column, categories, tmp_path, write_lines):
    """Also as number and text, and in two files: boxes and answers are found by them."""
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        {"question_id": key, "image": "a.png", "text": "Q", "answer": "yes", **({column: kind} if column else {})}
        for key, kind in zip((1, "1"), categories, strict=True)
    ]
    task = load_task("pope", write_lines(lines))
    assert [bad.reason for bad in task.bad_rows] == ["its id '1' is that of an earlier row"]
    files = [write_lines([line], f"{name}.jsonl") for line, name in zip(lines, "ab", strict=True)]
    assert len(load_task("pope", files).questions) == 2
    assert len(load_task("exact-match", files).bad_rows) == 1


def test_categories_of_pope_repeat_ids_in_one_file(tmp_path, write_lines):
    (tmp_path / "a.png").write_bytes(png())
    line = {"question_id": "1", "image": "a.png", "question": "Q", "answer": "yes"}
    task = load_task("pope", write_lines([{**line, "category": kind} for kind in ("random", "popular")]))
    assert len(task.questions) == 2 and not task.bad_rows


@pytest.mark.parametrize("change", ["pixels", "boxes", "size of a file", "box key"])
def test_changes_of_a_file_change_its_digest(change, tmp_path, write_tsv):
    (tmp_path / "a.png").write_bytes(png())
    line = {"question": "Q", "A": "x", "answer": "A", "boxes": "[]", "name": "n"}
    rows = [{"index": 1, **line, "image": in_base64()}, {"index": 2, **line, "image_path": "a.png"}]

    def digest(box_key=None):
        return load_task("seed", write_tsv(rows), box_key=box_key).digest

    before = digest()
    assert digest() == before
    if change == "pixels":
        rows[0]["image"] = in_base64("blue")
    elif change == "boxes":
        rows[0]["boxes"] = "[[1, 1, 5, 5]]"
    elif change == "size of a file":
        (tmp_path / "a.png").write_bytes(png(size=(200, 100)))
    assert digest("name" if change == "box key" else None) != before


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"question": ["Q"]}, "its question must be a text or a number, got list"),
        ({"question": True}, "its question must be a text or a number, got bool"),
        ({"question": "half \ud83d"}, "half of a character"),
        ({"options": ["a", None]}, "its option B must be a text or a number, got NoneType"),
        ({"options": ["a", " "]}, "its options B are empty"),
        ({"options": list(range(27))}, "27 options"),
        ({"answer": ["A"]}, "its answer"),
    ],
)
def test_values_of_other_types(values, problem, tmp_path, write_lines):
    (tmp_path / "a.png").write_bytes(png())
    line = {"index": 1, "question": "Q", "options": ["a", "b"], "answer": 0, "image": "a.png"}
    good = {**line, "index": 2}
    task = load_task("multiple-choice", write_lines([{**line, **values}, good]))
    assert [question.key for question in task.questions] == [2]
    assert problem in task.bad_rows[0].reason


def test_answers_of_other_types(tmp_path, write_lines):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"question_id": n, "text": "Q", "image": "a.png", "answer": value} for n, value in enumerate([["a"], "a"])]
    (bad,) = load_task("exact-match", write_lines(rows)).bad_rows
    assert bad.reason == "its answer must be a text or a number, got list"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "x", r"must be a folder or end in \.tsv, \.csv, \.json, \.jsonl, \.parquet, got"),
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2 is not JSON"),
        ("a.json", "[1]", "row 1 must be a dictionary, got int"),
        ("a.json", "[]", "has no rows"),
        ("a.tsv", "index\tquestion\n1\tQ\textra\n", "has 3 cells in row 1, but 2 columns"),
        ("a.parquet", "x", "is not a Parquet file"),
        ("a.tsv", 'index\tquestion\n1\t"Q\n2\tR\n', "line 3 cannot be read"),
        ("a.tsv", 'index\tquestion\n1\t"Q" r\n', "line 2 cannot be read"),
        ("a.tsv", "index\tA\tA\n1\tx\ty\n", "several columns with the name 'A'"),
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


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_other_encodings_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes("index\tquestion\n1\tcafé\n".encode("latin-1"))
    with pytest.raises(EvaluationError, match=rf"{name} is not UTF-8 .* Convert it"):
        read_rows([tmp_path / name])


def test_a_video_may_be_named_with_its_ending_or_without(tmp_path):
    for column in ("video_name", "video", "video_path"):
        for ending in ("", ".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif"):
            path = tmp_path / f"v{ending}"
            path.write_bytes(b"x")
            row = Row({column: "v", "video": ""} if column != "video" else {column: "v"}, "row", "data", dict, {})
            assert find_video(row, tmp_path) == path
            path.unlink()
    with pytest.raises(BadRowError, match=r"its video .*v does not exist"):
        find_video(row, tmp_path)
    (tmp_path / "7.mp4").write_bytes(b"x")
    assert find_video(Row({"video": 7}, "row", "data", dict, {}), tmp_path).name == "7.mp4"
    for value in (None, "", 1.5):
        with pytest.raises(BadRowError, match="it has no video_name or video or video_path"):
            find_video(Row({"video": value}, "row", "data", dict, {}), tmp_path)


@pytest.mark.parametrize("ending", [".jpg", ".png", ".jpeg"])
def test_images_of_mme_have_one_of_three_endings(ending, tmp_path):
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / f"7{ending}").write_bytes(png())
    (tmp_path / "count" / "7.txt").write_text("Is it?\tYes\n\nIs it\tnot?\t No \n")
    first, second = read_rows([tmp_path])
    assert find_image(first, tmp_path).name == f"7{ending}"
    assert [row.values for row in (first, second)] == [
        {
            "index": f"count/7{ending}#{number}",
            "question": question,
            "answer": answer,
            "category": "count",
            "image_path": f"count/7{ending}",
        }
        for number, question, answer in ((1, "Is it?", "Yes"), (2, "Is it\tnot?", "No"))
    ]
    assert (first.place, first.stem) == (f"{tmp_path / 'count' / '7.txt'}, line 1", tmp_path.name)


def test_a_missing_image_of_mme_is_named(tmp_path):
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "7.txt").write_text("Is it?\tYes\n")
    (row,) = read_rows([tmp_path])
    with pytest.raises(BadRowError, match=r"count/7\.jpg does not exist"):
        find_image(row, tmp_path)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "20"], [1, 20]),
        (["0", ""], [0, None]),
        (["01", "2"], ["01", "2"]),
        (["1", "2.5"], ["1", "2.5"]),
        (["9" * 18, "1"], [int("9" * 18), 1]),
        (["9" * 19, "1"], ["9" * 19, "1"]),
        (["NaN", "nan"], [None, None]),
        (["-1", "1"], ["-1", "1"]),
    ],
    ids=range(8),
)
def test_columns_of_whole_numbers_hold_numbers(cells, expected, write_tsv):
    rows = read_rows([write_tsv([{"index": n, "value": cell} for n, cell in enumerate(cells)])])
    assert [row.values.get("value") for row in rows] == expected


def test_short_rows_and_empty_lines(tmp_path):
    (tmp_path / "a.tsv").write_text("index\tquestion\thint\n1\tQ\n\n2\tR\tH\n")
    assert [row.values for row in read_rows([tmp_path / "a.tsv"])] == [
        {"index": 1, "question": "Q"},
        {"index": 2, "question": "R", "hint": "H"},
    ]


def test_short_texts_are_the_index_of_another_row(tmp_path):
    """Fifteen letters are, sixteen are base64."""
    other = Row({}, "row", "data", lambda: {"image": in_base64()}, {})
    table = {"A" * 15: other, "A" * 16: other, "3": other}
    for image in ("A" * 15, 3):
        assert find_image(Row({}, "row", "data", lambda image=image: {"image": image}, table), tmp_path) == png()
    assert find_image(Row({}, "row", "data", lambda: {"image": "A" * 16}, table), tmp_path) == bytes(12)


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("a/b.png", True),
        ("a.jpeg", True),
        ("v1.abcde", True),
        ("averylongname1.abcdef", False),
        ("data:image/png;base64,i.png", False),
    ],
)
def test_paths_have_a_point_near_their_end(name, is_path, tmp_path):
    row = Row({}, "row", "data", lambda: {"image": name}, {})
    with pytest.raises(BadRowError, match=r"its image \S+ does not exist" if is_path else "not base64"):
        find_image(row, tmp_path)


@pytest.mark.parametrize("column", ["image", "img", "decoded_image"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_images_are_in_one_of_several_columns(column, form, tmp_path, write_lines):
    rows = [{"index": 1, column: in_base64()}]
    if form == "jsonl":
        path = write_lines(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        path = tmp_path / "a.parquet"
    (row,) = read_rows([path])
    assert row.values == {"index": 1} and find_image(row, tmp_path) == png()


def test_a_missing_reader_of_parquet_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow .*'\.\[eval\]'"):
        read_rows([tmp_path / "a.parquet"])
