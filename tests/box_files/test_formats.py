import json
import logging
import sys

import pytest

from mgllava.box_files import BoxFileError, formats, read_boxes, settings_digest, write_boxes

RECORDS = [
    {"id": "a", "boxes": [[-3, 0, 10, 2000], [1, 2, 3, 4]], "scores": [0.25, 0.1 + 0.2], "labels": ["cup", ""]},
    {"id": "b", "boxes": [], "scores": [], "labels": []},
]
SETTINGS = {"detector": {"mode": "faithful"}, "labels": ["Löffel"], "threshold": 0.2}
FRAMES = [
    {name: RECORDS[0][name] for name in ("boxes", "scores", "labels")},
    {"boxes": [], "scores": [], "labels": []},
]


def boxes_of(record):
    return {name: record[name] for name in ("boxes", "scores", "labels")}


@pytest.mark.parametrize("extension", ["json", "parquet"])
@pytest.mark.parametrize("ids", [("a", "b"), (7, 8)])
def test_files_are_read_as_they_were_written(tmp_path, extension, ids):
    records = [{**record, "id": key} for record, key in zip(RECORDS, ids, strict=True)]
    path = write_boxes(tmp_path / f"boxes.{extension}", records, SETTINGS, inputs_digest="1234")
    file = read_boxes(path)
    assert [boxes_of(file[key]) for key in ids] == [boxes_of(record) for record in RECORDS]
    assert list(file) == list(ids)
    assert all(type(corner) is int for corner in file[ids[0]]["boxes"][0])
    assert file.settings == SETTINGS and file.digest == settings_digest(SETTINGS) and file.inputs_digest == "1234"
    assert not list(tmp_path.glob("*.partial"))


def test_json_has_exactly_the_keys_of_the_original(tmp_path):
    more = [{**record, "image": "a.jpg", "width": 3, "height": 4} for record in RECORDS]
    path = write_boxes(tmp_path / "boxes.json", more, SETTINGS)
    assert json.loads(path.read_text()) == RECORDS
    assert list(json.loads(path.read_text())[0]) == ["id", "boxes", "scores", "labels"]
    assert json.loads((tmp_path / "boxes.settings.json").read_text())["settings"] == SETTINGS


def test_dictionary_as_in_training(tmp_path):
    path = write_boxes(tmp_path / "boxes.json", [{**RECORDS[0], "id": 5}], layout="dictionary")
    assert json.loads(path.read_text()) == {"5": boxes_of(RECORDS[0])}
    assert read_boxes(path)[5] == read_boxes(path)["5"] == boxes_of(RECORDS[0])
    assert not (tmp_path / "boxes.settings.json").exists()


@pytest.mark.parametrize("content", [[{"id": "v.1", "frames": FRAMES}], {"v.1": {"frames": FRAMES}}])
def test_videos_as_in_training(tmp_path, content):
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert read_boxes(tmp_path / "boxes.json")["v.1"]["frames"] == FRAMES


def test_images_and_videos_share_a_parquet_file(tmp_path):
    """Rows of images have no frames, rows of videos no boxes, and an empty frame stays a frame."""
    video = {"id": "v.mp4", "frames": FRAMES}
    path = write_boxes(tmp_path / "boxes.parquet", [RECORDS[0], video, {"video": "w.mkv", "frames": FRAMES[1:]}])
    file = read_boxes(path)
    assert boxes_of(file["a"]) == boxes_of(RECORDS[0]) and "frames" not in file["a"]
    assert file["v.mp4"]["frames"] == FRAMES and file["w"]["frames"] == FRAMES[1:] and "boxes" not in file["w"]
    assert [file.holds_frames(key) for key in ("a", "v.mp4", "w")] == [False, True, True]
    assert all(type(corner) is int for corner in file["v.mp4"]["frames"][0]["boxes"][0])


def test_damaged_frames_in_parquet_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    frames = [[{"boxes": [[1.0, 2.0, 3.0]], "labels": ["a"], "scores": [0.5]}]]
    pyarrow.parquet.write_table(pyarrow.table({"id": ["v"], "frames": frames}), tmp_path / "boxes.parquet")
    with pytest.raises(BoxFileError, match="record 0, frame 0: every box must be"):
        read_boxes(tmp_path / "boxes.parquet")


def test_videos_as_in_evaluation_have_ids_without_extension(tmp_path):
    records = [{"video": "first.mp4", "frames": FRAMES}, {"video": "sec.ond.mkv", "frames": FRAMES[1:]}]
    path = write_boxes(tmp_path / "boxes.json", records)
    assert json.loads(path.read_text()) == records
    file = read_boxes(path)
    assert list(file) == ["first", "sec.ond"] and file["sec.ond"]["frames"] == FRAMES[1:]


