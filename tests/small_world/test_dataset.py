"""The files of a data set have the formats of real data and are consistent."""

import json

from PIL import Image

from mgllava.box_files import read_boxes
from small_world.dataset import write_dataset
from small_world.drawing import draw_scene
from small_world.scenes import make_scene


def test_files_are_consistent(tmp_path):
    write_dataset(tmp_path, "test", 6, questions=4, first=10, processes=1)
    captions, conversations = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "conversations")
    )
    boxes = read_boxes(tmp_path / "boxes.json")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in captions] == [f"test/{number}" for number in range(10, 16)]
    assert [sample["id"] for sample in conversations] == [sample["id"] for sample in captions]
    asked = 0
    for number, sample in enumerate(conversations, 10):
        scene = make_scene("test", number)
        assert Image.open(tmp_path / "images" / sample["image"]).size == (scene.width, scene.height)
        assert boxes[sample["id"]]["boxes"] == draw_scene(scene)[1]
        assert boxes[sample["id"]]["labels"] == [item.shape for item in scene.objects]
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>\n") for turn in turns] == [1] + [0] * (len(turns) - 1)
        of_this = [row for row in rows if row["image_id"] == sample["id"]]
        assert [row["answer"] for row in of_this] == [turn["value"] for turn in turns[1::2]]
        asked += len(of_this)
    assert asked == len(rows)


def test_a_second_run_keeps_existing_pictures(tmp_path):
    write_dataset(tmp_path, "train", 3, processes=1)
    first = tmp_path / "images" / "000000.jpg"
    first.write_bytes(b"mine")
    (tmp_path / "images" / "000001.jpg").unlink()
    write_dataset(tmp_path, "train", 3, processes=1)
    assert first.read_bytes() == b"mine"
    assert (tmp_path / "images" / "000001.jpg").exists()
