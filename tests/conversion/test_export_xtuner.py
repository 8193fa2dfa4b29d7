import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mgllava
from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration
from mgllava.conversion import ConversionError, convert_checkpoint, export_xtuner, read_checkpoint
from mgllava.folder_lock import FolderLock


def _load(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("size", ["5GB", "200KB"])
@pytest.mark.parametrize("name", ["iter_10.pth", "iter_5_pretrain.pth"])
def test_conversion_in_both_directions_is_identity(tmp_path, golden, sources, golden_state, name, size):
    first = convert_checkpoint(golden / "xtuner" / name, **sources, output=tmp_path / "a", max_shard_size=size)
    exported = export_xtuner(first, tmp_path / "back.pth")
    _assert_same_state(_load(exported), golden_state(name))
    second = convert_checkpoint(exported, **sources, output=tmp_path / "b", max_shard_size=size)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.iterdir():
        if path.name != "conversion_report.json":
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_file_is_no_larger_than_its_tensors(tmp_path, converted):
    exported = export_xtuner(converted, tmp_path / "back.pth")
    state = _load(exported)
    assert state["llm.lm_head.weight"].untyped_storage().nbytes() == 420 * 64 * 4
    total = sum(value.nbytes for value in state.values())
    assert exported.stat().st_size < total + 64 * 1024


def test_meta_keeps_what_the_runner_said(tmp_path, converted, golden):
    checkpoint = read_checkpoint(export_xtuner(converted, tmp_path / "back.pth"))
    assert checkpoint.meta["iter"] == 10
    assert "image_size_aux = 768" in checkpoint.config_text


def test_lora_is_written_merged(tmp_path, golden, sources, golden_state):
    first = convert_checkpoint(golden / "xtuner" / "iter_8_lora.pth", **sources, output=tmp_path / "a")
    exported = export_xtuner(first, tmp_path / "back.pth")
    assert _load(exported).keys() == golden_state("iter_10.pth").keys()
    second = convert_checkpoint(exported, **sources, output=tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_model_folder_without_report_is_written_with_its_language_model(tmp_path, converted, golden_state):
    model = MGLlavaForConditionalGeneration.from_pretrained(converted)
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    exported = export_xtuner(tmp_path / "saved", tmp_path / "back.pth")
    state, original = _load(exported), golden_state("iter_10.pth")
    assert state.keys() == original.keys()
    for name, value in original.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert "image_size_aux = 768" in read_checkpoint(exported).config_text


def test_tied_head_is_written_as_xtuner_does(tmp_path, sources, golden, golden_state, edit_folder):
    sources = {**sources, "llm": edit_folder(golden / "llm", tie_word_embeddings=True)}
    state = golden_state("iter_10.pth")
    state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "tied.pth")
    first = convert_checkpoint(tmp_path / "tied.pth", **sources, output=tmp_path / "a")
    exported = export_xtuner(first, tmp_path / "back.pth")
    _assert_same_state(_load(exported), state)
    (first / "conversion_report.json").unlink()
    assert "llm.lm_head.weight" in _load(export_xtuner(first, tmp_path / "whole.pth"))


def test_output_is_replaced_only_with_overwrite(tmp_path, converted):
    path = tmp_path / "back.pth"
    path.write_bytes(b"mine")
    with pytest.raises(ConversionError, match="exists"):
        export_xtuner(converted, path)
    assert path.read_bytes() == b"mine"
    export_xtuner(converted, path, overwrite=True)
    assert "llm.lm_head.weight" in _load(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"back.pth"}


def test_other_model_folders_are_refused(tmp_path, golden):
    with pytest.raises(ConversionError, match="model type 'llama'"):
        export_xtuner(golden / "llm", tmp_path / "back.pth")
    with pytest.raises(ConversionError, match="has no config"):
        export_xtuner(tmp_path, tmp_path / "back.pth")


def test_variant_that_xtuner_does_not_know_is_refused(tmp_path, converted):
    config = MGLlavaConfig.from_pretrained(converted)
    config.object_merging = "box_to_fused"
    MGLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConversionError, match="no place for"):
        export_xtuner(tmp_path / "saved", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_model_is_refused(tmp_path, converted, bits):
    options = {"quantization_config": mgllava.quantization_config(bits), "dtype": torch.bfloat16}
    MGLlavaForConditionalGeneration.from_pretrained(converted, **options).save_pretrained(tmp_path / "packed")
    with pytest.raises(ConversionError, match=r"is quantized \(bitsandbytes\)"):
        export_xtuner(tmp_path / "packed", tmp_path / "back.pth")
    # Also if the config does not say so.
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError):
        export_xtuner(tmp_path / "packed", tmp_path / "back.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_packed_weights_are_refused_in_both_directions(tmp_path, converted, sources, golden_state, dtype):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    repository = shutil.copytree(converted, tmp_path / "repository")
    weights = load_file(repository / "model.safetensors")
    weights[name] = weights[name].to(dtype)
    save_file(weights, repository / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"wrong dtype: 1\n  {name}"):
        export_xtuner(repository, tmp_path / "back.pth")
    state = golden_state("iter_10.pth")
    for key in ("llm.model.layers.0.mlp.up_proj.weight", "llm.model.embed_tokens.weight"):
        torch.save({"state_dict": {**state, key: state[key].to(dtype)}}, tmp_path / "packed.pth")
        with pytest.raises(ConversionError, match="wrong dtype: 1\n"):
            convert_checkpoint(tmp_path / "packed.pth", **sources, output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "back.pth").exists()


def test_weights_of_another_shape_are_refused(tmp_path, converted):
    repository = shutil.copytree(converted, tmp_path / "repository")
    weights = load_file(repository / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :32].contiguous()
    save_file(weights, repository / "model.safetensors")
    with pytest.raises(ConversionError, match="wrong shape: 1"):
        export_xtuner(repository, tmp_path / "back.pth")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"checkpoint": {"keys": [1], "kind": "sft", "meta": {}}}'])
