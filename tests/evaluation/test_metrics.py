"""Answer normalization and measures, compared with values computed by hand from the public definitions."""

import pytest

from mgllava.evaluation.metrics import anls, chosen_letters, edit_distance, soft_accuracy, token_f1
from mgllava.evaluation.normalization import normalize_answer, yes_or_no


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("an apple a day", "apple day"),
        ("Three dogs, ten cats", "3 dogs 10 cats"),
        ("none", "0"),
        # `?` and `,` go first, without a space.
        ("yes, really?", "yes really"),
        ("1,000", "1000"),
        # A mark between letters becomes a space, and is removed if it touches a space.
        ("ice-cream", "ice cream"),
        ("ice- cream", "ice cream"),
        ("a/b /c", "ab c"),
        # Points stay in numbers only.
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("end.", "end"),
        ("john's", "john 's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("two\nlines\tand a tab", "2 lines and tab"),
        ('say "hi"', "say hi"),
        # Line breaks and tabs count as spaces next to a mark.
        ("x-y\n-c", "xy c"),
        ("x-y\t-c", "xy c"),
        ("-x y-z ", "x y z"),
        # As in the public code, at most 32 points are removed.
        ("." * 40, "." * 8),
        # The irregular entries of the public table of contractions.
        ("somebody'd", "somebodyd"),
        ("'ows'at", "'ow's'at"),
        ("yall'd've y'alld've y'all'dve", " ".join(["y'all'd've"] * 3)),
        ("yall'll shed've somebody'dve", "y'all'll she'd've somebody'd've"),
    ],
)
def test_normal_form(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "Yes"),
        ("yes.", "Yes"),
        ("No, it is not", "No"),
        ("No,it is", "No"),
        ("yes or no", "Unknown"),
        ("nothing", "Unknown"),
        ("", "Unknown"),
        ("Yes!No", "Unknown"),
        # A comma in a number joins what all marks separate.
        ("yes-1,000", "Unknown"),
        ("yes-1000", "Yes"),
    ],
)
def test_yes_or_no(text, expected):
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_answers(agreeing, accuracy):
    """The known values of leave-one-out with ten answers."""
    humans = ["The cat"] * agreeing + ["dog", "bird", "fish", "cow", "pig", "hen", "ant", "bee", "owl", "fox"]
    assert soft_accuracy("cat.", humans[:10]) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("left", "right", "distance"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(left, right, distance):
    assert edit_distance(left, right) == edit_distance(right, left) == distance


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [
        ("Total", ["total"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "kittens"], 1 - 1 / 7),
        # Exactly half is kept, less is not.
        ("ab", ["ax"], 0.5),
        ("abc", ["axx"], 0),
        ("", [""], 1),
        # Spaces count for the length only.
        (" a  b", ["a b"], 1),
    ],
)
def test_anls(answer, references, value):
    assert anls(answer, references) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("The red cat.", "red cat", 1),
        ("a cat and a dog", "cat", 2 * 1 / (3 + 1)),
        ("cat cat", "cat dog dog", 2 * 1 / (2 + 3)),
        ("dog", "cat", 0),
        ("two men", "2 men", 1),
        ("the", "a", 1),
        ("", "cat", 0),
    ],
)
def test_f1_of_words(answer, reference, value):
    assert token_f1(answer, reference) == token_f1(reference, answer) == pytest.approx(value)


@pytest.mark.parametrize(("text", "letters"), [("B", "B"), ("(C)", "C"), ("AB", "AB"), ("e", ""), ("The Cat", "C")])
def test_letters_of_a_choice(text, letters):
    assert chosen_letters(text) == letters
