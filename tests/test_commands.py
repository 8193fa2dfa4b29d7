"""The command line as a whole: shared options, revisions, version, and errors that name options."""

import runpy
import sys
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import mgllava
from mgllava.chat import loading
from mgllava.cli import app
from mgllava.commands.console import errors_as_messages
from mgllava.families.family import resolve
from mgllava.serving.limits import ServingLimits

COMMANDS = typer.main.get_command(app).commands
# Options with the same help in all commands that have them.
SHARED = {
    "--revision": {"chat", "serve", "export", "eval"},
    "--bits": {"chat", "serve", "eval"},
    "--device": {"chat", "serve", "eval"},
    "--attn-implementation": {"chat", "serve", "eval"},
    "--no-box-detector": {"chat", "serve"},
    "--save-boxes": {"chat", "detect"},
    "--threshold": {"chat", "detect"},
    "--dtype": {"chat", "serve", "eval", "convert", "convert-ram-plus"},
    "--max-shard-size": {"convert", "convert-ram-plus"},
    "--trust-pickle": {"convert", "convert-ram-plus"},
    "--trust-remote-code": {"chat", "serve", "detect", "eval"},
}


@pytest.mark.parametrize("word", SHARED)
def test_option_has_the_same_help_in_every_command(word):
    found = {
        name: parameter.help
        for name, command in COMMANDS.items()
        for parameter in command.params
        if word in (*parameter.opts, *parameter.secondary_opts)
    }
    assert found.keys() == SHARED[word]
    assert len(set(found.values())) == 1


# Parameters that an option sets under another name, so that errors can name both.
RENAMED = {
    "array_task": "--shard",
    "box_file": "--boxes",
    "detection_threshold": "--threshold",
    "images": "--image",
    "picture_folder": "--save-boxes",
    "show": "--save-boxes",
    "use_box_detector": "--no-box-detector",
    "api_keys": "--api-key",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_named_as_their_arguments(name):
    limits = ServingLimits.__dataclass_fields__ if name == "serve" else {}
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            words = [word for word in (*parameter.opts, *parameter.secondary_opts) if word.strip()]
            plain = f"--{parameter.name.replace('_', '-')}"
            if parameter.name in limits:
                assert words in ([plain], [f"--max-{plain[2:]}"])
            else:
                assert plain in words or RENAMED.get(parameter.name) in words, (parameter.name, words)


def test_model_is_the_positional_argument_of_commands():
    positional = {
        name: [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
        for name, command in COMMANDS.items()
    }
    assert {name for name, words in positional.items() if words == ["MODEL"]} == {"chat", "serve", "export", "eval"}
    assert not any("--model" in parameter.opts for command in COMMANDS.values() for parameter in command.params)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("convert", "mgllava.conversion:convert_checkpoint"),
        ("convert-ram-plus", "mgllava.conversion:convert_ram_plus"),
        ("detect", "mgllava.box_files:detect_images"),
        ("eval", "mgllava.evaluation:evaluate"),
        ("export", "mgllava.hub:export_repository"),
        ("train", "mgllava.training:train"),
    ],
)
def test_defaults_are_those_of_the_function(name, function):
    known = signature(resolve(function)).parameters
    options = {parameter.name: parameter.default for parameter in COMMANDS[name].params if not parameter.required}
    options.pop("array_task", None)  # the command parses it
    defaults = {option: known[option].default for option in options if option in known}
    defaults = {option: default for option, default in defaults.items() if default is not Parameter.empty}
    assert defaults
    assert {option: getattr(options[option], "value", options[option]) for option in defaults} == defaults


def test_switches_are_off():
    for name, command in COMMANDS.items():
        switches = {parameter.name: parameter for parameter in command.params if getattr(parameter, "is_flag", False)}
        on = {key for key, parameter in switches.items() if parameter.default and key != "help"}
        assert on == {"chat": {"use_box_detector"}, "serve": {"use_box_detector"}, "export": {"verify"}}.get(
            name, set()
        )


def test_the_server_is_local_and_images_come_from_public_addresses():
    defaults = {parameter.name: parameter.default for parameter in COMMANDS["serve"].params}
    expected = {"host": "localhost", "port": 8000, "allowed_image_hosts": "public", "engine": "transformers"}
    assert defaults == {**defaults, **expected, "log_level": "warning", "dtype": "auto", "device": "auto"}


@pytest.mark.parametrize("command", ["chat", "serve", "export"])
def test_revision_of_a_folder_is_refused(command, tmp_path):
    options = ["--output", str(tmp_path / "out")] if command == "export" else []
    result = CliRunner().invoke(app, [command, str(tmp_path), "--revision", "v1", *options])
    assert result.exit_code == 1
    assert f"--revision is for models on the Hub, but {tmp_path} is a folder." in result.output


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize(("options", "revision"), [([], "main"), (["--revision", "v1"], "v1")])
def test_configuration_processor_and_model_have_one_revision(command, options, revision, stand_in, monkeypatch):
    asked = []

    def load(found):
        def from_pretrained(name, revision, **_):
            asked.append((name, revision))
            return found

        return SimpleNamespace(from_pretrained=from_pretrained)

    model, processor = stand_in
    monkeypatch.setattr(loading, "AutoConfig", load(model.config))
    monkeypatch.setattr(loading, "AutoProcessor", load(processor))
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", load(model))
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    result = CliRunner().invoke(app, [command, "org/model", *options], input="")
    assert result.exit_code == 0, result.output
    assert asked == [("org/model", revision)] * 3


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_revision_in_the_name_is_refused(command):
    result = CliRunner().invoke(app, [command, "org/model@v1"])
    assert result.exit_code == 1
    assert "MODEL must be a folder or a Hub id, got org/model@v1. Name a revision with --revision." in result.output


def test_python_m_mgllava_prints_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mgllava", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mgllava", run_name="__main__")
    assert not ended.value.code and capsys.readouterr().out == f"mgllava {mgllava.__version__}\n"


def test_errors_name_options_where_functions_name_arguments():
    @errors_as_messages(ValueError)
    def command(
        model: Annotated[str, typer.Argument(metavar="MODEL")],
        box_file: Annotated[str, typer.Option("--boxes")] = "",
        use_box_detector: Annotated[bool, typer.Option(" /--no-box-detector")] = True,
        batch_size: Annotated[int, typer.Option()] = 1,
    ):
        raise ValueError(f"`model` {model}; `box_file`, `batch_size`, `use_box_detector=False`; `other`, `model.bits`")

    alone = typer.Typer()
    alone.command()(command)
    result = CliRunner().invoke(alone, ["`model`\x1b"])
    assert result.exit_code == 1
    assert "MODEL MODEL\\x1b; --boxes, --batch-size, --no-box-detector; `other`, `model.bits`" in result.output
