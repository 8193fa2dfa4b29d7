"""Scores of made-up answers, with values computed by hand from the definitions of the benchmarks."""

import pytest

from mgllava.evaluation.questions import Question
from mgllava.evaluation.scores import (
    score_choices,
    score_documents,
    score_exactly,
    score_gqa,
    score_hallusion,
    score_mme,
    score_pope,
    score_softly,
    score_videos,
)
from mgllava.evaluation.tables import Row


def ask(*lines):
    """Make questions of (key, answer, category, other columns)."""
    return [
        Question(number, key, key, "Q", answer, category, Row(values, "row", "data", dict, {}))
        for number, (key, answer, category, *rest) in enumerate(lines)
        for values in [rest[0] if rest else {}]
    ]


def test_rotations_of_a_question_count_as_one():
    questions = ask(
        *((key, "A", "x") for key in (1, 1_000_001, 2_000_001)),
        *((key, "B", "y") for key in (2, 1_000_002)),
        (3, "C", "y"),
        # Its question is not there, so that it does not count.
        (1_000_009, "D", "y"),
    )
    scores = score_choices(questions, ["A", "A.", "(A)", "B", "C", "Cats", "D"])
    # Of 1, 2 and 3, the second has a wrong rotation.
    assert scores.main == "accuracy" and scores.values["accuracy"] == pytest.approx(100 * 2 / 3)
    assert scores.categories == pytest.approx({"x": 100, "y": 50})
    assert scores.values["accuracy of single questions"] == pytest.approx(100 * 6 / 7)
    assert scores.credits == [1, 1, 1, 1, 0, 1, 1]
    assert "CircularEval" in scores.notes[0]


def test_letters_beyond_d_are_wrong_and_said():
    scores = score_choices(ask((1, "E", ""), (2, "A", "")), ["E", "A"])
    assert scores.values["accuracy"] == 50 and scores.notes[0].startswith(
        "1 questions have another answer than A to D"
    )


def test_splits_and_groups_of_categories():
    rows = ((1, "A", "x", "dev", "L"), (2, "A", "y", "test", "L"), (3, "A", "y", "test", "M"))
    questions = ask(
        *((key, answer, cat, {"split": split, "l2-category": two}) for key, answer, cat, split, two in rows)
    )
    scores = score_choices(questions, ["A", "B", "A"])
    assert scores.values == pytest.approx(
        {
            "accuracy": 200 / 3,
            "accuracy, split dev": 100,
            "accuracy, split test": 50,
            "accuracy, L": 50,
            "accuracy, M": 100,
        }
    )


def test_pope_is_the_mean_over_its_files():
    """Two of three said yes are right, two of four wanted are found; the other file is all right."""
    first = [("Yes", "yes"), ("Yes", "Yes."), ("No", "yes"), ("Yes", "no"), ("Yes", "I think"), ("No", "No")]
    questions = ask(
        *((number, wanted, "popular") for number, (wanted, _) in enumerate(first)),
        (6, "Yes", "random"),
        (7, "No", "random"),
    )
    scores = score_pope(questions, [*(said for _, said in first), "yes", "no"])
    f1 = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert scores.categories == pytest.approx({"popular": 100 * f1, "random": 100})
    expected = {
        "F1": (f1 + 1) / 2,
        "precision": 5 / 6,
        "recall": 3 / 4,
        "accuracy": (3 / 6 + 1) / 2,
        "share of yes": 0.5,
    }
    assert {name: scores.values[name] for name in expected} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )
    assert scores.main == "F1" and sum(scores.credits) == 5


def test_pope_without_any_yes():
    assert score_pope(ask((1, "No", "a")), ["no"]).values["F1"] == 0


def test_mme_adds_accuracy_of_questions_and_of_images():
    rows = [
        ("count", "a"),
        ("count", "a"),
        ("count", "b"),
        ("count", "b"),
        ("code_reasoning", "c"),
        ("code_reasoning", "c"),
    ]
    questions = ask(*((n, "Yes", category, {"image_path": image}) for n, (category, image) in enumerate(rows)))
    scores = score_mme(questions, ["yes", "yes", "yes", "no", "Yes", "Yes"])
    # count: three of four questions, one of two images.
    assert scores.values["perception"] == pytest.approx(75 + 50)
    assert scores.values["cognition"] == pytest.approx(200) and scores.values["total"] == pytest.approx(325)
    assert scores.categories == pytest.approx({"count": 125, "code_reasoning": 200})
    assert "perception is the sum without OCR, artwork" in scores.notes[0]


def test_perfect_answers_get_all_points_of_mme():
    """The paper of MME names ten tasks of perception and four of cognition, with 200 points each."""
    perception = [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ]
    cognition = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    questions = ask(*((n, "Yes", name, {"image_path": "a"}) for n, name in enumerate([*perception, *cognition] * 2)))
    scores = score_mme(questions, ["yes"] * 28)
    assert (scores.main, scores.notes) == ("perception", [])
    assert scores.values == {"perception": 2000, "cognition": 800, "total": 2800, "accuracy": 100}


