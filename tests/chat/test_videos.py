"""Videos in conversations: answers, boxes, the cache, and the picture of the frames."""

import io
import sys

import pytest
from PIL import Image

from mgllava.box_files import BoxFile
from mgllava.chat import ChatError, ChatSession
from mgllava.chat.terminal import ChatTerminal
from tests.chat.conftest import TwoBoxes
from tests.tiny import NUM_FUSED_TOKENS
from tests.training.conftest import tiny_processor, tiny_video_processor, words_model

FRAMES = 3


def clip(count=5):
    return [Image.new("RGB", (90, 60), (40 * index, 0, 0)) for index in range(count)]


@pytest.fixture(scope="module")
def video_processor():
    return tiny_video_processor(FRAMES)


@pytest.fixture(scope="module")
def video_model(video_processor):
    model = words_model(video_token_id=video_processor.video_token_id)
    model.generation_config.update(do_sample=False, repetition_penalty=1.5, max_new_tokens=5)
    return model


@pytest.fixture
def session(video_model, video_processor):
    video_processor.box_detector = TwoBoxes()
    return ChatSession(video_model, video_processor)


def test_answers_are_those_to_one_prompt_and_frames_are_encoded_once(session, video_model, video_processor):
    """A video, then a question without, then an image."""
    counts = []
    tower = video_model.model.high_res_vision_tower
    hook = tower.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    shown = session.add_video(clip())
    assert len(shown.frames) == len(shown.detections) == FRAMES and shown.num_total_frames == 5
    assert [len(entry["boxes"]) for entry in shown.objects] == [2] * FRAMES  # the second box was found twice
    answers = [session.ask("What happens?").text, session.ask("And then?").text]
    session.add_image(clip()[1])
    answers.append(session.ask("And here?").text)
    hook.remove()
    assert sum(counts) == FRAMES + 1
    fresh = ChatSession(video_model, video_processor)
    fresh.messages = session.messages[:-2]
    fresh.videos = list(session.videos)
    fresh.add_image(clip()[1])
    assert fresh.ask("And here?").text == answers[-1]


def test_what_cannot_be_shown_is_an_error_that_leaves_the_conversation_unchanged(session, video_model, tmp_path):
    (tmp_path / "half.mp4").write_bytes(b"GIF89a")
    for video, boxes, said in (
        (tmp_path / "half.mp4", None, r"half\.mp4 cannot be read as a video"),
        (clip(), [[]] * 4, "each of the 3 sampled frames, got 4"),
        (clip(), [[[200, 0, 900, 5]]] * 3, "The objects in video cannot be found"),
    ):
        with pytest.raises(ChatError, match=said):
            session.add_video(video, boxes)
    answer = session.ask("Say it.")
    assert answer.text is not None and not session.videos


def test_models_without_videos_say_so():
    model, processor = words_model(), tiny_processor()
    with pytest.raises(ChatError, match=r"this model takes no videos.*add_videos"):
        ChatSession(model, processor).add_video("clip.mp4")
    with pytest.raises(ValueError, match="`num_frames` must be None"):
        ChatSession(model, processor, num_frames=4)


def test_a_video_that_is_too_long_names_the_limit_and_what_to_do(session, video_model, video_processor, monkeypatch):
    session.num_frames = 8
    session.add_video(clip(), [[]] * 8)
    needed = 8 * (NUM_FUSED_TOKENS + 1)
    monkeypatch.setattr(video_model.config.get_text_config(), "max_position_embeddings", needed)
    expected = rf"the model's context has {needed} .*fewer images or frames"
    with pytest.raises(ChatError, match=expected):
        session.ask("What happens?")


def test_the_frames_are_drawn_side_by_side(session, monkeypatch, capsys, tmp_path):
    path = tmp_path / "clip.mp4"
    clip()[0].save(path, "GIF", save_all=True, append_images=clip()[1:], duration=100)
    entry = {"boxes": [[5, 10, 40, 30]], "labels": ["cup"], "scores": [0.9]}
    empty = {"boxes": [], "labels": [], "scores": []}
    lines = [f"/video {path}", "What happens?", "/video", f"/video {tmp_path}/none.mp4"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    ChatTerminal(session, tmp_path / "pictures", BoxFile(["clip"], [{"frames": [entry, empty, entry]}])).run()
    notes = capsys.readouterr().err
    assert "clip.mp4: 3 of 5 frames, 90 x 60 pixels, objects: 1, 0, 1" in notes
    assert "/video needs a path or URL" in notes and "none.mp4 cannot be read as a video" in notes
    with Image.open(tmp_path / "pictures" / "clip.jpg") as picture:
        assert picture.width > 3 * picture.height  # three frames of 3:2


@pytest.mark.parametrize("has_detector", [True, False])
def test_a_missing_detector_is_reported(session, monkeypatch, capsys, tmp_path, has_detector):
    clip()[0].save(tmp_path / "clip.gif", save_all=True, append_images=clip()[1:], duration=100)
    if not has_detector:
        session.processor.box_detector = None
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/video {tmp_path / 'clip.gif'}"))
    ChatTerminal(session).run()
    assert ("(there is no box detector to find them)" in capsys.readouterr().err) is not has_detector
