"""The video processor, and videos in the processor: frames, boxes, prompts, conversations."""

import copy
import math

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor, AutoVideoProcessor

from mgllava import MGLlavaVideoProcessor
from mgllava.processing import MGLlavaProcessor
from mgllava.processing.video_reading_mgllava import uniform_indices
from tests.golden_cases import GOLDEN, NUM_FUSED_TOKENS

from .videos import make_frames, write

RED = {"type": "image", "image": PIL.Image.new("RGB", (40, 30), "red")}


def make_video(count=5, height=24, width=32, seed=0):
    """Frames of which each has its index in the first pixel."""
    frames = np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = range(count)
    return frames


@pytest.fixture(scope="module")
def video_processor():
    return MGLlavaVideoProcessor(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, low_res_size=42, num_frames=3
    )


@pytest.fixture(scope="module")
def small(processor, video_processor):
    """The processor of the golden set with small frames, so that tests are fast."""
    copied = copy.deepcopy(processor)
    copied.video_processor = video_processor
    return copied


def runs(ids, token_id):
    """Lengths of the runs of a token."""
    lengths, previous = [], None
    for token in ids:
        if token == token_id:
            lengths = [*lengths[:-1], lengths[-1] + 1] if previous == token_id else [*lengths, 1]
        previous = token
    return lengths


class StubDetector:
    """Finds one box per image, as wide as its first pixel is red; remembers its calls."""

    def __init__(self):
        self.calls = []

    def detect(self, images, **kwargs):
        self.calls.append(len(images))
        found = []
        for image in images:
            width = image.getpixel((0, 0))[0] + 1
            found.append({"boxes": torch.tensor([[0, 0, width, 5]]), "labels": ["a"], "scores": torch.ones(1)})
        return found


@pytest.mark.parametrize(
    ("total", "number", "expected"),
    [
        (23, 8, [0, 3, 6, 9, 12, 15, 18, 22]),
        (5, 8, [0, 0, 1, 1, 2, 2, 3, 4]),
        (1, 8, [0] * 8),
        (8, 8, list(range(8))),
        (10, 1, [0]),
    ],
)
def test_sampling_is_the_originals(video_processor, total, number, expected):
    assert uniform_indices(total, number) == expected
    inputs = video_processor(make_video(total), num_frames=number, return_metadata=True)
    assert inputs["video_metadata"][0].frames_indices == expected


@pytest.mark.parametrize("is_upright", [False, True])
def test_frames_of_both_sizes_equal_an_independent_formula(video_processor, is_upright):
    """Each output pixel is the mean of four inputs; computed here with NumPy, frame by frame."""
    video = make_video(3, 20, 31)
    for do_pad in (True, False):
        given = video.swapaxes(1, 2) if is_upright else video
        inputs = video_processor(given, do_pad=do_pad, return_tensors="pt")
        if is_upright:  # the formula below is that of wide frames
            inputs = {name: value.transpose(-1, -2) for name, value in inputs.items() if "pixel" in name}
        for name, side in (("pixel_values_videos", 96), ("low_res_pixel_values_videos", 42)):
            assert inputs[name].shape == (3, 3, side, side) and inputs[name].dtype == torch.float32
            mean, std = (np.array(values) for values in (video_processor.image_mean, video_processor.image_std))
            frame = (video[1] / 255 - mean) / std
            if do_pad:
                frame = np.pad(frame, ((5, 6), (0, 0), (0, 0)))
            height, width = frame.shape[:2]
            new = (side, side) if do_pad else (side, math.floor(width / height * side))
            rows = np.clip((np.arange(new[0]) + 0.5) * height / new[0] - 0.5, 0, None)
            columns = np.clip((np.arange(new[1]) + 0.5) * width / new[1] - 0.5, 0, None)
            top, left = rows.astype(int), columns.astype(int)
            down, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
            y, x = (rows - top)[:, None, None], (columns - left)[None, :, None]
            upper = frame[top][:, left] * (1 - x) + frame[top][:, right] * x
            lower = frame[down][:, left] * (1 - x) + frame[down][:, right] * x
            resized = upper * (1 - y) + lower * y
            start = round((resized.shape[1] - side) / 2)
            expected = torch.tensor(resized[:, start : start + side]).permute(2, 0, 1).float()
            torch.testing.assert_close(inputs[name][1], expected, atol=2e-5, rtol=0)


