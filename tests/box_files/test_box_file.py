import numpy as np
import pytest

from mgllava.box_files import BoxFile, BoxFileError, MissingBoxesError, settings_digest
from mgllava.box_files.box_file import shorten

EMPTY = {"boxes": [], "labels": [], "scores": []}
SETTINGS = {
    "detector": {"detector": "owl", "mode": "faithful", "tagger": ["a", "b"]},
    "labels": None,
    "threshold": 0.2,
}


def record(number):
    return {"boxes": [[0, 0, number, number]], "labels": ["cup"], "scores": [0.5]}


def test_ids_are_looked_up_as_they_are_and_as_text():
    file = BoxFile([1, "2", "x"], [record(1), record(2), record(3)])
    assert file[1] == file["1"] == file[np.int64(1)] == record(1)
    assert file["2"] == file[2] == record(2)
    assert "2" in file and 2 in file and "3" not in file
    assert list(file) == [1, "2", "x"] and len(file) == 3


def test_id_of_the_same_type_is_preferred():
    file = BoxFile([1, "1"], [record(1), record(2)])
    assert file[1] == record(1) and file["1"] == record(2)
    assert file.duplicates == {}


def test_last_of_several_records_is_used_and_they_are_counted():
    file = BoxFile(["a", "b", "a", "a"], [record(1), record(2), record(3), record(4)])
    assert file["a"] == record(4)
    assert file.duplicates == {"a": 3}


def test_missing_id_is_named():
    file = BoxFile(["a"], [record(1)], name="boxes.json")
    with pytest.raises(MissingBoxesError, match=r"^boxes\.json has no boxes for id 'b'; it holds 1 ids, such as 'a'"):
        file["b"]
    # As in other mappings.
    assert file.get("b") is None
    assert isinstance(MissingBoxesError("x"), KeyError)


def test_missing_id_may_return_an_empty_record():
    file = BoxFile(["a"], [record(1)], missing="empty")
    assert file["b"] == EMPTY and file["a"] == record(1)
    assert "b" not in file
    with pytest.raises(ValueError, match="`missing` must be 'error' or 'empty', got 'zero'"):
        BoxFile([], [], missing="zero")


def test_digest_ignores_the_order_of_keys_only():
    reordered = dict(reversed(SETTINGS.items()))
    assert settings_digest(SETTINGS) == settings_digest(reordered)
    assert settings_digest(SETTINGS) != settings_digest({**SETTINGS, "threshold": 0.21})


def test_boxes_of_other_settings_are_refused_unless_allowed():
    file = BoxFile([], [], settings=SETTINGS)
    file.check_settings({**SETTINGS})
    other = {**SETTINGS, "detector": {**SETTINGS["detector"], "mode": "clean"}, "threshold": 0.3}
    with pytest.raises(
        BoxFileError, match=r'detector\.mode is "faithful", expected "clean"; threshold is 0\.2, expec'
    ):
        file.check_settings(other)
    file.check_settings(other, allow_other=True)


def test_long_values_are_shortened_in_messages():
    for text in ("", "a" * 80):
        assert shorten(text) == text
    assert shorten("a" * 81) == "a" * 77 + "..."


def test_a_few_of_many_differences_are_named():
    found, expected = ({f"option_{number}": [value, number] for number in range(7)} for value in "ab")
    with pytest.raises(BoxFileError) as caught:
        BoxFile([], [], settings=found).check_settings(expected)
    assert "option_4 is" in str(caught.value) and "option_5" not in str(caught.value)
    assert "; and 2 more. " in str(caught.value)
    with pytest.raises(BoxFileError, match=r"a is \{\}, expected \(absent\); a\.b is \(absent\), expected 1\. Make"):
        BoxFile([], [], settings={"a": {}}).check_settings({"a": {"b": 1}})


def test_boxes_of_unknown_settings_are_refused_unless_allowed():
    file = BoxFile([], [])
    assert file.digest is None
    with pytest.raises(BoxFileError, match="was made with are unknown"):
        file.check_settings(SETTINGS)
    file.check_settings(SETTINGS, allow_other=True)


@pytest.mark.parametrize(
    ("made", "expected", "fits"),
    [("a", "a", True), ("a", "b", False), (None, "b", True), ("a", None, True)],
)
@pytest.mark.parametrize("part", ["detector", "tagger"])
def test_revisions_of_the_detector_are_compared_if_both_are_known(part, made, expected, fits):
    made, expected = (
        {"detector": {"detector": "org/name", **({f"{part}_revision": revision} if revision else {})}}
        for revision in (made, expected)
    )
    boxes = BoxFile([1], [record(1)], settings=made)
    if fits:
        boxes.check_settings(expected)
    else:
        with pytest.raises(BoxFileError, match=rf"{part}_revision is .a., expected .b."):
            boxes.check_settings(expected)
