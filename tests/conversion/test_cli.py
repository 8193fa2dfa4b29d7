import dataclasses
import json

import pytest
import torch

from mgllava import MGLlavaForConditionalGeneration
from mgllava.conversion import xtuner
from mgllava.conversion.detect import presets, prompt_templates, source_formats
from mgllava.families import FAMILIES
from mgllava.model_files.vocabulary import STOP_WORDS
from mgllava.processing import CHAT_TEMPLATES, SLIME_CHAT_TEMPLATES

from .conftest import options_of, run


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
    arguments = {"checkpoint": golden / "xtuner" / checkpoint, **sources, "output": output}
    result = run("convert", *options_of(arguments), *flags)
    assert result.exit_code == 0, result.output
    assert f'from_pretrained("{output}")' in result.output
    model, info = MGLlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.generation_config.suppress_tokens == model.config.unused_token_ids
    if "--max-shard-size" in flags:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) == len(list(output.glob("*.safetensors"))) > 1


def test_convert_to_original(tmp_path, converted, golden_state):
    result = run("convert", "--to-original", "--checkpoint", converted, "--output", tmp_path / "back.pth")
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
    result = run("convert", *arguments)
    assert result.exit_code == 1
    assert said in result.output


def test_prompt_templates_are_the_processors():
    assert set(prompt_templates()) == CHAT_TEMPLATES.keys() | SLIME_CHAT_TEMPLATES.keys() == STOP_WORDS.keys()


def test_presets_and_templates_of_a_new_family_are_accepted(tmp_path, monkeypatch):
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
    result = run("convert", *options, "--preset", "new-7b", "--vision-tower", "a/clip")
    assert result.exit_code == 0, result.output
    expected = {"llm": "a/llm", "prompt_template": "new", "vision_tower": "a/clip"}
    options_of_the_format = [*expected, "high_res_tower", "lora_alpha"]
    assert {name: value for name in options_of_the_format if (value := taken[0][name]) is not None} == expected
    result = run("convert", *options, "--preset", "no-such")
    assert result.exit_code == 2 and "'no-such' is not one of" in result.output and "'new-7b'" in result.output


def test_no_two_presets_have_the_same_name():
    assert len(presets()) == sum(len(one.presets) for one in source_formats())
