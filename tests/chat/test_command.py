"""The options of `mgllava chat`, and the command as users run it: in a pipe and in a terminal."""

import logging
import os
import pty
import select
import signal
import time
from copy import deepcopy

import pytest
from PIL import Image
from transformers import TextStreamer
from typer.testing import CliRunner

from mgllava.chat import ChatSession, command, loading
from mgllava.cli import app
from tests import processes
from tests.chat.conftest import COFFEE, TwoBoxes, assistant, user


@pytest.fixture
def own_config(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", deepcopy(model.generation_config))
    return model.generation_config


def test_stored_length_limit_is_replaced_without_warnings(model, processor, own_config, monkeypatch, caplog):
    """The generation config of a language model may have one, as Vicuna's does."""
    own_config.update(max_length=4096, max_new_tokens=None)
    session = ChatSession(model, processor, generation_config=command.generation_config(model))
    assert session.max_new_tokens == 512
    session.max_new_tokens = 3
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert session.ask("Hello.").num_tokens == 3
    # 5.16 warns of control tokens.
    assert [record.message for record in caplog.records if "control tokens" not in record.message] == []


def test_generation_options_override_those_of_the_model(model, own_config):
    own_config.update(do_sample=True, temperature=0.9, top_p=0.6, top_k=20)
    config = command.generation_config(model, max_new_tokens=7, temperature=0.5)
    assert (config.max_new_tokens, config.temperature, config.top_p) == (7, 0.5, 0.6)
    assert command.generation_config(model, top_p=0.3).temperature == 0.5
    greedy = command.generation_config(model, temperature=0.0)
    assert (greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k) == (False, None, None, None)
    assert command.generation_config(model, temperature=1.0).do_sample is True


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "3"], "--bits must be 4 or 8, got 3"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        *[
            (["--temperature", value], "--temperature must be 0 or between 1e-06 and 10000, got ")
            for value in ("-1", "9e-7", "10001", "nan", "inf")
        ],
        *[(["--top-p", value], "--top-p must be above 0 and at most 1, got ") for value in ("1.5", "0", "-1", "nan")],
        *[(["--seed", value], "--seed must be a whole number from 0 to 4294967295") for value in ("-1", "4294967296")],
        *[(["--threshold", value], "--threshold must be a number, got ") for value in ("nan", "inf")],
        (["--num-frames", "0"], "--num-frames must be at least 1, got 0"),
        (["--num-frames", "1", "--image", "absent.jpg"], "absent.jpg cannot be read as an image"),
        *[(["--dtype", value], "--dtype must be 'auto' or a dtype of torch") for value in ("float99", "nn", "")],
        (["--temperature", "0", "--top-p", "0.5"], "--top-p has no effect with a --temperature of 0"),
        (["--image", "absent.jpg"], "absent.jpg cannot be read as an image"),
        (["--boxes", "absent.json"], "absent.json"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(repository, monkeypatch, options, message):
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", None)
    result = CliRunner().invoke(app, ["chat", str(repository), *options])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    "options",
    [
        *(["--temperature", value] for value in ("0", "1e-6", "10000")),
        *(["--top-p", value] for value in ("1", "0.01")),
        *(["--seed", value] for value in ("0", "4294967295")),
        *(["--max-new-tokens", "1"], ["--temperature", "0", "--max-new-tokens", "2"]),
    ],
)
def test_values_at_the_limits_are_taken(stand_in_path, options):
    result = CliRunner().invoke(app, ["chat", stand_in_path, "--max-new-tokens", "3", *options], input="Hello.\n")
    assert result.exit_code == 0 and result.stdout.endswith("\n"), result.output
    length = int(options[-1]) if options[-2] == "--max-new-tokens" else 3
    assert f"(cut after {length} tokens" in result.stderr or "cut" not in result.stderr


