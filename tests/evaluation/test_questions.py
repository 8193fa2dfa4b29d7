"""Prompts of the benchmarks, word by word as in the original, and rows that cannot be asked."""

import json

import pytest

from mgllava.evaluation import BENCHMARKS, BadRowError, EvaluationError, load_task
from mgllava.evaluation.benchmarks import find_benchmark
from mgllava.evaluation.paper import REPORTED, reported
from mgllava.evaluation.questions import question_in_prompt, read_annotations
from mgllava.evaluation.tables import Row
from mgllava.evaluation.task import BadRow, describe

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
PROMPTS = [
    ("mmbench-dev", {"question": "Q?", "A": "x", "B": "y"}, f"Q?\nA. x\nB. y\n{LETTER}"),
    ("seed", {"question": "Q?", "hint": "H", "A": "x", "C": "z"}, f"H\nQ?\nA. x\nC. z\n{LETTER}"),
    ("mmbench-dev-cn", {"question": "这是什么?", "A": "x"}, "这是什么?\nA. x\n请直接回答选项字母。"),
    ("mmstar", {"question": "Q?", "A": "图"}, "Q?\nA. 图\n请直接回答选项字母。"),
    ("scienceqa", {"question": "Q?", "choices": ["x", "y"], "hint": ""}, f"Q?\nA. x\nB. y\n{LETTER}"),
    ("textvqa", {"text": "Q?\nReference OCR token: a, b" + SHORT}, "Q?\nReference OCR token: a, b" + SHORT),
    ("textvqa", {"question": "Q?", "ocr_tokens": ["a", "b"]}, "Q?\nReference OCR token: a, b" + SHORT),
    ("docvqa", {"question": "Q?"}, "Q?" + SHORT),
    ("pope", {"text": "Q?"}, "Q?\nPlease answer the question with yes or no."),
    ("hallusionbench", {"index": "VD_a_b_1_2_3", "question": "Q?"}, "Q?\nPlease answer the question with yes or no."),
    (
        "mme",
        {"question": "Q? Please answer yes or no."},
        "Q? Please answer the question only a single word yes or no.",
    ),
    ("gqa", {"text": "Q?" + SHORT}, "Q?" + SHORT),
    ("vqav2", {"question": "Q?"}, "Q?" + SHORT),
    ("llava-wild", {"text": "Q?"}, "Q?"),
    ("mmvet", {"text": "Q?"}, "Q?"),
    (
        "mathvista",
        {"question": "Q?", "question_type": "multi_choice", "answer_type": "text", "choices": ["1", "2"], "unit": "m"},
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Q? (Unit: m)\nChoices:\n(A) 1\n(B) 2",
    ),
    (
        "mathvista",
        {"question": "Q?", "question_type": "free_form", "answer_type": "float", "precision": 2.0},
        "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the "
        "final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: Q?",
    ),
    (
        "mathvista",
        {"question": "Q?", "question_type": "free_form", "answer_type": "float", "precision": 1, "choices": "[]"},
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: Q?",
    ),
    (
        "mathvista",
        {"question": "Q?", "question_type": "free_form", "answer_type": "integer"},
        "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
        "the end.\nQuestion: Q?",
    ),
    (
        "mathvista",
        {"question": "Q?", "question_type": "free_form", "answer_type": "list"},
        "Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
        "[1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: Q?",
    ),
    ("mmvp", {"Question": "Q?", "Options": "(a) x (b) y"}, "Q? (a) x (b) y"),
    ("mmvp", {"question": "Q?", "options": "(a) x (b) y"}, "Q? (a) x (b) y"),
    ("video-qa", {"question": "Q?"}, "Q?"),
    ("exact-match", {"text": "T?", "question": "Q?"}, "T?"),
    ("multiple-choice", {"question": "Q?", "options": "['x', 'y']"}, f"Q?\nA. x\nB. y\n{LETTER}"),
]


def row(values):
    return Row(values, "row", "data", dict, {})


@pytest.mark.parametrize(("name", "values", "prompt"), PROMPTS)
def test_prompt(name, values, prompt):
    assert BENCHMARKS[name].prompt(row(values)) == prompt


def test_box_limits_are_those_of_the_original():
    unlimited = {name for name, benchmark in BENCHMARKS.items() if benchmark.box_limit is None}
    of_videos = {"msvd-qa", "msrvtt-qa", "video-qa"}
    assert unlimited == {"vqav2", "llava-wild", "mmvet", "mathvista", "mmvp", *of_videos}
    assert {benchmark.box_limit for benchmark in BENCHMARKS.values()} == {100, None}