def test_damaged_report_is_one_message(tmp_path, converted, content):
    repository = shutil.copytree(converted, tmp_path / "repository")
    (repository / "conversion_report.json").write_text(content)
    with pytest.raises(ConversionError, match=r"conversion_report\.json"):
        export_xtuner(repository, tmp_path / "back.pth")


def test_output_that_is_a_link_and_partial_files_of_the_user(tmp_path, converted):
    (tmp_path / "disk").mkdir()
    (tmp_path / "back.pth").symlink_to(tmp_path / "disk" / "weights.pth")
    (tmp_path / "back.pth.partial").write_text("mine")
    (tmp_path / "disk" / ".weights.pth.0123abcd.partial").write_text("left by a run that was killed")
    export_xtuner(converted, tmp_path / "back.pth")
    assert (tmp_path / "back.pth").is_symlink() and _load(tmp_path / "disk" / "weights.pth")
    assert (tmp_path / "back.pth.partial").read_text() == "mine"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["weights.pth"]


def _edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_outputs_that_cannot_be_written(tmp_path, converted):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (("folder", "is a folder. Choose a file"), ("loop", "is a link that leads nowhere")):
        with pytest.raises(ConversionError, match=said):
            export_xtuner(converted, tmp_path / name, overwrite=True)
    repository = shutil.copytree(converted, tmp_path / "repository")
    weights = (repository / "model.safetensors").read_bytes()
    with pytest.raises(ConversionError, match="holds weights of the model folder"):
        export_xtuner(repository, repository / "model.safetensors", overwrite=True)
    assert (repository / "model.safetensors").read_bytes() == weights
    with (
        FolderLock(tmp_path / "back.pth", "writing"),
        pytest.raises(ConversionError, match=r"writing back\.pth|is being"),
    ):
        export_xtuner(converted, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_full_disk_stops_before_writing(tmp_path, converted, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConversionError, match="Not enough disk space"):
        export_xtuner(converted, tmp_path / "back.pth")
    assert list(tmp_path.iterdir()) == []


def test_model_folders_that_are_damaged_are_refused(tmp_path, converted):
    with pytest.raises(ConversionError, match=r"must be a model folder of MG-LLaVA, but .* is not a folder"):
        export_xtuner(converted / "config.json", tmp_path / "back.pth")
    repository = shutil.copytree(converted, tmp_path / "repository")
    config = json.loads((repository / "config.json").read_text())
    changes = {
        "cannot be read": {"text_config": 3},
        "No model can be built": {"text_config": {**config["text_config"], "hidden_act": "no such function"}},
        r"is quantized \(gptq\)": {"vision_config": {"quantization_config": {"quant_method": "gptq"}}},
        r"is quantized \(compression_config\)": {"compression_config": 3},
    }
    for said, change in changes.items():
        _edit(repository / "config.json", **{**config, **change})
        with pytest.raises(ConversionError, match=said):
            export_xtuner(repository, tmp_path / "back.pth")
        (repository / "config.json").write_text(json.dumps(config))
    assert not (tmp_path / "back.pth").exists()


def test_report_that_lists_lost_tensors_is_refused(tmp_path, converted):
    repository = shutil.copytree(converted, tmp_path / "repository")
    report = json.loads((repository / "conversion_report.json").read_text())
    keys = report["checkpoint"]["keys"]
    # A buffer of older checkpoints, and a tower, are not lost.
    for more in ("llm.model.layers.0.self_attn.rotary_emb.inv_freq", "visual_encoder.vision_model.x"):
        keys.insert(0, more)
    (repository / "conversion_report.json").write_text(json.dumps(report))
    assert list(_load(export_xtuner(repository, tmp_path / "back.pth"))) == keys[2:]
    keys.append("llm.model.layers.7.mlp.up_proj.weight")
    (repository / "conversion_report.json").write_text(json.dumps(report))
    with pytest.raises(ConversionError, match=r"lists: llm\.model\.layers\.7\.mlp\.up_proj\.weight\."):
        export_xtuner(repository, tmp_path / "other.pth")


def test_version_and_image_size_are_in_the_metadata(tmp_path, converted):
    repository = shutil.copytree(converted, tmp_path / "repository")
    report = json.loads((repository / "conversion_report.json").read_text())
    report["checkpoint"]["meta"] = {"epoch": 3}
    (repository / "conversion_report.json").write_text(json.dumps(report))
    meta = torch.load(export_xtuner(repository, tmp_path / "back.pth"), weights_only=True)["meta"]
    assert meta == {"cfg": "image_size_aux = 768\n", "epoch": 3, "mgllava_version": mgllava.__version__}