def test_frames_that_are_not_normalized_are_padded_with_the_mean(video_processor):
    video = np.full((1, 30, 10, 3), 200, np.uint8)
    mean = torch.tensor(video_processor.image_mean)
    for options, middle, border in (
        ({"do_normalize": False}, 200 / 255, mean),
        ({"do_normalize": False, "rescale_factor": 0.5}, 100, mean),
        ({"do_normalize": False, "do_rescale": False}, 200, mean * 255),
    ):
        frame = video_processor(video, return_tensors="pt", **options)["pixel_values_videos"][0]
        torch.testing.assert_close(frame[:, 48, 48], torch.full((3,), float(middle)))
        torch.testing.assert_close(frame[:, 48, 0], border)


def test_boxes_are_padded_to_a_multiple(video_processor):
    inputs = video_processor(make_video(3), video_boxes=ENTRIES, pad_boxes_to_multiple_of=4, return_tensors="pt")
    assert inputs["video_boxes"].shape == (3, 4, 4) and inputs["num_video_boxes"].tolist() == [1, 1, 2]


def test_fetched_videos_are_frames_and_metadata(video_processor):
    videos = [write(make_frames(count)) for count in (4, 2)]
    frames, metadata = video_processor.fetch_videos(videos[0])
    assert frames.shape[0] == metadata.total_num_frames == 4
    sampled, described = video_processor.fetch_videos(videos, lambda metadata: [metadata.total_num_frames - 1])
    assert torch.equal(sampled[0][0], frames[3]) and [known.frames_indices for known in described] == [[3], [1]]


def test_videos_of_several_sizes_and_lengths_come_one_after_the_other(video_processor):
    videos = [make_video(4, 20, 31), make_video(2, 30, 17, seed=1)]
    together = video_processor(videos, do_sample_frames=False, return_tensors="pt")
    assert together["num_video_frames"].tolist() == [4, 2]
    alone = [video_processor(video, do_sample_frames=False, return_tensors="pt") for video in videos]
    for name in ("pixel_values_videos", "low_res_pixel_values_videos", "num_video_boxes"):
        torch.testing.assert_close(together[name], torch.cat([inputs[name] for inputs in alone]), rtol=0, atol=0)


def test_forms_of_frames_give_the_same(video_processor):
    video = make_video(3)
    images = [PIL.Image.fromarray(frame) for frame in video]
    forms = [
        video,
        torch.from_numpy(video),
        torch.from_numpy(video).permute(0, 3, 1, 2),
        video / 255,
        images,
        list(video),
        [images],
        [video],
        [[video]],
        {"video": video},
    ]
    expected = video_processor(video, return_tensors="pt")["pixel_values_videos"]
    for form in forms:
        inputs = video_processor(form, return_tensors="pt")
        assert inputs["num_video_frames"].tolist() == [3]
        torch.testing.assert_close(inputs["pixel_values_videos"], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"`videos\[0\]` must hold values from 0 to 255, or from 0 to 1, got -1.0"):
        video_processor(video / 255 - 1)
    batch = video_processor(torch.from_numpy(np.stack([video, video])), return_tensors="pt")
    assert batch["num_video_frames"].tolist() == [3, 3]


