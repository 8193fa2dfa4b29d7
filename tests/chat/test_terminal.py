"""What the lines that users type do."""

import builtins
import io
import sys

import pytest
import torch
from PIL import Image

from mgllava.box_files import BoxFile
from mgllava.chat.terminal import ChatTerminal, find_file, find_image
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


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("my cup (2).tar.png", ["my_cup_2_.tar.jpg"]),
        ("https://example.org/a/cup.png?size=1.5", ["cup.jpg"]),
        ("https://example.org/?x", ["example.jpg"]),
        ("?", ["image.jpg"]),
        ("x" * 101, ["x" * 100 + ".jpg"]),
        *[(name, ["a.jpg", "a-2.jpg", "a-3.jpg"]) for name in ("a.png", "a.png,b/a.jpg,a.png")],
    ],
)
def test_pictures_have_the_names_of_images(run, tmp_path, name, files):
    pictures = [(one, Image.open(COFFEE)) for one in name.split(",")] * (3 if name == "a.png" else 1)
    _, notes = run(images=pictures)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(files)
    assert [line for line in notes.splitlines() if line.startswith("drawn in")] == [
        f"drawn in {tmp_path / 'pictures' / file}" for file in files
    ]
    assert Image.open(tmp_path / "pictures" / files[0]).format == "JPEG"


def test_without_a_folder_nothing_is_drawn(run, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, notes = run("What?", images=[("cup.png", Image.open(COFFEE))], folder=None)
    assert "cup.png: 600 x 400 pixels, 2 objects" in notes and "drawn" not in notes
    assert [image.name for image in session.images] == ["cup.png"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("objects", "rows"),
    [
        ({"boxes": [[1.4, 2.6, 30, 40]]}, [["label", "score", "x1", "y1", "x2", "y2"], ["1", "3", "30", "40"]]),
        ({"boxes": [[1, 2, 3, 4]], "labels": ["cup"]}, [["cup", "1", "2", "3", "4"]]),
        ({"boxes": [[1, 2, 3, 4]], "scores": [0.456]}, [["0.46", "1", "2", "3", "4"]]),
        ({"boxes": [], "labels": []}, []),
    ],
)
def test_objects_are_listed_with_what_is_known(run, tmp_path, objects, rows):
    _, notes = run(f"/image {COFFEE}", box_file=BoxFile([str(COFFEE)], [objects]))
    number = len(objects["boxes"])
    assert f"pixels, {number} object{'' if number == 1 else 's'}\n" in notes
    assert all(row in [line.split() for line in notes.splitlines()] for row in rows)
    assert (tmp_path / "pictures").exists() == bool(number)


def test_a_whole_list_is_not_cut(run, processor):
    boxes = [[20 * i, 0, 20 * i + 9, 9] for i in range(20)]
    processor.box_detector.detect = lambda images: [{"boxes": boxes, "labels": ["a"] * 20, "scores": [0.5] * 20}]
    _, notes = run(f"/image {COFFEE}")
    assert "20 objects" in notes and "more" not in notes


def test_records_of_videos_are_not_for_images(run, processor):
    _, notes = run(f"/image {COFFEE}", box_file=BoxFile(["coffee.jpg"], [{"frames": []}]))
    assert processor.box_detector.calls == 1 and "2 objects" in notes


class Typist:
    """A terminal in which someone types lines, and presses Ctrl-C and, after the last line, Ctrl-D."""

    def __init__(self, monkeypatch, *typed):
        self.typed, self.prompts = [*typed, EOFError], []
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr(builtins, "input", self.input)

    def isatty(self):
        return True

    def input(self, prompt):
        self.prompts.append(prompt)
        line = self.typed.pop(0)
        if not isinstance(line, str):
            raise line
        return line


def test_a_terminal_has_a_prompt_and_ctrl_c_does_not_end_it(session, monkeypatch, capsys):
    typist = Typist(monkeypatch, KeyboardInterrupt, "  Hello.  ", "")
    ChatTerminal(session).run()
    written = capsys.readouterr()
    assert typist.prompts == ["> "] * 4 and not typist.typed
    assert written.err.startswith("/image shows an image, /reset starts over, /exit quits, /help says more.\n")
    assert "\n(Ctrl-D or /exit quits)\n" in written.err and written.err.endswith("\n\n")
    assert session.messages[0]["content"] == [{"type": "text", "text": "Hello."}]
    assert written.out.strip() and written.out.count("\n") == 1 and len(session.messages) == 2


def test_a_pipe_has_neither_prompt_nor_hints(run, session, monkeypatch):
    monkeypatch.setattr(builtins, "input", None)
    session.generation_config.eos_token_id = list(range(1000))  # any token ends the answer
    _, notes = run("Hello.")
    assert notes == ""


@pytest.mark.parametrize("step", [1, 3])
def test_ctrl_c_stops_an_answer(session, model, monkeypatch, capsys, step):
    """Before the first token, the question is removed."""
    steps = []

    def interrupt(*_):
        steps.append(None)
        if len(steps) == step:
            raise KeyboardInterrupt

    hook = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
    Typist(monkeypatch, "Hello.")
    ChatTerminal(session).run()
    hook.remove()
    assert len(session.messages) == (0 if step == 1 else 2)
    assert capsys.readouterr().err.count("(stopped)\n") == 1


def test_ctrl_c_stops_the_search_for_objects(session, processor, monkeypatch, capsys):
    def interrupt(images):
        raise KeyboardInterrupt

    processor.box_detector.detect = interrupt
    Typist(monkeypatch, str(COFFEE), "Hello.")
    ChatTerminal(session).run()
    assert "\n(stopped)\n" in capsys.readouterr().err and not session.images and len(session.messages) == 2


def test_answers_that_were_cut_say_so(run, session):
    session.max_new_tokens = 3
    _, notes = run("Hello.")
    assert notes == "(cut after 3 tokens; --max-new-tokens allows more)\n"


def test_each_piece_of_an_answer_is_written_at_once(session, monkeypatch):
    class Output(io.StringIO):
        flushed = ()

        def flush(self):
            self.flushed = *self.flushed, self.getvalue()

    output = Output()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello."))
    monkeypatch.setattr(sys, "stdout", output)
    ChatTerminal(session).run()
    assert len(set(output.flushed)) > 2 and output.flushed[-1] == output.getvalue()


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


@pytest.mark.parametrize("word", ["EXIT", "exit", "/exit", "quit", "/quit", "QUIT"])
def test_exit_ends_the_chat(run, session, word):
    out, _ = run("Hello.", word, "Not asked.")
    assert len(session.messages) == 2 and out.endswith("\n")


@pytest.mark.parametrize("word", ["RESET", "/reset", "reset"])
def test_reset_starts_over(run, session, word):
    first, _ = run("Hello.", f"/image {COFFEE}", word, "Hello.")
    lines = first.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert session.images == []
    assert run(word)[1] == "(all turns and images are forgotten)\n"


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
    said = "no memory is left" if isinstance(error, MemoryError) else str(error)
    assert f"Out of memory: {said}\nThe question was not added." in notes and "--bits 4" in notes
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
    for question in ("notes", "absent.png", *questions, "x" * 9000, "\0.png", "", "cup.png cup.png"):
        assert find_image(question) is None
    assert find_file("notes") == "notes" and find_file("'notes'") == "notes" and find_file("notes notes") is None
