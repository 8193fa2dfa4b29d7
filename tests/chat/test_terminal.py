"""What the lines that users type do."""

import io
import sys

import pytest
import torch
from PIL import Image

from mgllava.box_files import BoxFile
from mgllava.chat.terminal import ChatTerminal, find_image
from tests.chat.conftest import COFFEE, PORTRAIT


@pytest.fixture
def run(session, monkeypatch, capsys, tmp_path):
    """Run lines through a chat; returns what went to stdout and to stderr, the latter without line breaks."""

    def run(*lines, images=(), box_file=None, folder=tmp_path / "pictures"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        ChatTerminal(session, folder, box_file).run(images)
        written = capsys.readouterr()
        return written.out, written.err

    return run


def test_boxes_are_listed_and_drawn(run, tmp_path):
    out, notes = run(f"/image {COFFEE}")
    assert out == ""
    assert "600 x 400 pixels, 2 objects" in notes
    rows = [line.split() for line in notes.splitlines()]
    assert ["label", "score", "x1", "y1", "x2", "y2"] in rows
    assert ["spoon", "0.90", "300", "200", "600", "400"] in rows
    assert ["[cup]", "0.50", "0", "0", "200", "133"] in rows
    picture = Image.open(tmp_path / "pictures" / "coffee.jpg")
    assert picture.size == (600, 400)
    assert max(abs(a - b) for a, b in zip(picture.getpixel((450, 201)), (41, 255, 255), strict=True)) < 120


def test_pictures_of_one_name_do_not_replace_each_other(run, tmp_path):
    other = tmp_path / "other" / "coffee.jpg"
    other.parent.mkdir()
    Image.new("RGB", (800, 30)).save(other)
    run(f"/image {COFFEE}", f"/image {other}")
    assert Image.open(tmp_path / "pictures" / "coffee.jpg").size == (600, 400)
    assert Image.open(tmp_path / "pictures" / "coffee-2.jpg").size[0] % 800 == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_reported(run, tmp_path):
    (tmp_path / "file").write_text("")
    _, notes = run(f"/image {COFFEE}", "What?", folder=tmp_path / "file")
    assert "The picture cannot be saved" in notes


@pytest.mark.parametrize("has_detector", [True, False])
def test_a_missing_detector_is_reported(run, processor, has_detector):
    if not has_detector:
        processor.box_detector = None
    _, notes = run(f"/image {COFFEE}")
    assert ("(there is no box detector to find them)" in notes) is not has_detector


def test_box_file_comes_before_the_detector(run, session, processor, tmp_path):
    records = [{"boxes": [[1, 2, 30, 40]], "labels": ["by name"], "scores": [0.7]}]
    _, notes = run(f"/image {COFFEE}", box_file=BoxFile(["coffee.jpg"], records))
    assert "1 object" in notes and "by name" in notes and processor.box_detector.calls == 0
    _, notes = run(f"/image {PORTRAIT}", box_file=BoxFile(["coffee.jpg"], records))
    assert "spoon" in notes and processor.box_detector.calls == 1


def test_long_lists_are_cut(run, session, processor):
    processor.box_detector.detect = lambda images: [
        {"boxes": [[20 * i, 0, 20 * i + 9, 9] for i in range(25)], "labels": ["a"] * 25, "scores": [0.5] * 25}
    ]
    _, notes = run(f"/image {COFFEE}")
    assert "25 objects" in notes and "and 5 more" in notes
    assert sum(line.startswith("a ") and "0.50" in line for line in notes.splitlines()) == 20


@pytest.mark.parametrize("word", ["EXIT", "exit", "/exit", "quit"])
def test_exit_ends_the_chat(run, session, word):
    out, _ = run("Hello.", word, "Not asked.")
    assert len(session.messages) == 2 and out.endswith("\n")


@pytest.mark.parametrize("word", ["RESET", "/reset"])
def test_reset_starts_over(run, session, word):
    first, _ = run("Hello.", f"/image {COFFEE}", word, "Hello.")
    lines = first.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert session.images == []


def test_mistakes_are_reported_and_the_chat_continues(run, session, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    out, notes = run("/image absent.png", "/image", "/frobnicate", str(tmp_path / "text.png"), "", "Hello.")
    for said in (
        "absent.png cannot be read as an image",
        "/image needs a path or URL",
        "/frobnicate is neither a command nor an image file",
        "text.png cannot be read as an image",
    ):
        assert said in notes
    assert len(session.messages) == 2 and out.strip()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_reported_and_the_chat_continues(run, session, model, error):
    calls = []

    def fail_once(*_):
        calls.append(None)
        if len(calls) == 2:
            raise error

    hook = model.lm_head.register_forward_pre_hook(fail_once)
    _, notes = run("Hello.", "How are you?")
    hook.remove()
    assert "Out of memory" in notes and "--bits 4" in notes
    assert [message["content"] for message in session.messages[::2]] == [[{"type": "text", "text": "How are you?"}]]


def test_bugs_are_not_hidden(run, session, model):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        run("Hello.")
    hook.remove()


def test_a_line_that_is_an_image_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my photo's.JPG"
    path.write_bytes(COFFEE.read_bytes())
    (tmp_path / "cup.png").write_bytes(b"")
    (tmp_path / "notes").write_text("What?")
    assert find_image(f" {path} ") == find_image(f'"{path}"') == str(path)
    assert find_image("my\\ photo\\'s.JPG") == "my photo's.JPG"
    assert find_image("~/cup.png") == str(tmp_path / "cup.png")
    assert find_image("https://example.org/cup?size=1") == "https://example.org/cup?size=1"
    questions = "What's in cup.png?", "See https://example.org/cup.png"
    for question in ("notes", "absent.png", *questions, "x" * 9000, "\0.png"):
        assert find_image(question) is None