def test_open_questions_of_mmmu_become_choices(write_tsv):
    from .conftest import in_base64

    rows = [{"index": 1, "question": "Q?", "answer": "24", "image": in_base64()}]
    (question,) = load_task("mmmu", write_tsv(rows, "MMMU_DEV_VAL.tsv")).questions
    assert question.prompt == f"Q?\nA. 24\nB. Other Answers\n{LETTER}" and question.answer == "24"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What is it?\nReference OCR token: A\nAnswer.", "what is it?"),
        ("Reference OCR token: A\nWhat is it?\nAnswer.", "what is it?"),
        ("What is it?\nAnswer.", "what is it?"),
        ("OCR tokens: A. Question: What is it? Short answer:", "what is it?"),
    ],
)
def test_question_in_a_prompt_of_textvqa(prompt, question):
    assert question_in_prompt(prompt) == question


def test_answers_of_textvqa_come_from_its_annotations(tmp_path, write_lines):
    from .conftest import png

    (tmp_path / "a.png").write_bytes(png())
    data = write_lines([{"question_id": "a", "image": "a.png", "text": "What?\nAnswer."}])
    annotations = tmp_path / "val.json"
    entry = {"image_id": "a", "question": "what?", "answers": ["x"] * 10}
    annotations.write_text(json.dumps({"data": [entry]}))
    (question,) = load_task("textvqa", data, annotations=annotations).questions
    assert question.answer == ("x",) * 10
    annotations.write_text(json.dumps({"data": [{**entry, "question": "Who?"}]}))
    with pytest.raises(EvaluationError, match=r"the annotations have no answer for \('a', 'what\?'\)"):
        load_task("textvqa", data, annotations=annotations)


def test_annotations_of_vqav2_and_gqa(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"annotations": [{"question_id": 7, "answers": [{"answer": "x"}]}]}))
    assert read_annotations(path) == {"7": [{"answer": "x"}]}
    path.write_text(json.dumps({"7": {"answer": "x", "isBalanced": True}, "8": {"answer": "y", "isBalanced": False}}))
    assert read_annotations(path) == {"7": "x"}
    path.write_text(json.dumps({"7": {"answer": "x"}}))
    assert read_annotations(path) == {"7": "x"}
    path.write_text(json.dumps(["x", {"answer": "y"}, {"answer": "z", "question_id": 1}]))
    assert read_annotations(path) == ["x", "y", "z"]
    path.write_text("[]")
    with pytest.raises(EvaluationError, match="`annotations`"):
        read_annotations(path)


BAD = [
    ("multiple-choice", {"question": "Q?", "answer": "A"}, "its options are empty"),
    ("multiple-choice", {"question": "Q?", "A": "x", "B": "y", "answer": "C"}, "'C' is not one of its options A, B"),
    ("multiple-choice", {"A": "x", "answer": "A"}, "it has no question"),
    ("pope", {"question": "Q?", "answer": "maybe"}, "must be yes or no, got 'maybe'"),
    ("docvqa", {"question": "Q?", "answer": "[]"}, "its list of answers is empty"),
    ("textvqa", {"question": "Q?", "answers": '["a", "b"]'}, "it has 2 human answers"),
    ("mathvista", {"question": "Q?", "question_type": "free_form", "answer_type": "text"}, "asks? for 'text'"),
    ("hallusionbench", {"question": "Q?", "answer": "yes"}, "its index must end in"),
]


@pytest.mark.parametrize(("name", "values", "reason"), BAD)
def test_bad_rows_are_named(name, values, reason, write_tsv):
    from .conftest import in_base64

    good = {"index": 1, "pid": 1, "image": in_base64()}
    fine = {
        "multiple-choice": {"question": "Q?", "A": "x", "answer": "A"},
        "pope": {"question": "Q?", "answer": "Yes"},
        "docvqa": {"question": "Q?", "answer": "['x']"},
        "textvqa": {"question": "Q?", "answers": json.dumps(["x"] * 10)},
        "mathvista": {"question": "Q?", "question_type": "free_form", "answer_type": "integer"},
        "hallusionbench": {"index": "VD_a_b_1_2_3", "question": "Q?", "answer": "no"},
    }[name]
    data = write_tsv([{**good, **fine}, {**good, "index": 2, "pid": 2, **values}])
    task = load_task(name, data)
    assert len(task.questions) == 1
    (bad,) = task.bad_rows
    assert bad.place == f"{data}, row 2"
    import re

    assert re.search(reason, bad.reason)


