import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from mgllava import MGLlavaForConditionalGeneration
from mgllava.cli import app
from mgllava.conversion.detect import presets, prompt_templates, source_formats
from mgllava.model_files.vocabulary import STOP_WORDS
from mgllava.processing import CHAT_TEMPLATES, SLIME_CHAT_TEMPLATES


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _options(sources):
    return [part for name, value in sources.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize(
    ("checkpoint", "flags"),
    [
        ("iter_10.pth", []),
        ("iter_5_pretrain.pth", ["--dtype", "bfloat16"]),
        ("iter_8_lora.pth", ["--lora-alpha", "32"]),
        ("iter_5_with_message_hub.pth", ["--trust-pickle", "--max-shard-size", "500KB"]),
    ],
)
def test_convert_and_load(tmp_path, golden, sources, checkpoint, flags):
    output = tmp_path / "out"
    result = _run(
        "convert", "--checkpoint", golden / "xtuner" / checkpoint, *_options(sources), "--output", output, *flags
    )
    assert result.exit_code == 0, result.output
    assert f'from_pretrained("{output}")' in result.output
    _, info = MGLlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_convert_to_original(tmp_path, converted, golden_state):
    result = _run("convert", "--to-original", "--checkpoint", converted, "--output", tmp_path / "back.pth")
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert list(state) == list(golden_state("iter_10.pth"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "x.pth", "--output", "out"], "whose conversion needs --llm, --vision-tower"),
        (
            ["--checkpoint", "x", "--output", "y", "--to-original", "--llm", "z"],
            "takes --checkpoint and --output only",
        ),
        (["--checkpoint", "x", "--output", "y", "--to-original"], "must be the folder of an MG-LLaVA or SliME model"),
    ],
)
def test_wrong_use_is_one_message(arguments, said):
    result = _run("convert", *arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_damaged_checkpoint_is_one_message(tmp_path, sources):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    result = _run("convert", "--checkpoint", tmp_path / "cut.pth", *_options(sources), "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "error:" in result.output and "Is it truncated?" in result.output
    assert "Traceback" not in result.output


def test_help_lists_commands():
    assert "convert" in _run("--help").output


def test_templates_are_the_processors():
    assert set(prompt_templates()) == CHAT_TEMPLATES.keys() | SLIME_CHAT_TEMPLATES.keys() == STOP_WORDS.keys()


def test_presets_and_templates_of_a_new_family_are_taken(tmp_path, monkeypatch):
    import mgllava.conversion.xtuner as xtuner
    from mgllava.families import FAMILIES

    taken = []
    new = dataclasses.replace(
        xtuner.XTUNER, model_type="new", presets={"new-7b": {"llm": "a/llm", "prompt_template": "new"}}
    )
    monkeypatch.setattr(xtuner, "NEW", new, raising=False)
    monkeypatch.setattr(xtuner, "NEW_TEMPLATES", {"new": ""}, raising=False)
    names = {"source_formats": (f"{xtuner.__name__}:NEW",), "chat_templates": f"{xtuner.__name__}:NEW_TEMPLATES"}
    monkeypatch.setitem(FAMILIES, "new", dataclasses.replace(FAMILIES["mgllava"], **names))
    monkeypatch.setattr(
        "mgllava.conversion.convert.run_conversion", lambda _, **given: taken.append(given) or tmp_path
    )
    (tmp_path / "config.json").write_text('{"model_type": "new"}')
    options = ["--checkpoint", "x.pth", "--output", tmp_path / "out"]
    result = _run("convert", *options, "--preset", "new-7b", "--vision-tower", "a/clip")
    assert result.exit_code == 0, result.output
    expected = {"llm": "a/llm", "prompt_template": "new", "vision_tower": "a/clip"}
    options_of_the_format = [*expected, "high_res_tower", "lora_alpha"]
    assert {name: value for name in options_of_the_format if (value := taken[0][name]) is not None} == expected
    result = _run("convert", *options, "--preset", "no-such")
    assert result.exit_code == 2 and "'no-such' is not one of" in result.output and "'new-7b'" in result.output


def test_presets_have_a_name_of_their_own():
    assert len(presets()) == sum(len(one.presets) for one in source_formats())