def test_a_seed_makes_sampled_answers_the_same(stand_in_path):
    def ask(*options):
        options = "--temperature", "5", "--max-new-tokens", "12", *options
        return CliRunner().invoke(app, ["chat", stand_in_path, *options], input="Hello.\n").stdout

    assert ask("--seed", "1") == ask("--seed", "1") != ask("--seed", "2")
    assert len({ask() for _ in range(3)}) > 1


def test_images_and_system_message_are_those_of_the_options(stand_in, stand_in_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminals, run = [], command.ChatTerminal.run

    def run_and_note(self, images):
        terminals.append(self)
        run(self, images)

    monkeypatch.setattr(command.ChatTerminal, "run", run_and_note)
    Image.new("RGB", (30, 10)).save("a.png")
    options = ["--image", "a.png", "--image", str(tmp_path / "a.png"), "--system", "Be brief."]
    result = CliRunner().invoke(app, ["chat", stand_in_path, *options], input="What?\n")
    assert result.exit_code == 0 and "a.png: 30 x 10 pixels" in result.stderr, result.output
    (terminal,) = terminals
    assert [image.name for image in terminal.session.images] == ["a.png", str(tmp_path / "a.png")]
    assert terminal.session.messages[0] == {"role": "system", "content": "Be brief."}
    assert str(terminal.picture_folder) == "chat-boxes"


@pytest.mark.parametrize("name", ["chat", "serve"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"dtype": "auto", "device_map": "auto", "attn_implementation": None, "trust_remote_code": False}),
        (["--dtype", "bfloat16", "--device", "1"], {"dtype": "bfloat16", "device_map": 1}),
        (
            ["--device", "cuda:1", "--attn-implementation", "eager"],
            {"device_map": "cuda:1", "attn_implementation": "eager"},
        ),
        (["--trust-remote-code"], {"trust_remote_code": True, "quantization_config": None}),
    ],
)
def test_options_of_loading_reach_transformers(stand_in, stand_in_path, monkeypatch, name, options, expected):
    asked = []
    for loader in (loading.AutoConfig, loading.AutoProcessor, loading.AutoModelForImageTextToText):
        found = loader.from_pretrained()
        monkeypatch.setattr(loader, "from_pretrained", lambda _, found=found, **given: asked.append(given) or found)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    result = CliRunner().invoke(app, [name, stand_in_path, *options], input="")
    assert result.exit_code == 0, result.output
    assert {key: asked[2][key] for key in expected} == expected
    assert all(given["trust_remote_code"] == ("--trust-remote-code" in options) for given in asked)


def test_quantization_reaches_transformers(repository, monkeypatch):
    asked = []

    class LoadedError(ValueError):
        pass

    def stop(*_, quantization_config, **__):
        asked.append(quantization_config)
        raise LoadedError

    monkeypatch.setattr(loading, "quantization_of", lambda bits: f"{bits} bits")
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", stop)
    for options in ([], ["--bits", "8"]):
        CliRunner().invoke(app, ["chat", str(repository), *options])
    assert asked == [None, "8 bits"]


def test_the_detector_is_left_out(repository, served_detector, monkeypatch):
    found = []
    monkeypatch.setattr(command.ChatTerminal, "run", lambda self, images: found.append(self.session.processor))
    for options in ([], ["--no-box-detector"]):
        assert CliRunner().invoke(app, ["chat", str(repository), *options]).exit_code == 0
    assert [processor.box_detector is None for processor in found] == [False, True]


@pytest.fixture
def served_detector(monkeypatch):
    """Give loaded processors a detector."""
    load = loading.AutoProcessor.from_pretrained

    def from_pretrained(*arguments, **options):
        processor = load(*arguments, **options)
        processor.box_detector = TwoBoxes()
        return processor

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", from_pretrained)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_other_models_are_refused(tmp_path, command):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 1
    message = " ".join(result.output.split())
    assert (
        message.startswith("error: MODEL: ")
        and "must be MG-LLaVA ('mgllava') or SliME ('slime'), got 'llama'" in message
    )
    assert "`transformers serve`" in message