def test_a_list_of_paths_is_of_videos_and_a_list_in_a_block_is_of_frames(small, tmp_path):
    paths = []
    for index, frame in enumerate(make_video(3)):
        paths.append(str(tmp_path / f"{index}.png"))
        PIL.Image.fromarray(frame).save(paths[-1])
    assert small.video_processor(paths, return_tensors="pt")["num_video_frames"].tolist() == [3, 3, 3]
    conversation = [{"role": "user", "content": [{"type": "video", "video": paths}, {"type": "text", "text": "Hi"}]}]
    inputs = small.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["num_video_frames"].tolist() == [3]
    expected = small.video_processor(make_video(3), return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(inputs["pixel_values_videos"], expected)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"fps": 2, "video_metadata": {"fps": 4}}, 6),
        ({"fps": 0.01, "video_metadata": {"fps": 4}}, 1),
        ({"num_frames": 2, "do_sample_frames": True}, 2),
        ({"do_sample_frames": False}, 12),
        ({}, 3),
    ],
    ids=str,
)
def test_numbers_of_frames(video_processor, options, frames):
    assert video_processor(make_video(12), **options)["num_video_frames"] == [frames]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 2}, "`fps` needs the frame rate of the video"),
        ({"fps": 2, "num_frames": 3}, "either `num_frames` or `fps`"),
        ({"num_frames": 0}, "`num_frames` must be a positive number, got 0"),
        ({"pad_boxes_to_multiple_of": 0}, "`pad_boxes_to_multiple_of` must be a positive number, got 0"),
        ({"do_center_crop": False}, "`do_center_crop` must be True"),
        ({"do_rescale": False}, "`do_rescale` must be True when `do_normalize` is"),
        ({"crop_size": {"height": 97, "width": 96}}, r"`crop_size` must not exceed the resized frame \(96 x 96\)"),
        ({"crop_size": {"height": 96, "width": 98}}, r"`crop_size` must not exceed the resized frame \(96 x 96\)"),
        ({"num_frames": 3, "do_sample_frames": False}, "`num_frames` and `fps` must be None"),
        ({"resample": PIL.Image.Resampling.BICUBIC}, "`resample` must be bilinear"),
        ({"do_resize": False}, "`do_resize` must be True"),
        ({"video_metadata": [{"fps": 1}, {"fps": 2}]}, "one entry per video, got 2 for 1 videos"),
    ],
)
def test_options_that_contradict_are_an_error(video_processor, options, message):
    with pytest.raises(ValueError, match=message):
        video_processor(make_video(4), **options)


def test_unknown_options_and_no_videos_are_an_error(video_processor):
    with pytest.raises(TypeError, match="unknown options: 'frames'"):
        video_processor(make_video(4), frames=3)
    with pytest.raises(ValueError, match="`videos` must hold at least one video"):
        video_processor([])


ENTRIES = [[[1, 2, 20, 20]], [], [[0, 0, 5, 5], [3, 3, 30, 20]]]


@pytest.mark.parametrize(
    "boxes",
    [
        ENTRIES,
        [ENTRIES],
        [[ENTRIES]],
        {"frames": ENTRIES},
        [{"id": "a", "frames": [{"boxes": entry} for entry in ENTRIES]}],
        (entry for entry in ENTRIES),
    ],
    ids=["video", "batch", "prompts", "record", "records", "generator"],
)
def test_boxes_may_be_nested(small, boxes):
    inputs = small(text="<video>", videos=[[make_video(3)]], video_boxes=boxes, return_tensors="pt")
    assert inputs["num_video_boxes"].tolist() == [1, 1, 2]
    # 32 x 24 is padded to 32 x 32, which becomes 96 x 96.
    assert inputs["video_boxes"][0, 0].tolist() == [3, 18, 60, 72]
    assert inputs["video_boxes"][1, 0].tolist() == [0, 0, 0, 0]
    assert small.num_video_tokens(inputs) == [3 * NUM_FUSED_TOKENS + 4]
    assert runs(inputs["input_ids"][0].tolist(), small.video_token_id) == [3 * NUM_FUSED_TOKENS + 4]


@pytest.mark.parametrize(
    ("boxes", "counts"),
    [(None, [1, 1, 1]), ([], [1, 1, 1]), ([None, [], None], [1, 1, 1]), ([ENTRIES[0], None, []], [1, 1, 1])],
    ids=str,
)
def test_missing_boxes_are_the_zero_box(small, boxes, counts):
    inputs = small(text="<video>", videos=make_video(3), video_boxes=boxes)
    assert list(inputs["num_video_boxes"]) == counts