def test_hallusionbench_counts_figures_and_questions():
    keys = ["VD_a_b_0_0_0", "VD_a_b_0_0_1", "VD_a_b_0_1_0", "VD_a_b_0_1_1"]
    scores = score_hallusion(
        ask(*((key, "Yes", "VD", {"l2-category": "a"}) for key in keys)), ["yes", "yes", "yes", "no"]
    )
    # Figure 0 is right in both questions; question 0 is right for both figures.
    assert scores.values == pytest.approx({"aAcc": 75, "fAcc": 50, "qAcc": 50})
    assert scores.main == "aAcc" and scores.categories == {"VD": 75}


def test_figures_and_questions_of_hallusionbench_are_those_of_their_set_and_group():
    """Equal numbers in another set, or in another group of categories, are other figures and questions."""
    keys = [("VD_a_b_0_0_0", "a"), ("VD_a_b_1_0_0", "a"), ("VD_c_b_0_0_0", "c"), ("VD_c_b_0_1_1", "c")]
    questions = ask(*((key, "Yes", "VD", {"l2-category": group}) for key, group in keys))
    scores = score_hallusion(questions, ["yes", "no", "yes", "yes"])
    assert scores.values == pytest.approx({"aAcc": 75, "fAcc": 75, "qAcc": 75})


def test_questions_about_videos_have_exact_matches_and_the_f1_of_words():
    scores = score_videos(ask((1, "two cats", "x"), (2, "dog", "x")), ["The 2 cats.", "a dog runs"])
    assert (scores.main, scores.values) == ("exact match", pytest.approx({"exact match": 50, "token F1": 250 / 3}))
    assert scores.credits == [1, 0] and scores.categories == {"x": 50} and "GPT-3.5" in scores.notes[0]


@pytest.mark.parametrize(
    ("wanted", "said", "expected"),
    [("No", "yes", {"precision": 0, "recall": 0, "F1": 0}), ("Yes", "no", {"precision": 0, "recall": 0, "F1": 0})],
)
def test_measures_of_pope_without_a_denominator_are_zero(wanted, said, expected):
    values = score_pope(ask((0, wanted, "popular")), [said]).values
    assert {name: values[name] for name in expected} == expected


def test_pope_names_its_files_if_rows_have_no_category():
    questions = [
        Question(number, number, number, "Q", answer, "", Row({}, "row", stem, dict, {}))
        for number, (stem, answer) in enumerate([("random", "Yes"), ("popular", "Yes"), ("popular", "No")])
    ]
    scores = score_pope(questions, ["yes", "no", "no"])
    assert scores.categories == {"popular": 0, "random": 100}
    assert scores.values["accuracy, popular"] == 50 and scores.values["share of yes, random"] == 100
    assert len(score_pope(questions[1:], ["no", "no"]).values) == 5


def test_rows_without_a_split_have_their_own_score():
    scores = score_exactly(ask((1, "a", ""), (2, "b", "", {"split": "dev"})), ["a", "a"])
    assert scores.values == {"accuracy": 50, "accuracy, split (none)": 100, "accuracy, split dev": 0}
    assert score_exactly(ask((1, "a", "", {"split": "dev"})), ["a"]).values == {"accuracy": 100}


def test_gqa_compares_lower_case_without_points_at_the_end():
    scores = score_gqa(ask((1, "cat", ""), (2, "cat", ""), (3, "cat", "")), ["Cat.", "the cat", "cat "])
    assert scores.values["accuracy"] == pytest.approx(100 / 3)
    assert (scores.main, scores.categories) == ("accuracy", {}), "questions without a category have no row"


def test_exact_match_ignores_case_and_surrounding_spaces():
    assert score_exactly(ask((1, "Top Left", "x"), (2, "E", "y")), [" top left", "F"]).categories == {"x": 100, "y": 0}


def test_soft_accuracy_and_anls_are_means():
    humans = tuple(["cat"] * 2 + ["dog"] * 8)
    scores = score_softly(ask((1, humans, ""), (2, humans, "")), ["Cat", "a dog"])
    assert scores.values["accuracy"] == pytest.approx(100 * (0.6 + 1) / 2)
    assert score_documents(ask((1, ("sitting",), "")), ["kitten"]).values["ANLS"] == pytest.approx(100 * 4 / 7)
    assert scores.main == "accuracy" and score_documents(ask((1, ("a",), "")), ["a"]).main == "ANLS"


def test_rotations_alone_give_no_score():
    scores = score_choices(ask((1_000_001, "A", ""), (2_000_001, "A", "")), ["A", "B"])
    assert (scores.main, scores.values) == ("accuracy", {"accuracy": 0}) and "No question has" in scores.notes[0]
    assert scores.credits == [1, 0]


def test_images_of_mme_without_a_pair_are_said():
    questions = ask(*((n, "Yes", "count", {"image_path": image}) for n, image in enumerate(["a", "b", "b"])))
    scores = score_mme(questions, ["yes", "yes", "yes"])
    # The single question counts, but there is no pair for its image.
    assert scores.categories == {"count": 200} and scores.values["accuracy"] == 100
    assert "count: 1 images do not have two questions" in scores.notes[0]
    assert "cognition is the sum without code_reasoning" in scores.notes[2]
    assert score_mme(questions[:1], ["no"]).categories == {"count": 0}