def test_parquet_has_the_documented_columns(tmp_path):
    import pyarrow.parquet

    records = [{**record, "image": f"{record['id']}.jpg", "width": 30, "height": 20} for record in RECORDS]
    write_boxes(tmp_path / "boxes.parquet", records, SETTINGS)
    table = pyarrow.parquet.read_table(tmp_path / "boxes.parquet")
    assert table.column_names == ["id", "image", "width", "height", "boxes", "labels", "scores"]
    assert table.to_pylist() == [{name: record[name] for name in table.column_names} for record in records]


def test_parquet_opens_as_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = write_boxes(tmp_path / "boxes.parquet", RECORDS)
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["boxes"] == RECORDS[0]["boxes"]


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_no_records_and_no_settings_make_a_file(tmp_path, extension):
    file = read_boxes(write_boxes(tmp_path / f"boxes.{extension}", [], inputs_digest="12"))
    assert len(file) == 0 and file.settings is None and file.inputs_digest == "12"
    file = read_boxes(write_boxes(tmp_path / f"boxes.{extension}", RECORDS))
    assert list(file) == ["a", "b"] and file.settings is file.inputs_digest is None


@pytest.mark.parametrize("integer_boxes", [None, True, False])
@pytest.mark.parametrize("has_frames", [None, True])
def test_types_of_parquet_are_as_given_or_those_of_the_records(tmp_path, integer_boxes, has_frames):
    records = [RECORDS[0], {"id": "v", "frames": FRAMES}]
    options = {"integer_boxes": integer_boxes, "has_frames": has_frames}
    file = read_boxes(write_boxes(tmp_path / "boxes.parquet", records, **options))
    kind = float if integer_boxes is False else int
    assert {type(corner) for box in file["a"]["boxes"] for corner in box} == {kind}
    assert {type(corner) for box in file["v"]["frames"][0]["boxes"] for corner in box} == {kind}
    whole = read_boxes(write_boxes(tmp_path / "boxes.parquet", records[:1], **options))
    assert not whole.holds_frames("a") and boxes_of(whole["a"]) == boxes_of(RECORDS[0])
    with pytest.raises(BoxFileError, match="`has_frames` must be true for records of videos, got false"):
        write_boxes(tmp_path / "boxes.parquet", records, integer_boxes=integer_boxes, has_frames=False)


def test_intact_rows_of_parquet_are_not_checked_one_by_one(tmp_path, monkeypatch):
    """It would take minutes for millions of boxes."""
    import pyarrow
    import pyarrow.parquet

    paths = [
        write_boxes(tmp_path / f"{number}.parquet", RECORDS[number:], integer_boxes=number == 0) for number in (0, 1)
    ]
    large = pyarrow.table({"id": [1], "boxes": [[[1.0, 2, 3, 4]]], "scores": [[1]]})
    labels = pyarrow.array([["a"]], pyarrow.list_(pyarrow.large_string()))
    pyarrow.parquet.write_table(large.append_column("labels", labels), tmp_path / "large.parquet")
    write_boxes(tmp_path / "video.parquet", [{"id": "v", "frames": FRAMES}])

    def fail(*args):
        raise AssertionError("checked")

    monkeypatch.setattr(formats, "check_record", fail)
    assert [len(read_boxes(path)) for path in (*paths, tmp_path / "large.parquet")] == [2, 1, 1]
    with pytest.raises(AssertionError, match="checked"):
        read_boxes(tmp_path / "video.parquet")


def test_fractions_are_kept(tmp_path):
    record = {**RECORDS[0], "boxes": [[0.1, 0.2, 0.30000001192092896, 4.0], [0, 0, 1, 1]]}
    for extension in ("json", "parquet"):
        path = write_boxes(tmp_path / f"boxes.{extension}", [record])
        assert read_boxes(path)["a"]["boxes"] == record["boxes"]


def test_duplicates_are_reported_and_counted(tmp_path, caplog):
    (tmp_path / "boxes.json").write_text(json.dumps([RECORDS[1] | {"id": "a"}, RECORDS[1], RECORDS[0]]))
    with caplog.at_level(logging.WARNING):
        file = read_boxes(tmp_path / "boxes.json")
    assert file["a"]["boxes"] == RECORDS[0]["boxes"] and file.duplicates == {"a": 2}
    assert "1 ids occur more than once, such as 'a' (2 times)" in caplog.text


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_missing_applies_to_files_of_both_formats(tmp_path, extension):
    path = write_boxes(tmp_path / f"boxes.{extension}", RECORDS)
    assert read_boxes(path, missing="empty")["zzz"]["boxes"] == []
    with pytest.raises(BoxFileError, match=f"boxes.{extension} has no boxes for id 'zzz'"):
        read_boxes(path)["zzz"]