@pytest.mark.parametrize(
    "boxes", [[[[], [], []]] * 2, [[[[], [], []]]] * 2, [[[[], None, []]], [None]], [[], []], [None, []]], ids=str
)
def test_missing_boxes_of_several_prompts_are_the_zero_box(small, boxes):
    inputs = small(text=["<video>"] * 2, videos=[[make_video(3)], [make_video(3)]], video_boxes=boxes)
    assert list(inputs["num_video_boxes"]) == [1] * 6


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (ENTRIES[:2], r"`video_boxes\[0\]` must have one entry for each of the 3 sampled frames, got 2"),
        ([ENTRIES, ENTRIES], "one list per video, got 2 lists for 1 videos"),
        ([[1, 2, 3, 4]], "must hold a list with one entry per frame"),
        ([[[0.1, 0.1, 0.5, 0.5]], [], []], r"`video_boxes\[0\]\[0\]` must be x1, y1, x2, y2 in pixels"),
        ([[[[ENTRIES]]]], "at most one list per prompt, video and frame"),
    ],
)
def test_boxes_that_do_not_match_are_an_error(small, boxes, message):
    with pytest.raises(ValueError, match=message):
        small(text="<video>", videos=make_video(3), video_boxes=boxes)


def test_detected_boxes_are_limited_to_20_per_label_whatever_the_limit_is(video_processor):
    corners = torch.tensor([[3 * i, 0, 3 * i + 3, 5] for i in range(30)], dtype=torch.float32)
    entry = {"boxes": corners, "labels": ["a"] * 30, "scores": torch.linspace(1, 0.1, 30)}
    video = make_video(1, 24, 96)
    counts = {}
    for limit in (10, 29, 30, None):
        inputs = video_processor(video, num_frames=1, video_boxes=[entry], box_limit=limit)
        counts[limit] = inputs["num_video_boxes"][0]
    assert counts == {10: 20, 29: 20, 30: 30, None: 30}
    inputs = video_processor(video, num_frames=1, video_boxes=[entry], close_to_max_length=True)
    assert inputs["num_video_boxes"] == [1]


def test_images_and_videos_mix_in_prompts_and_batches(small):
    texts = ["<video>\nA? <image>", "B?", "<image> <video> <video>"]
    images = [[RED["image"]], [], [RED["image"]]]
    videos = [[make_video(3)], [], [make_video(2), make_video(6, 30, 20)]]
    boxes = [[[1, 1, 9, 9], [2, 2, 8, 8]]], None, [[[5, 5, 9, 9]]]
    video_boxes = [[ENTRIES], [], [[[], [], []], [[[1, 1, 9, 9]]] * 3]]
    whole = small(images, texts, videos, boxes=list(boxes), video_boxes=video_boxes, padding=True, return_tensors="pt")
    assert whole["num_video_frames"].tolist() == [3, 3, 3]
    parts = []
    for index, text in enumerate(texts):
        single = small(
            images[index] or None,
            text,
            videos[index],
            boxes=boxes[index],
            video_boxes=video_boxes[index] or None,
            return_tensors="pt",
        )
        ids = single["input_ids"][0]
        assert whole["input_ids"][index, -len(ids) :].tolist() == ids.tolist()
        parts.append(single)
    joined = small.join_videos([small.take_videos(part, 0) for part in parts])
    for name in small.video_inputs:
        torch.testing.assert_close(joined[name], whole[name], rtol=0, atol=0)
    second = small.take_videos(whole, 1, 2)
    torch.testing.assert_close(second["pixel_values_videos"], whole["pixel_values_videos"][3:6])
    again = small(text=texts, processed_images=small.take_images(whole, 0), processed_videos=joined, padding=True)
    assert again["input_ids"] == whole["input_ids"].tolist()