@pytest.mark.parametrize("key", [True, 1.5, [1]])
def test_ids_are_texts_or_whole_numbers(key, tmp_path, write_lines):
    from .conftest import png

    (tmp_path / "a.png").write_bytes(png())
    line = {"image": "a.png", "text": "Q", "answer": "A"}
    task = load_task("exact-match", write_lines([{"question_id": key, **line}, {"question_id": "1", **line}]))
    assert len(task.questions) == 1 and "as text or a whole number, got" in task.bad_rows[0].reason


def test_an_id_that_occurs_twice_is_named(write_tsv):
    from .conftest import in_base64

    line = {"index": 1, "question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    task = load_task("seed", write_tsv([line, line]))
    assert [bad.reason for bad in task.bad_rows] == ["its id 1 is that of an earlier row"]


@pytest.mark.parametrize("column", ["category", "type", "kind"])
def test_categories_are_in_one_of_three_columns(column, write_tsv):
    from .conftest import in_base64

    line = {"index": 1, "question": "Q?", "A": "x", "answer": "A", "image": in_base64()}
    (question,) = load_task("seed", write_tsv([{**line, "kind": "k", column: "c"}])).questions
    assert question.category == "c"
    assert load_task("seed", write_tsv([line])).questions[0].category == ""


def test_answers_of_textvqa_are_found_by_the_id_of_the_image(tmp_path, write_lines):
    from .conftest import png

    (tmp_path / "a.png").write_bytes(png())
    data = write_lines([{"question_id": 5, "image_id": "i", "image": "a.png", "text": "What?\nAnswer."}])
    annotations = tmp_path / "val.json"
    entry = {"image_id": "i", "question": "What?", "answers": ["x"] * 10}
    annotations.write_text(json.dumps({"data": [entry]}))
    (question,) = load_task("textvqa", data, annotations=annotations).questions
    assert question.answer == ("x",) * 10 and question.key == 5


def test_answers_of_gqa_come_from_its_annotations(tmp_path, write_lines):
    from .conftest import png

    (tmp_path / "a.png").write_bytes(png())
    data = write_lines([{"question_id": 5, "image": "a.png", "text": "What?"}])
    (tmp_path / "a.json").write_text(json.dumps({"5": {"answer": "cat"}}))
    (question,) = load_task("gqa", data, annotations=tmp_path / "a.json").questions
    assert question.answer == "cat"


def test_a_few_bad_rows_are_named_and_the_others_counted():
    rows = [BadRow("a.tsv, row 1", 1, "it is bad")] * 7
    assert describe(rows[:1]) == "a.tsv, row 1: it is bad."
    assert describe(rows[:5]).count("row 1") == 5 and describe(rows[:5]).endswith("it is bad.")
    assert describe(rows).count("row 1") == 5 and describe(rows).endswith("it is bad; and 2 more.")


def test_some_rows_without_an_answer_are_named(write_tsv):
    from .conftest import in_base64

    line = {"question": "Q?", "A": "x", "image": in_base64()}
    data = write_tsv([{"index": 1, **line, "answer": "A"}, {"index": 2, **line}])
    assert [bad.key for bad in load_task("seed", data).bad_rows] == [2]


def test_no_good_row_is_an_error(write_tsv):
    with pytest.raises(EvaluationError, match=r"no row of .* can be asked.*row 1: its options are empty"):
        load_task("seed", write_tsv([{"index": 1, "question": "Q?", "image": "x" * 20}]))


def test_unknown_benchmark():
    with pytest.raises(EvaluationError, match="`benchmark` must be one of mmbench-dev"):
        load_task("mmbench", "x.tsv")


@pytest.mark.parametrize("prompt", ["What?", "a\nb\nc", "OCR tokens: A. Question: What?", "a\nb\nc\nd"])
def test_prompts_of_other_forms_than_those_of_textvqa(prompt):
    with pytest.raises(BadRowError, match="none of the forms of TextVQA"):
        question_in_prompt(prompt)


def test_answers_by_the_index_of_a_choice():
    answer = BENCHMARKS["scienceqa"].answer
    assert [answer(row({"choices": ["x", "y"], "answer": number})) for number in (0, 1)] == ["A", "B"]
    assert answer(row({"choices": ["x", "y"]})) is None
    for given in (2, -1, True):
        with pytest.raises(BadRowError, match="is not one of its options A, B"):
            answer(row({"choices": ["x", "y"], "answer": given}))
    # With columns of options, a number is no index.
    with pytest.raises(BadRowError, match="'1' is not one of its options A, B"):
        answer(row({"A": "x", "B": "y", "answer": 1}))


def test_rows_may_have_no_answers():
    for name in ("mmbench-dev", "textvqa", "docvqa", "pope", "gqa", "llava-wild", "mmvet", "mathvista"):
        assert BENCHMARKS[name].answer(row({"question": "Q?"})) is None


def test_answers_in_lists():
    assert BENCHMARKS["docvqa"].answer(row({"answer": "x"})) == ("x",)
    assert BENCHMARKS["docvqa"].answer(row({"answers": ["x", "y"], "answer": "z"})) == ("x", "y")
    assert BENCHMARKS["vqav2"].answer(row({"answers": [{"answer": "x"}] * 10})) == ("x",) * 10
    assert BENCHMARKS["mmvp"].answer(row({"Correct Answer": " (a) "})) == "(a)"
    assert BENCHMARKS["pope"].answer(row({"label": "no"})) == "No"


def test_ids_are_those_of_the_benchmarks_files():
    """The first column of a row that can be the id of box files and uploads, the original's first."""
    usual, questions = ("index", "question_id", "id"), ("question_id", "index", "id", "questionId")
    columns = {
        "textvqa": ("question_id", "image_id", "index", "id"),
        "docvqa": ("index", "questionId", "question_id", "id"),
        "hallusionbench": ("index",),
        "mathvista": ("pid", "index", "id"),
        "mmvp": (),
        **dict.fromkeys(("pope", "gqa", "vqav2", "llava-wild", "mmvet", "exact-match"), questions),
        **dict.fromkeys(("msvd-qa", "msrvtt-qa", "video-qa"), questions),
    }
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.keys == columns.get(name, usual), name


def test_titles_begin_with_the_names():
    for name, benchmark in BENCHMARKS.items():
        title = benchmark.title.lower().replace("-", "")
        assert title.startswith(name.partition("-")[0]) or name == "video-qa", name


def test_numbers_of_the_paper():
    """Tables 1 and 2 of arXiv 2406.17770."""
    columns = [
        "MMB-D",
        "MMB-T",
        "SEED-I",
        "MMStar",
        "TextVQA",
        "DocVQA",
        "SQA-I",
        "AI2D",
        "VQAv2",
        "MMVet",
        "LLaVA-W",
        "MMVP",
    ]
    rows = {
        "Phi3-3.8B": "73.4 72.9 70.2 35.5 65.3 49.3 73.9 75.1 77.9 47.3 75.4",
        "Vicuna-7B": "72.1 71.9 69.4 35.1 67.3 47.9 70.8 69.3 80.2 41.0 75.5 47.3",
        "Llama3-8B": "76.5 76.6 71.5 36.9 68.1 49.0 76.3 75.6 80.7 46.9 75.5",
        "Vicuna-13B": "72.2 73.5 70.8 34.1 69.6 52.1 74.7 73.4 81.2 46.7 82.0",
        "Yi1.5-34B": "80.1 79.1 73.7 47.9 70.0 56.1 77.0 81.1 82.0 48.4 80.5 50.0",
    }
    table = {model: dict(zip(columns, map(float, row.split()), strict=False)) for model, row in rows.items()}
    assert table == REPORTED and list(table["Vicuna-7B"]) == columns
    assert reported("MMVP") == {"Vicuna-7B": 47.3, "Yi1.5-34B": 50.0} and reported(None) == reported("x") == {}


def test_papers_names_are_those_of_its_tables():
    named = {benchmark.paper for benchmark in BENCHMARKS.values()} - {None}
    assert named == {name for scores in REPORTED.values() for name in scores}
    assert all(benchmark.upload_for for benchmark in BENCHMARKS.values() if benchmark.score is None)


@pytest.mark.parametrize("content", ['{"data": [{}]}', '{"annotations": [5]}', '{"7": {}}', '{"7": 5}', "{"])
def test_annotations_of_another_form_are_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(EvaluationError, match="is not a file of TextVQA, VQAv2 or GQA"):
        read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["MMBench-Dev_CN", "mmbench_dev_cn", "mmbench-dev-cn"])
def test_names_in_other_spellings(name):
    assert find_benchmark(name) is BENCHMARKS["mmbench-dev-cn"]
