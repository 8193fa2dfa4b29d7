"""Videos of the small world show what their questions ask about, and their files are those of real data."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from mgllava.box_files import read_boxes
from mgllava.processing.video_reading_mgllava import read_video
from small_world.drawing import draw_frames
from small_world.scenes import COLORS, HELD_OUT
from small_world.video_dataset import write_videos
from small_world.videos import NUM_FRAMES, VIDEO_KINDS, make_video


def _seen(video):
    """Find each object in the pixels of each frame: lists of shape, color and center of its box."""
    frames = []
    for scene, (picture, boxes) in zip(video.frames, draw_frames(video.frames), strict=True):
        pixels = np.asarray(picture).astype(int)
        seen = []
        for item, (left, top, right, bottom) in zip(scene.objects, boxes, strict=True):
            inside = pixels[int(top) : int(bottom), int(left) : int(right)].reshape(-1, 1, 3)
            distances = np.abs(inside - np.array(list(COLORS.values()))).sum(-1)
            names = np.array(list(COLORS))[distances.argmin(-1)][distances.min(-1) < 40]
            color = Counter(names.tolist()).most_common(1)[0][0]
            seen.append((item.shape, color, ((left + right) / 2, (top + bottom) / 2)))
        frames.append(seen)
    return frames


def _answer(question, frames):
    """Answer a question from what is seen in the frames."""
    if question.kind == "motion":
        color, shape = re.fullmatch(r"Which way does the (\w+) (\w+) move\?", question.text).groups()
        (x, y), (to_x, to_y) = (
            next(center for *name, center in frame if name == [shape, color]) for frame in (frames[0], frames[-1])
        )
        if abs(to_x - x) > abs(to_y - y):
            return "left" if to_x < x else "right"
        return "up" if to_y < y else "down"
    if question.kind.endswith("appearance"):
        shape, verb, *colors = re.fullmatch(
            r"Which (\w+) (appears first|vanishes last), the (\w+) one or the (\w+) one\?", question.text
        ).groups()
        shown = {color: sum([shape, color] == name for frame in frames for *name, _ in frame) for color in colors}
        assert {"appears first": frames[0], "vanishes last": frames[-1]}[verb]
        return max(shown, key=shown.get)
    of_shape = {}
    for frame in frames:
        for shape, color, _ in frame:
            of_shape.setdefault(shape, []).append(color)
    if question.kind == "change":
        per_frame = {shape: [[seen[0] for seen in frame].count(shape) for frame in frames] for shape in of_shape}
        # A pair has two colors, too, but is not in all frames.
        [changed] = (
            shape for shape, colors in of_shape.items() if set(per_frame[shape]) == {1} and len(set(colors)) > 1
        )
        return changed
    [shape] = (shape for shape in of_shape if f" {shape} " in question.text)
    return of_shape[shape][0 if question.kind == "before" else -1]


@pytest.mark.parametrize("number", range(6))
def test_what_is_asked_is_seen(number):
    video = make_video("test", number)
    frames = _seen(video)
    assert [question.answer for question in video.questions] == [_answer(q, frames) for q in video.questions]
    assert not {(shape, color) for frame in frames for shape, color, _ in frame} & HELD_OUT


def test_a_place_says_little_about_the_direction():
    """The best guess from the place of an object in one frame is right in less than 60 % of the cases."""
    places = [[] for _ in range(NUM_FRAMES)]
    for number in range(400):
        video = make_video("train", number)
        for question in (q for q in video.questions if q.kind == "motion"):
            shape = question.text.split()[-2]
            for time, scene in enumerate(video.frames):
                x, y = next(item.center for item in scene.objects if item.shape == shape)
                places[time].append((x // 64, y // 64, question.answer))
    for of_time in places:
        cells = {}
        for column, row, answer in of_time:
            cells.setdefault((column, row), Counter())[answer] += 1
        assert sum(max(counts.values()) for counts in cells.values()) / len(of_time) < 0.6
    assert min(Counter(answer for *_, answer in places[0]).values()) > 0.18 * len(places[0])


def test_files_are_consistent(tmp_path):
    write_videos(tmp_path, "test", 3, first=5, few_frames=2, processes=1)
    conversations = json.loads((tmp_path / "conversations.json").read_text())
    boxes, of_two = read_boxes(tmp_path / "boxes.json"), read_boxes(tmp_path / "boxes-2.json")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} <= set(VIDEO_KINDS)
    for number, sample in enumerate(conversations, 5):
        video = make_video("test", number)
        drawn = draw_frames(video.frames)
        clip = read_video(str(tmp_path / "videos" / sample["video"]))
        # Without loss, also where frames are equal but for a few pixels.
        assert np.array_equal(clip.frames.permute(0, 2, 3, 1), np.stack([np.asarray(frame) for frame, _ in drawn]))
        assert [frame["boxes"] for frame in boxes[sample["id"]]["frames"]] == [found for _, found in drawn]
        few = of_two[sample["id"]]["frames"]
        assert [frame["boxes"] for frame in few] == [drawn[0][1], drawn[-1][1]]
        turns = sample["conversations"]
        assert [turn["value"].count("<video>\n") for turn in turns] == [1] + [0] * (len(turns) - 1)
        of_this = [row for row in rows if row["video_id"] == sample["id"]]
        assert [row["answer"] for row in of_this] == [turn["value"] for turn in turns[1::2]]


def test_a_second_run_keeps_existing_videos(tmp_path):
    write_videos(tmp_path, "train", 2, processes=1)
    first = tmp_path / "videos" / "000000.webp"
    first.write_bytes(b"mine")
    (tmp_path / "videos" / "000001.webp").unlink()
    write_videos(tmp_path, "train", 2, processes=1)
    assert first.read_bytes() == b"mine"
    assert (tmp_path / "videos" / "000001.webp").exists()
