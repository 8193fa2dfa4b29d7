"""Broken and hostile sources through the command line: one clear message each, and no file is written."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgllava.commands.console import printable
from mgllava.conversion import ConversionError, convert_checkpoint
from tests.model_files.torch_archives import flip, places, repack

from .conftest import options_of, run

DEEP = "[" * 100_000


@pytest.fixture
def folders(tmp_path, sources):
    """Copies of all sources, which a test breaks."""
    copies = {
        name: shutil.copytree(sources[name], tmp_path / name) for name in ("llm", "vision_tower", "high_res_tower")
    }
    return {**copies, "prompt_template": sources["prompt_template"]}


def _run(checkpoint, sources, output, *more):
    return run("convert", *options_of({"checkpoint": checkpoint, **sources, "output": output}), *more)


def _message(result):
    """Return the error message of a command."""
    assert result.exit_code == 1
    return result.output[result.output.index("error: ") :].strip()


def _broken(tmp_path, golden, folders, checkpoint="iter_10.pth"):
    """Return the error message of a conversion, and check that no file is left."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    path = checkpoint if isinstance(checkpoint, Path) else golden / "xtuner" / checkpoint
    message = _message(_run(path, folders, tmp_path / "out"))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    return message


@pytest.mark.parametrize("content", ["{", "[]", "null", DEEP, "\udcff", '"text"'])
@pytest.mark.parametrize(
    ("argument", "file"),
    [
        ("llm", "config.json"),
        ("llm", "tokenizer.json"),
        ("llm", "generation_config.json"),
        ("vision_tower", "config.json"),
        ("vision_tower", "preprocessor_config.json"),
        ("high_res_tower", "open_clip_config.json"),
    ],
)
def test_broken_json(tmp_path, golden, folders, argument, file, content):
    (folders[argument] / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    message = _broken(tmp_path, golden, folders)
    assert "\n" not in message and argument in message and str(folders[argument]) in message


@pytest.mark.parametrize(
    ("argument", "file", "content", "said"),
    [
        ("high_res_tower", "open_clip_config.json", {"model_cfg": []}, "must have a ConvNeXt"),
        ("high_res_tower", "open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": 3}}}, "names 3"),
        ("vision_tower", "preprocessor_config.json", {"image_mean": "gray"}, "must be three numbers, got 'gray'"),
        ("vision_tower", "preprocessor_config.json", {"image_std": [1, None, 2]}, "must be three numbers"),
        ("llm", "config.json", {"model_type": "llama", "hidden_size": "64"}, "config.json"),
        (
            "llm",
            "config.json",
            {"model_type": "llama", "num_hidden_layers": 10**9},
            "must be a number from 1 to 10000",
        ),
        ("llm", "config.json", {"model_type": "no_such_type"}, "config.json"),
        ("llm", "generation_config.json", {"eos_token_id": "</s>"}, "`eos_token_id`"),
    ],
)
def test_json_with_wrong_values(tmp_path, golden, folders, argument, file, content, said):
    path = folders[argument] / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **content}))
    assert said in _broken(tmp_path, golden, folders)


def test_quantized_language_model_is_refused(tmp_path, golden, folders):
    path = folders["llm"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    assert "is quantized" in _broken(tmp_path, golden, folders)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must have a `weight_map`"),
        ('{"weight_map": []}', "must have a `weight_map`"),
        ('{"weight_map": {"a": 3}}', "must name files next to it"),
        ('{"weight_map": {"a": "../vision_tower/model.safetensors"}}', "must name files next to it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "must name files next to it"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "names shards that do not exist: absent.safetensors"),
    ],
)
def test_broken_index(tmp_path, golden, folders, index, said):
    (folders["llm"] / "model.safetensors").unlink()
    (folders["llm"] / "model.safetensors.index.json").write_text(index)
    assert said in _broken(tmp_path, golden, folders, "iter_5_pretrain.pth")