def arguments(repository, *options):
    return ["-m", "mgllava", "chat", repository, *options]


class Shown(TextStreamer):
    """Keeps what a terminal shows, which may differ from the answer: later bytes can change earlier characters."""

    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def test_questions_from_a_pipe_are_answered_in_a_plain_terminal(repository, tmp_path, ask_plainly, processor):
    lines = b"What is this?\n/image absent.png\nAnd \xff\xfe?\nRESET\nWhat is this?\nEXIT\nnever asked\n"
    done = processes.capture(
        *arguments(repository, "--image", COFFEE, "--max-new-tokens", 8, "--temperature", 0),
        input=lines,
        cwd=tmp_path,
        TERM="dumb",
        PYTHONIOENCODING="ascii",
    )
    errors = done.stderr
    assert done.returncode == 0 and errors.isascii(), errors
    shown = [Shown(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in range(3)]

    def ask(number, *messages):
        return ask_plainly(messages, streamer=shown[number], max_new_tokens=8, repetition_penalty=1.0)

    first = ask(0, user("What is this?", (COFFEE, [])))
    ask(1, user("What is this?", (COFFEE, [])), assistant(first), user("And \ufffd\ufffd?"))
    ask(2, user("What is this?"))
    assert done.stdout.splitlines() == [answer.text.strip().encode("ascii", "replace").decode() for answer in shown]
    assert "absent.png cannot be read as an image" in errors
    assert "600 x 400 pixels, 0 objects" in errors and "Traceback" not in errors
    assert "\x1b[" not in errors


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command, **options):
        self.master, self.slave = pty.openpty()
        self.process = processes.start(*command, terminal=os.ttyname(self.slave), **options)
        self.text = ""

    def wait_for(self, text, seconds=120, interrupting=False):
        """Read up to a text and return what came before it; `interrupting` presses Ctrl-C every second until then."""
        end = time.monotonic() + seconds
        while text not in self.text:
            if interrupting:
                os.killpg(self.process.pid, signal.SIGINT)
            patience = min(1, end - time.monotonic())
            assert patience > 0, f"{text!r} did not come; got {self.text!r}"
            if select.select([self.master], [], [], patience)[0]:
                self.text += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, text):
        os.write(self.master, text.encode())


def test_terminal_survives_interrupts_and_ends_with_ctrl_d(repository, tmp_path):
    box_file = tmp_path / "boxes.json"
    box_file.write_text('[{"id": "coffee.jpg", "boxes": [[172, 17, 410, 308]], "scores": [0.9], "labels": ["cup"]}]')
    command = arguments(repository, "--max-new-tokens", 7000, "--boxes", box_file, "--seed", 0, "--temperature", 3)
    terminal = Terminal(command, cwd=tmp_path, TERM="dumb")
    try:
        terminal.wait_for("/help says more.")
        terminal.wait_for("> ")
        # Several times: readline may miss a Ctrl-C that comes right after the prompt.
        terminal.wait_for("(Ctrl-D or /exit quits)", interrupting=True)
        terminal.wait_for("> ")
        terminal.type(f"{COFFEE}\n")
        assert "600 x 400 pixels, 1 object" in terminal.wait_for("drawn in chat-boxes/coffee.jpg")
        terminal.wait_for("> ")
        terminal.type("What is this?\n")
        terminal.wait_for("What is this?\r\n")
        terminal.wait_for(" ")  # the answer is being written
        terminal.wait_for("(stopped)", interrupting=True)
        terminal.wait_for("> ")
        terminal.type("/help\n")
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for("> ")
        terminal.type("\x04")
        terminal.process.join(60)
        assert terminal.process.exitcode == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
        os.close(terminal.slave)
    assert Image.open(tmp_path / "chat-boxes" / "coffee.jpg").size == (600, 400)