def test_settings_of_a_replaced_file_are_refused(tmp_path):
    path = write_boxes(tmp_path / "boxes.json", RECORDS, SETTINGS)
    path.write_text(json.dumps(RECORDS[:1]))
    with pytest.raises(BoxFileError, match=r"boxes\.settings\.json does not belong to .*boxes\.json"):
        read_boxes(path)


def test_edited_settings_are_refused(tmp_path):
    path = write_boxes(tmp_path / "boxes.json", RECORDS, SETTINGS)
    side_file = tmp_path / "boxes.settings.json"
    side_file.write_text(side_file.read_text().replace("0.2", "0.3"))
    with pytest.raises(BoxFileError, match=r"settings of .* were changed"):
        read_boxes(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "is not valid JSON"),
        ("3", "must hold a list or a dictionary of records, got int"),
        ("[[]]", "record 0 must be a dictionary, got list"),
        ('[{"id": 1, "boxes": [], "scores": []}]', "record 0 must have boxes, scores, labels .* but labels is absent"),
        ('[{"boxes": [], "scores": [], "labels": []}]', "record 0 must have an `id`"),
        ('[{"id": null, "boxes": [], "scores": [], "labels": []}]', "`id` must be text or an integer, got None"),
        ('[{"id": 1, "boxes": [[1, 2, 3, 4]], "scores": [], "labels": []}]', "must have the same length"),
        ('{"k": {"boxes": [[1, 2, 3]], "scores": [1], "labels": ["a"]}}', r"record 'k': every box must be \[x1"),
        ('[{"id": 1, "frames": [{"boxes": []}]}]', "record 0, frame 0 must have"),
    ],
)
def test_damaged_json_is_refused(tmp_path, content, said):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(BoxFileError, match=said):
        read_boxes(tmp_path / "boxes.json")


def test_damaged_parquet_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "boxes.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(BoxFileError, match="is not a Parquet file"):
        read_boxes(path)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "boxes": [[1]]}), path)
    with pytest.raises(BoxFileError, match="has no column scores, labels"):
        read_boxes(path)
    row = {"id": 1, "boxes": [[1, 2, 3, 4]], "scores": [0.5], "labels": ["a"]}
    for change, said in (
        ({"labels": [7]}, "`labels` must be text"),
        ({"boxes": 3}, "`boxes` must be a list, got int"),
        ({"boxes": [["1", "2", "3", "4"]]}, "every box must be"),
        ({"scores": ["0.5"]}, "`scores` must be finite numbers"),
        ({"boxes": [[1, 3, 3, 2]]}, "x1 <= x2 and y1 <= y2"),
    ):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **change}] * 7), path)
        with pytest.raises(BoxFileError, match=rf"has 7 damaged records: record 0: .*{said}.* \(and 2 more\)$"):
            read_boxes(path)


def test_records_that_a_format_cannot_hold_are_refused_without_a_file(tmp_path):
    for name, records, layout, said in [
        ("boxes.parquet", [RECORDS[0], {**RECORDS[1], "id": 3}], "list", "needs ids of one type"),
        ("boxes.json", [RECORDS[0], RECORDS[0]], "dictionary", "occurs twice"),
        ("boxes.json", [{**RECORDS[0], "id": 1}, {**RECORDS[0], "id": "1"}], "dictionary", "occurs twice"),
        ("boxes.json", RECORDS, "table", "`layout` must be 'list' or 'dictionary', got 'table'"),
        ("boxes.json", [{**RECORDS[0], "id": True}], "list", "`id` must be text or an integer, got True"),
    ]:
        with pytest.raises(BoxFileError, match=said):
            write_boxes(tmp_path / name, records, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_unknown_extension_is_refused(tmp_path):
    with pytest.raises(BoxFileError, match=r"must end in \.json or \.parquet, got .*boxes\.csv"):
        read_boxes(tmp_path / "boxes.csv")
    with pytest.raises(BoxFileError, match="must end in"):
        write_boxes(tmp_path / "boxes", RECORDS)


def test_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow \(.*pip install -e '\.\[datasets\]'"):
        write_boxes(tmp_path / "boxes.parquet", RECORDS)
