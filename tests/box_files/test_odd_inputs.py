"""Unusual names, ids and records: none of them ends a job, and all damaged ones are reported."""

import json
import logging
import math
import os
import shutil

import pytest
from PIL import Image, JpegImagePlugin

from mgllava.box_files import BoxFileError, detect_images, list_images, read_boxes, write_boxes
from tests.box_files.stub_detector import StubDetector

GOOD = {"id": "a", "boxes": [[1, 2, 3, 4]], "labels": ["cup"], "scores": [0.5]}


def picture(path):
    Image.new("RGB", (20, 10), "red").save(path, "PNG")


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_name_that_is_not_unicode_is_listed_as_unreadable(tmp_path, extension, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(folder / "b.png")
    picture(os.fsencode(folder) + b"/a\xff.png")
    output = tmp_path / f"boxes.{extension}"
    summary = detect_images(folder, output, StubDetector(), show=tmp_path / "drawn")
    assert list(read_boxes(output)) == ["b.png"] and summary.unreadable == 1
    [listed] = [json.loads(line) for line in summary.unreadable_list.read_text().splitlines()]
    assert listed["image"] == "a\udcff.png" and "not valid Unicode" in listed["reason"]
    assert r"a\udcff.png" in caplog.text


def test_id_with_a_lone_surrogate_is_listed_as_unreadable(some_images, tmp_path):
    samples = [{"id": "\ud83d", "image": "1.png"}, {"id": "good", "image": "1.png"}, {"id": "x", "image": "2.png"}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    output = tmp_path / "boxes.json"
    summary = detect_images(tmp_path / "samples.json", output, StubDetector(), image_folder=some_images)
    assert list(read_boxes(output)) == ["good", "x"] and summary.unreadable == 1
    assert "Samples without an image" not in str(summary)


def test_images_with_long_names_are_drawn(tmp_path):
    folder, drawn = tmp_path / "images", tmp_path / "drawn"
    folder.mkdir()
    for name in ("a" * 245, "ä" * 120):
        picture(folder / f"{name}.png")
    detect_images(folder, tmp_path / "boxes.json", StubDetector(), show=drawn)
    assert len(list(drawn.iterdir())) == 2


@pytest.mark.parametrize(
    ("stem", "name"),
    [("a b!.-_\u00fc\U0001f600", "a_b_.-_\u00fc_"), ("a" * 245, "a" * 200), ("\u00e4" * 120, "\u00e4" * 100)],
)
def test_drawings_have_names_that_any_file_system_takes(some_images, tmp_path, stem, name):
    (some_images / "3.png").rename(tmp_path / f"{stem}.png")
    detect_images([tmp_path / f"{stem}.png"], tmp_path / "boxes.json", StubDetector(), show=tmp_path / "drawn")
    (drawn,) = (tmp_path / "drawn").iterdir()
    assert drawn.name == f"000000_{name}.jpg"
    with Image.open(drawn) as picture:
        assert picture.format == "JPEG" and JpegImagePlugin.get_sampling(picture) == 0  # colors are not blurred


def test_rows_of_datasets_are_named_by_their_ids(some_images, tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    picture = {"bytes": (some_images / "1.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"id": ["x/y", "z"], "image": [picture, None]}, features=features)
    summary = detect_images(rows, tmp_path / "boxes.json", StubDetector(), show=tmp_path / "drawn")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["000000_x_y.jpg"]
    assert "Skipped z (OSError: the row holds no image)" in caplog.text
    (listed,) = [json.loads(line) for line in summary.unreadable_list.read_text().splitlines()]
    assert (listed["ids"], listed["image"]) == (["z"], None)


def test_unreadable_lists_are_readable_text(some_images, tmp_path):
    (tmp_path / "m\u00fcll.png").write_bytes(b"")
    shutil.copy(some_images / "1.png", tmp_path / "1.png")
    summary = detect_images([tmp_path / "m\u00fcll.png", tmp_path / "1.png"], tmp_path / "b.json", StubDetector())
    assert "m\u00fcll.png" in summary.unreadable_list.read_text(encoding="utf-8")


def test_ids_of_64_bits_are_kept(some_images, tmp_path):
    lines = [{"question_id": key, "image": "0.png"} for key in (2**63 - 1, -(2**63))]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    detect_images(tmp_path / "questions.jsonl", tmp_path / "b.parquet", StubDetector(), image_folder=some_images)
    assert list(read_boxes(tmp_path / "b.parquet")) == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1])
def test_ids_beyond_64_bits_are_refused_before_the_work(some_images, tmp_path, key):
    lines = [{"question_id": key, "image": "0.png"}, {"question_id": 1, "image": "1.png"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    detector = StubDetector()
    with pytest.raises(BoxFileError, match=f"1 ids are larger, such as {key}"):
        detect_images(tmp_path / "questions.jsonl", tmp_path / "b.parquet", detector, image_folder=some_images)
    assert detector.calls == 0
    detect_images(tmp_path / "questions.jsonl", tmp_path / "b.json", detector, image_folder=some_images)
    assert key in read_boxes(tmp_path / "b.json")


def test_link_to_an_outer_folder_is_skipped(tmp_path, caplog):
    inner = tmp_path / "images" / "inner"
    inner.mkdir(parents=True)
    picture(inner / "a.png")
    (tmp_path / "elsewhere").mkdir()
    picture(tmp_path / "elsewhere" / "b.png")
    os.symlink(tmp_path / "images", inner / "up")
    os.symlink(".", inner / "self")
    os.symlink(tmp_path / "elsewhere", inner / "other")
    names = [entry.image for entry in list_images(tmp_path / "images").entries]
    assert names == ["inner/a.png", "inner/other/b.png"]
    assert "a link to a folder that it is in" in caplog.text


def test_samples_with_several_images_have_a_record_for_each_image(some_images, tmp_path):
    samples = [{"id": 1, "image": ["1.png", "2.png"]}, {"id": 2, "image": ["3.png"]}, {"id": 3, "image": "2.png"}]
    samples += [{"id": number} for number in range(1000)]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    summary = detect_images(
        tmp_path / "samples.json", tmp_path / "boxes.json", StubDetector(), image_folder=some_images
    )
    assert str(summary).startswith(f"Wrote {tmp_path / 'boxes.json'}: 4 records, {summary.boxes} boxes.")
    assert str(summary).endswith(" Samples without an image: 1,000.")
    file = read_boxes(tmp_path / "boxes.json")
    assert list(file) == ["1.png", "2.png", "3", "2"]
    assert file["3"]["boxes"] == file["2.png"]["boxes"] != file["1.png"]["boxes"]


def test_ids_of_several_images_are_reported(some_images, tmp_path, caplog):
    samples = [{"id": 7, "image": "1.png"}, {"id": 7, "image": "2.png"}, {"id": 8, "image": "2.png"}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    list_images(tmp_path / "samples.json", image_folder=some_images)
    assert "1 ids name several different images, such as '7'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        list_images(some_images)
    assert caplog.text == ""


def test_error_for_a_damaged_result_names_the_image(some_images, tmp_path):
    class Broken(StubDetector):
        def _detect_one(self, image, labels):
            return {"boxes": [[math.nan, 0, 1, 1]], "labels": ["cup"], "scores": [0.5]}

    with pytest.raises(BoxFileError, match=r"The detector's result for '0\.png': every box must be .* got \[nan"):
        detect_images(some_images, tmp_path / "boxes.json", Broken())


DAMAGED = {
    "NaN": {"boxes": [[1, 2, math.nan, 4]]},
    "infinite": {"boxes": [[1, 2, math.inf, 4]]},
    "inverted": {"boxes": [[3, 2, 1, 4]]},
    "text for a box": {"boxes": ["abcd"]},
    "text for a number": {"boxes": [["1", "2", "3", "4"]]},
    "null for a box": {"boxes": [None]},
    "null for boxes": {"boxes": None},
    "too short": {"boxes": [[1, 2, 3]]},
    "bool": {"boxes": [[True, 2, 3, 4]]},
    "huge": {"boxes": [[1, 2, 10**400, 4]]},
    "null for a label": {"labels": [None]},
    "null for a score": {"scores": [None]},
    "text for a score": {"scores": ["0.5"]},
    "NaN for a score": {"scores": [math.nan]},
    "more labels": {"labels": ["cup", "spoon"]},
    "text for frames": {"frames": "abc"},
    "null for a frame": {"frames": [None]},
    "frames in frames": {"frames": [{"frames": []}]},
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_damaged_records_are_all_named_when_the_file_is_read(tmp_path, change):
    records = [GOOD, {**GOOD, "id": "b", **change}, {**GOOD, "id": "c"}, {**GOOD, "id": "d", **change}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(records))
    with pytest.raises(BoxFileError, match=r"has 2 damaged records: record 1.*record 3"):
        read_boxes(path)
    path.write_text(json.dumps({record["id"]: record for record in records}))
    with pytest.raises(BoxFileError, match=r"has 2 damaged records: record 'b'.*record 'd'"):
        read_boxes(path)


IN_PARQUET = "NaN, infinite, inverted, null for a box, null for boxes, too short, null for a label, null for a score"


@pytest.mark.parametrize("name", [*IN_PARQUET.split(", "), "NaN for a score", "more labels"])
def test_damaged_rows_of_parquet_are_named(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "boxes.parquet"
    write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "id": "b", **DAMAGED[name]}]), path)
    with pytest.raises(BoxFileError, match="has 1 damaged records: record 1"):
        read_boxes(path)


def test_intact_rows_of_parquet_are_accepted(tmp_path):
    empty = {"id": "b", "boxes": [], "labels": [], "scores": []}
    outside = {**GOOD, "id": "c", "boxes": [[-5, -3, 900, 900]]}
    for records in ([GOOD, empty, outside], [empty]):
        write_boxes(tmp_path / "boxes.parquet", records)
        assert len(read_boxes(tmp_path / "boxes.parquet")) == len(records)


@pytest.mark.parametrize("content", ["[]", "1", "{", '{"settings": 3}', "\x00"])
def test_damaged_settings_are_one_clear_error(tmp_path, content):
    path = write_boxes(tmp_path / "boxes.json", [GOOD], {"threshold": 0.2})
    path.with_suffix(".settings.json").write_text(content)
    with pytest.raises(BoxFileError, match=r"boxes\.settings\.json"):
        read_boxes(path)


def test_deeply_nested_json_is_one_clear_error(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text("[" * 100_000)
    with pytest.raises(BoxFileError, match="is not valid JSON"):
        read_boxes(path)