def test_tensor_in_two_shards_or_under_two_names(tmp_path, golden, folders):
    weights = load_file(folders["llm"] / "model.safetensors")
    (folders["llm"] / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(weights, folders["llm"] / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(weights)}
    (folders["llm"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "another shard also has" in _broken(tmp_path, golden, folders, "iter_5_pretrain.pth")
    clip = load_file(folders["vision_tower"] / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    save_file(
        {**clip, name.removeprefix("vision_model."): clip[name] + 1}, folders["vision_tower"] / "model.safetensors"
    )
    assert "two tensors for one parameter" in _broken(tmp_path, golden, folders)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda state: {"state_dict": state, "meta": "text"}, "`meta` of"),
        (lambda state: {"state_dict": state, "meta": {3: 4}}, "`meta` of"),
        (lambda state: {"state_dict": {**state, 3: torch.zeros(1)}}, "whose names are text, got also 3"),
        (lambda state: {"state_dict": {**state, None: torch.zeros(1)}}, "whose names are text"),
        (lambda state: {"state_dict": {**state, "a": {"b": torch.zeros(1)}}}, "got also ('a', 'dict')"),
        (lambda state: {"state_dict": None}, "got NoneType"),
        (lambda state: [state], "it holds a list"),
        (lambda state: {"state_dict": {**state, "\x1b[31m\udcff\n": torch.zeros(1)}}, r"\x1b[31m\udcff"),
        (lambda state: {"state_dict": {**state, "projector.model.0.weight": torch.zeros(3)}}, "no matrix projector"),
        (lambda state: {"state_dict": {**state, "llm.model.embed_tokens.weight": torch.tensor(1.0)}}, "error: "),
        (lambda state: {"state_dict": {**state, "llm.model.embed_tokens.weight": torch.zeros(0, 64)}}, "error: "),
        (lambda state: {"state_dict": state, "meta": {"cfg": "image_size_aux = 99999999999999999999"}}, "error: "),
        (lambda state: {"state_dict": state, "meta": {"cfg": "image_size_aux = 999999999"}}, "error: "),
        (lambda state: {"state_dict": state, "meta": {"cfg": "image_size_aux = 0"}}, "error: "),
    ],
)
def test_checkpoints_with_wrong_values(tmp_path, golden, folders, golden_state, content, said):
    torch.save(content(golden_state("iter_10.pth")), tmp_path / "a.pth")
    assert said in _broken(tmp_path, golden, folders, tmp_path / "a.pth")


def test_strange_values_in_meta_are_kept_unchanged(tmp_path, golden, folders, golden_state):
    meta = {"cfg": "image_size_aux = 768", "note": "\udcff\x00", "big": 10**400, "nan": float("nan")}
    torch.save({"state_dict": golden_state("iter_10.pth"), "meta": meta}, tmp_path / "a.pth")
    result = _run(tmp_path / "a.pth", folders, tmp_path / "out")
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["checkpoint"]["meta"]
    assert kept["note"] == meta["note"] and kept["big"] == meta["big"]


def test_checkpoint_whose_name_is_not_unicode_is_converted(tmp_path, golden, folders):
    name = os.fsdecode(b"iter_\xff.pth")
    shutil.copy(golden / "xtuner" / "iter_10.pth", tmp_path / name)
    result = _run(tmp_path / name, folders, tmp_path / "out")
    assert result.exit_code == 0, repr(result.exception)


def test_stage_one_checkpoint_with_a_language_model_of_another_size(tmp_path, golden, folders, golden_state):
    path = folders["llm"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 128}))
    message = _broken(tmp_path, golden, folders, "iter_5_pretrain.pth")
    assert "--llm is not the one of the training: it is 128 channels wide" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "floof"], "--dtype must be auto, float32, float16, bfloat16, got floof"),
        (["--dtype", "float64"], "--dtype must be"),
        (["--dtype", ""], "--dtype must be"),
        (["--max-shard-size", "floof"], "--max-shard-size must be"),
        (["--max-shard-size", "-1GB"], "--max-shard-size must be"),
        (["--max-shard-size", "0"], "--max-shard-size must be"),
        (["--max-shard-size", "nanGB"], "--max-shard-size must be"),
        (["--lora-alpha", "nan"], "--lora-alpha must be a positive number"),
        (["--lora-alpha", "16"], "--lora-alpha is for LoRA checkpoints"),
    ],
)
def test_wrong_options(tmp_path, golden, sources, options, said):
    message = _message(_run(golden / "xtuner" / "iter_10.pth", sources, tmp_path / "out", *options))
    assert said in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("latest", ["../elsewhere", "/etc", "..", ".", "", "a/b", "\x1b[31m", "\udcff"])
def test_latest_file_does_not_lead_out_of_a_checkpoint(tmp_path, sources, golden_state, latest):
    (tmp_path / "elsewhere").mkdir()
    torch.save({"module": golden_state("iter_10.pth")}, tmp_path / "elsewhere" / "mp_rank_00_model_states.pt")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_bytes(latest.encode("utf-8", "surrogateescape"))
    message = _message(_run(tmp_path / "zero", sources, tmp_path / "out"))
    assert "must name a folder next to it" in message or "holds no *_model_states.pt" in message


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"module": 3},
        {"module": None, "meta": 3},
        {"optimizer_state_dict": []},
        {"buffer_names": 1, "param_shapes": 2},
    ],
)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_broken_deepspeed_folder(tmp_path, sources, content, with_optimizer):
    pytest.importorskip("deepspeed")
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    if with_optimizer:
        torch.save(content, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    message = _message(_run(tmp_path, sources, tmp_path / "out"))
    assert "\n" not in message


def test_messages_have_no_control_characters():
    assert printable("a\x1b[2Jb\udc80\r\x9bc\n") == "a\\x1b[2Jb\\udc80\\r\\x9bc\n"
    assert printable("größe 大きさ — 🙂") == "größe 大きさ — 🙂"


def test_compressed_checkpoint_converts_to_the_same_weights(tmp_path, golden, sources, converted):
    checkpoint = repack(golden / "xtuner" / "iter_10.pth", tmp_path / "iter_10.pth", zipfile.ZIP_DEFLATED)
    output = convert_checkpoint(checkpoint, **sources, output=tmp_path / "out")
    assert (output / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_flipped_byte_of_a_weight_stops_a_conversion_before_it_writes(tmp_path, golden, sources):
    path = shutil.copy(golden / "xtuner" / "iter_10.pth", tmp_path / "iter_10.pth")
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size).filename
    (place,) = places(path, largest)
    flip(path, place[len(place) // 2])
    with pytest.raises(ConversionError, match=rf"{largest} does not have the checksum"):
        convert_checkpoint(path, **sources, output=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["iter_10.pth"]


@pytest.mark.parametrize("argument", ["high_res_tower", "llm"])
def test_flipped_byte_of_another_source_is_noticed(tmp_path, golden, sources, argument):
    folder = tmp_path / "source"
    shutil.copytree(sources[argument], folder)
    if argument == "llm":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    (path,) = folder.glob("*.bin")
    place = max(places(path, "/data/"), key=len)
    flip(path, place[5])
    with pytest.raises(ConversionError, match="does not have the checksum"):
        convert_checkpoint(
            golden / "xtuner" / "iter_5_pretrain.pth", **{**sources, argument: folder}, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