def test_the_model_takes_what_the_processor_returns(model, processor):
    """The whole output, with labels and metadata."""
    inputs = processor(
        [RED["image"]],
        ["<image> <video> Hi"],
        [make_video(2)],
        num_frames=1,
        return_box_labels=True,
        return_metadata=True,
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    assert sorted(inputs["mm_token_type_ids"].unique().tolist()) == [0, 1, 2]
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_conversations(small):
    """Blocks keep their order, and go to the front of the turn; the string gives the same ids."""
    content = [
        {"type": "video", "video": make_video(3), "boxes": ENTRIES},
        {"type": "text", "text": " Which one? "},
        {**RED, "boxes": [[1, 1, 9, 9]]},
        {"type": "video_url", "video_url": {"url": str(GOLDEN / "images" / "landscape.png")}, "boxes": None},
    ]
    content[3] = {"type": "video", "video": make_video(2)}
    conversation = [{"role": "user", "content": content}]
    text = small.apply_chat_template(conversation, add_generation_prompt=True)
    plain = small.private_characters.sub("", text)
    assert "USER: <video>" in plain and plain.index("<video>") < plain.index("<image>") < plain.rindex("<video>")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = small.apply_chat_template(conversation, **options)
    assert inputs["num_video_boxes"].tolist() == [1, 1, 2, 1, 1, 1]
    assert inputs["num_boxes"].tolist() == [1]
    again = small([RED["image"]], text, [make_video(3), make_video(2)], return_tensors="pt")
    assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert again["video_boxes"].tolist() == inputs["video_boxes"].tolist()
    ids, _ = small.encode_text(conversation, add_generation_prompt=True)
    assert ids.count(small.video_token_id) == 2 and ids.count(small.image_token_id) == 1


def test_blocks_of_videos_may_have_any_form(small, tmp_path):
    (path := tmp_path / "video.mkv").write_bytes(data := write(make_frames(3)))
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = small.video_processor(data, return_tensors="pt")["pixel_values_videos"]
    for block in (
        {"type": "video", "path": str(path)},
        {"type": "video", "bytes": data, "path": "elsewhere.mkv"},
        {"type": "video", "video": None, "url": str(path)},
        {"type": "video_url", "video_url": {"url": str(path)}},
        {"type": "video_url", "video_url": str(path)},
    ):
        inputs = small.apply_chat_template([{"role": "user", "content": [block]}], **options)
        assert torch.equal(inputs["pixel_values_videos"], expected)
    with pytest.raises(ValueError, match="A video block must have one video, got 'bytes', 'url'"):
        small.apply_chat_template([{"role": "user", "content": [{"type": "video", "bytes": data, "url": "a"}]}])


@pytest.mark.parametrize(
    ("boxes", "advice"), [([[1, 2, 20, 20]], "Give each frame a list"), ([[ENTRIES]], "Remove lists")], ids=str
)
def test_boxes_of_a_block_of_another_depth_are_refused(small, boxes, advice):
    block = {"type": "video", "video": make_video(3), "boxes": boxes}
    with pytest.raises(ValueError, match=f"`boxes` of a video block must be a list with one entry.*{advice}"):
        small.apply_chat_template([{"role": "user", "content": [block]}])


def test_engines_get_the_placeholders_of_one_image_or_video(small):
    inputs = small([RED["image"]] * 2, "<image><image><video>", make_video(3), boxes=[[], ENTRIES[2]])
    assert small.replace_image_token(inputs, 1) == "<image>" * (NUM_FUSED_TOKENS + 2)
    assert small.replace_video_token(inputs, 0) == "<video>" * (3 * (NUM_FUSED_TOKENS + 1))


def test_boxes_of_rendered_conversations_may_be_given_again(small):
    block = {"type": "video", "video": make_video(3), "boxes": ENTRIES}
    text = small.apply_chat_template([{"role": "user", "content": [block, {**RED, "boxes": [[1, 1, 9, 9]]}]}])
    media = {"text": text, "images": [RED["image"]], "videos": [make_video(3)]}
    expected = small(**media)
    for given in ({"video_boxes": [ENTRIES]}, {"video_boxes": [ENTRIES], "boxes": [[[1, 1, 9, 9]]]}):
        torch.testing.assert_close(small(**media, **given)["video_boxes"], expected["video_boxes"])
    for other in ([[[1, 2, 20, 21]], *ENTRIES[1:]], ENTRIES[:2]):
        with pytest.raises(ValueError, match="`video_boxes` must be those of the video blocks"):
            small(**media, video_boxes=[other])
    with pytest.raises(ValueError, match="`boxes` must be those of the image blocks"):
        small(**media, boxes=[[[1, 1, 9, 8]]])


def test_planned_placeholders_of_videos_are_the_most_that_the_limits_allow(small):
    of_frame = NUM_FUSED_TOKENS + small.video_processor.box_limit
    assert small._get_num_multimodal_tokens(video_sizes=[(9, 20, 30)] * 2).num_video_tokens == [3 * of_frame] * 2
    assert small._get_num_multimodal_tokens(video_sizes=[(9, 20, 30)], num_frames=2).num_video_tokens == [2 * of_frame]
    (sampled := copy.deepcopy(small)).video_processor.num_frames = None
    assert sampled._get_num_multimodal_tokens(video_sizes=[(9, 20, 30)]).num_video_tokens == [9 * of_frame]


def test_literal_placeholders_keep_their_order(small):
    message = {"role": "user", "content": "What? <video> and <image>"}
    assert "USER: <video>\n<image>\nWhat?  and ASSISTANT:" in small.apply_chat_template(
        [message], add_generation_prompt=True
    )


def test_users_cannot_write_the_placeholder(small):
    from mgllava.user_text import control_tokens, encode_conversation

    assert control_tokens(small).search("a <video> b")
    content = [{"type": "video", "video": make_video(1)}, {"type": "text", "text": "Is <video> a tag?"}]
    inputs = encode_conversation(small, [{"role": "user", "content": content}])
    assert runs(inputs["input_ids"][0].tolist(), small.video_token_id) == [3 * NUM_FUSED_TOKENS + 3]


def test_an_iterator_of_videos_is_read_once(small):
    inputs = small(text=["<video>", "<video>"], videos=iter([make_video(3), make_video(4)]))
    assert list(inputs["num_video_frames"]) == [3, 3]


def test_empty_videos_are_none(small):
    for videos in ([], None, [[]]):
        inputs = small(text="Hi", videos=videos)
        assert not any("video" in name for name in inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<video>"}, "one '<video>' per video, got 1 placeholders and 0 videos"),
        ({"text": "Hi", "videos": [make_video(1)]}, "got 0 placeholders and 1 videos"),
        ({"text": "Hi", "video_boxes": [[]]}, "`video_boxes` must come with videos"),
        (
            {"text": ["<video>", "<video><video>"], "videos": [[make_video(1), make_video(1)], [make_video(1)]]},
            r"`text\[0\]` must have one '<video>' per video",
        ),
        ({"text": "<video>", "videos": make_video(1), "truncation": True, "max_length": 9}, "room for the videos"),
        ({"text": "<video>", "videos": [7]}, None),
        ({"text": "<video>", "videos": [make_video(1)], "processed_videos": {"video_boxes": []}}, "got both"),
        ({"text": "<video>", "processed_videos": {"video_boxes": [[]]}}, "must have .*, got none of .*pixel_values"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error(small, arguments, message):
    error = ValueError if message else TypeError
    with pytest.raises(error, match=message or r"`videos\[0\]` must be a path"):
        small(**arguments)


def test_detect_finds_boxes_of_all_frames_in_one_call(small, monkeypatch):
    detector = StubDetector()
    copied = copy.copy(small)
    monkeypatch.setattr(type(copied), "box_detector", property(lambda self: detector))
    found = copied.detect(videos=[make_video(9), make_video(2)], num_frames=4)
    # Indices 0, 2, 5, 8 of the first; 0, 0, 0, 1 of the second, in which a frame is processed once.
    assert detector.calls == [4, 2]
    assert [[int(frame["boxes"][0, 2]) for frame in video] for video in found] == [[1, 3, 6, 9], [1, 1, 1, 2]]
    inputs = copied(text="<video>", videos=make_video(3), video_boxes=[[[[1, 1, 9, 9]], None, None]])
    assert detector.calls[2:] == [2]
    assert list(inputs["num_video_boxes"]) == [1, 1, 1]
    with pytest.raises(ValueError, match="either `images` or `videos`"):
        copied.detect()
    with pytest.raises(ValueError, match="`num_frames` must be None for images"):
        copied.detect(RED["image"], num_frames=2)


def test_saving_and_loading(processor, tmp_path):
    copied = copy.deepcopy(processor)
    copied.video_processor = MGLlavaVideoProcessor.like(copied.image_processor, num_frames=5, box_limit=None)
    copied.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MGLlavaProcessor) and isinstance(loaded.video_processor, MGLlavaVideoProcessor)
    assert (loaded.video_processor.num_frames, loaded.video_processor.box_limit) == (5, None)
    assert loaded.video_token_id == processor.video_token_id
    assert AutoVideoProcessor.from_pretrained(tmp_path).num_frames == 5
    assert AutoProcessor.from_pretrained(tmp_path, num_frames=2).video_processor.num_frames == 2
