"""A chat with a model of another family: no boxes, several views of an image, and images that depend on the text."""

import io
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from mgllava.chat import ChatError, ChatSession
from mgllava.chat.terminal import ChatTerminal
from mgllava.cli import app

WIDE, TALL = Image.new("RGB", (30, 10), "red"), Image.new("RGB", (10, 30), "blue")


@pytest.fixture
def session(stand_in):
    return ChatSession(*stand_in)


def ask_plainly(session, turns):
    """The answer to a whole conversation at once: turns are a question, its images, and the answer."""
    messages = []
    for question, images, answer in turns:
        blocks = [{"type": "image", "image": image} for image in images]
        messages.append({"role": "user", "content": [*blocks, {"type": "text", "text": question}]})
        messages += [{"role": "assistant", "content": answer}] if answer else []
    inputs = session.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = session.model.generate(**inputs)
    text = session.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_turns_equal_one_prompt_though_images_depend_on_later_text(session):
    """The keys and values of an image are those of one prompt only; reusing them changes the answers."""
    cached, turns = [], []
    hook = session.model.model.register_forward_pre_hook(lambda *_: cached.append(session._cache.get_seq_length()))
    for question, images in (("Hello.", []), ("What?", [WIDE, TALL]), ("And now?", []), ("Here?", [WIDE])):
        for image in images:
            session.add_image(image)
        cached.clear()
        answer = session.ask(question).text
        # What comes before the first image is reused.
        assert bool(cached[0]) == bool(turns)
        assert session.processor.image_token_id not in session._cached_ids[: cached[0]]
        turns.append((question, images, None))
        assert answer == ask_plainly(session, turns)
        turns[-1] = (question, images, answer)
    hook.remove()
    assert session.model.num_views == [3, 3, 3, 3, 5, 5]


def test_boxes_are_refused_and_images_have_none(stand_in, session):
    image = session.add_image(WIDE)
    assert (image.detections, image.objects) == (None, None)
    for boxes in ([], [[1, 2, 3, 4]]):
        with pytest.raises(ChatError, match="`boxes` must be None: this model has no boxes"):
            session.add_image(WIDE, boxes)
    with pytest.raises(ValueError, match="`detection_threshold` must be None: Stand-in has no boxes"):
        ChatSession(*stand_in, detection_threshold=0.5)


def test_terminal_does_not_mention_objects(session, tmp_path, monkeypatch, capsys):
    WIDE.save(tmp_path / "wide.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path / 'wide.png'}\nWhat?\n"))
    ChatTerminal(session, tmp_path / "drawn").run()
    written = capsys.readouterr()
    assert written.out.strip() and "30 x 10 pixels" in written.err
    assert "object" not in written.err and not (tmp_path / "drawn").exists()


def test_command_chats_and_refuses_options_of_boxes(stand_in_path, tmp_path):
    result = CliRunner().invoke(app, ["chat", stand_in_path], input="Hello.\n")
    assert result.exit_code == 0 and result.stdout.strip(), result.output
    (tmp_path / "boxes.json").write_text("[]")
    boxes = ["--boxes", tmp_path / "boxes.json"], ["--save-boxes", tmp_path]
    for options in (["--no-box-detector"], ["--threshold", "0.5"], *boxes):
        result = CliRunner().invoke(app, ["chat", stand_in_path, *map(str, options)])
        assert result.exit_code == 1
        assert f"{options[0]} must be left out: Stand-in has no boxes" in " ".join(result.output.split())
