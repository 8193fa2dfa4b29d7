"""Answers to questions, compared with answers that are derived from the text of the question."""

import re
from collections import Counter

import pytest

from small_world.questions import KINDS, ask, describe
from small_world.scenes import Scene, SceneObject, make_scene

SCENES = [make_scene("train", number) for number in range(300)]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def singular(name):
    return {"crosses": "cross"}.get(name, name.removesuffix("s"))


def matching(scene, words):
    """Return the objects that match all words, each a color, a shape, or `object`."""
    return [item for item in scene.objects if all(word in (item.color, item.shape, "object") for word in words)]


def only(scene, name):
    [item] = matching(scene, name.split())
    return item


def expected(scene, question):
    """Return the answer, derived from the text of the question."""
    text = question.text
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", text):
        return "yes" if matching(scene, match.groups()) else "no"
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return only(scene, match[1]).color
    if match := re.fullmatch(r"What shape is the (\w+) object\?", text):
        return only(scene, match[1]).shape
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        return NUMBERS[len(matching(scene, [singular(word) for word in match[1].split()]))]
    if match := re.fullmatch(r"Where is the (.+)\?", text):
        x, y = only(scene, match[1]).center
        column = ("left", "", "right")[int(3 * x / scene.width)]
        row = ("top", "", "bottom")[int(3 * y / scene.height)]
        return f"{row} {column}".strip() or "center"
    if match := re.fullmatch(r"Is the (.+) (left or right of|above or below) the (.+)\?", text):
        (ax, ay), (bx, by) = only(scene, match[1]).center, only(scene, match[3]).center
        return ("left" if ax < bx else "right") if match[2].startswith("left") else ("above" if ay < by else "below")
    if match := re.fullmatch(r"What (letter|digit) is on the (.+)\?", text):
        character = only(scene, match[2]).character
        assert character.isdigit() == (match[1] == "digit")
        return character
    raise AssertionError(text)


def test_every_answer_is_right():
    for scene in SCENES:
        for question in ask(scene):
            assert question.answer == expected(scene, question), (scene, question)


def test_no_question_is_asked_twice_about_a_picture():
    for scene in SCENES:
        texts = [question.text for question in ask(scene)]
        assert len(texts) == len(set(texts))


def test_a_limit_keeps_all_kinds():
    counts = Counter(question.kind for scene in SCENES for question in ask(scene, 10))
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 0.5 * max(counts.values())


def test_existence_questions_have_both_answers_equally_often():
    answers = Counter(
        question.answer for scene in SCENES for question in ask(scene, 10) if question.kind == "existence"
    )
    assert answers["yes"] == pytest.approx(answers["no"], rel=0.1)


def test_questions_are_the_same_for_the_same_scene():
    assert ask(SCENES[3]) == ask(make_scene("train", 3))


def test_caption_names_the_objects_row_by_row():
    objects = (
        SceneObject("star", "orange", "plain", (150, 50), 40, 0, "K"),
        SceneObject("ring", "red", "striped", (30, 50), 40, 0),
        SceneObject("circle", "blue", "plain", (90, 51), 40, 0, "7"),
        SceneObject("moon", "pink", "dotted", (180, 20), 30, 0),
    )
    assert describe(Scene("caption", 200, 100, objects)) == (
        "a dotted pink moon, a striped red ring, a blue circle with the digit 7, an orange star with the letter K"
    )
