"""Checkpoints of SliME: the original's numbers after a conversion, the way back, and what is refused."""

import json
import shutil
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPImageProcessor, CLIPVisionConfig

from mgllava import SlimeConfig
from mgllava.conversion import ConversionError, convert_checkpoint, export_original, fetch
from mgllava.conversion.detect import presets
from mgllava.conversion.slime import SLIME, SLIME_LORA, SLIME_STAGE
from mgllava.conversion.slime.adapter import open_adapter
from mgllava.conversion.slime.key_mapping import to_model, to_original
from mgllava.conversion.slime.new_modules import add_positions
from mgllava.conversion.slime.processor import separator_of
from mgllava.conversion.source_format import GatheredTensors
from mgllava.model_files import sources as model_sources
from mgllava.model_files.lazy_tensor import from_tensor
from mgllava.model_files.tensor_files import open_weights
from mgllava.modeling.adapters_slime import sincos_positions
from mgllava.processing import SLIME_CHAT_TEMPLATES
from tests.conversion.test_hub_ids import FakeHub
from tests.slime.golden import GOLDEN, cases, image_path, tensors

CHECKPOINT, LORA, LLM = GOLDEN / "checkpoint", GOLDEN / "more" / "lora" / "adapter", GOLDEN / "more" / "lora" / "base"
TOWER = CHECKPOINT / "vision_tower"


def _weights(folder):
    return {
        name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in load_file(path).items()
    }


def _same(first, second):
    """Whether two folders hold the same weights, but for the padding of tables, a mean, which rounding changes."""
    first, second = _weights(first), _weights(second)
    rows = {"model.language_model.embed_tokens.weight": 300, "lm_head.weight": 300}
    return first.keys() == second.keys() and all(
        torch.equal(first[name][: rows.get(name)], second[name][: rows.get(name)]) for name in first
    )


def _report(folder):
    return json.loads((folder / "conversion_report.json").read_text())


def _edit(path, **values):
    content = json.loads(path.read_text())
    content |= values
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def _failure(checkpoint, tmp_path, **options):
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(checkpoint, **options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.incomplete").exists()
    return str(error.value)


def _logits(folder, case, count=64):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    prompt = case.get("prompt") or cases()["case0_landscape_640x360"]["prompt"]
    inputs = processor(image_path(case), prompt, return_tensors="pt")
    with torch.no_grad():
        return model, inputs, model(**inputs).logits[0, -count:, :300]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the golden release, to be changed."""
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(LORA, tmp_path / "adapter")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden release in the dtype of its file."""
    return convert_checkpoint(CHECKPOINT, output=tmp_path_factory.mktemp("slime") / "model")


def test_release_gives_the_numbers_of_the_original(tmp_path):
    folder = convert_checkpoint(CHECKPOINT, output=tmp_path / "model", dtype="float32")
    case = cases()["case0_landscape_640x360"]
    expected = tensors(case)
    model, inputs, logits = _logits(folder, case, 1)
    torch.testing.assert_close(logits[-1], expected["logits"][-1], atol=5e-4, rtol=0)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == expected["generated_ids"][0].tolist()
    assert model.generation_config.pad_token_id == 0 and 300 in model.generation_config.suppress_tokens


def test_every_tensor_is_used_or_listed(converted):
    dropped = _report(converted)["dropped"]
    used = _report(converted)["tensors"]
    own = {name for names in dropped["checkpoint"].values() for name in names}
    assert own == {f"model.mm_projector.{name}" for name in ("mean", "std", "w_noise")}
    listed = {name for names in dropped["renamed"].values() for name in names}
    assert listed and all("encoder.layers.2." in name or "post_layernorm" in name for name in listed)
    packed = sum("in_proj" in name for name in _weights(CHECKPOINT))
    assert len(used) + len(own) + len(listed) == len(_weights(CHECKPOINT)) + 2 * packed
    assert _report(converted)["checkpoint"]["unused_config"]["tokenizer_model_max_length"] == 2048
    assert _report(converted)["notes"] == _report(converted)["initialized"] == _report(converted)["computed"] == []
    facts = {"kind": "release", "has_vision_tower": True, "table_rows": 300, "used_rows": 300, "pad_token_id": 0}
    assert _report(converted)["checkpoint"].items() >= {**facts, "prompt_template": "v1"}.items()
    files = {
        source: {Path(e["file"]).name for e in entries} for source, entries in _report(converted)["sources"].items()
    }
    names = {path.name for path in CHECKPOINT.iterdir() if path.is_file()} - {"special_tokens_map.json"}
    assert files["checkpoint"] == names - {"model.safetensors.index.json"}


@pytest.mark.parametrize("has_tower", [True, False])
def test_pickled_shards_and_releases_without_clip_give_the_same_weights(tmp_path, checkpoint, converted, has_tower):
    names = {}
    for path in list(checkpoint.glob("model-*.safetensors")):
        file = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        weights = {name: value for name, value in load_file(path).items() if has_tower or "vision_tower" not in name}
        torch.save(weights, checkpoint / file)
        names |= dict.fromkeys(weights, file)
        path.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    again = convert_checkpoint(checkpoint, output=tmp_path / "out")
    assert _same(again, converted)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_there_and_back_gives_every_tensor_and_value(tmp_path, dtype):
    folder = convert_checkpoint(CHECKPOINT, output=tmp_path / "model", dtype=dtype)
    back = export_original(folder, tmp_path / "back")
    old, new = _weights(CHECKPOINT), _weights(back)
    unused = {name for name in old if "layers.2." in name or "post_layernorm" in name}
    assert new.keys() == old.keys() - unused
    for name, value in new.items():
        assert torch.equal(value.bfloat16(), old[name]) or name.endswith("w_noise"), name
    config = json.loads((back / "config.json").read_text())
    expected = json.loads((CHECKPOINT / "config.json").read_text())
    expected["torch_dtype"] = {"auto": "bfloat16"}.get(dtype, dtype)
    assert config == expected
    again = convert_checkpoint(back, output=tmp_path / "again")
    assert _same(folder, again)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    ours, theirs = (json.loads((path / "tokenizer.json").read_text()) for path in (back, CHECKPOINT))
    # The releases that the original runs with read merges as text only, and know no other class.
    assert ours["added_tokens"] == theirs["added_tokens"] and ours["model"]["merges"] == theirs["model"]["merges"]
    ours, theirs = (json.loads((path / "tokenizer_config.json").read_text()) for path in (back, CHECKPOINT))
    assert {name: ours.get(name) for name in theirs} == theirs
    with pytest.raises(ConversionError, match="exists"):
        export_original(folder, back)
    assert export_original(folder, back, overwrite=True) == back


def test_vision_tower_next_to_an_exported_checkpoint(tmp_path, converted):
    """Where no Hub id names it: transformers loads it as a CLIP with its image processor."""
    folder = shutil.copytree(converted, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.25, 0.5, 0.75]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    tower = export_original(folder, tmp_path / "back") / "vision_tower"
    assert json.loads((tower.parent / "config.json").read_text())["mm_vision_tower"] == "vision_tower"
    ours, theirs = (CLIPVisionConfig.from_pretrained(path) for path in (tower, TOWER))
    assert ours.num_hidden_layers == theirs.num_hidden_layers and ours.hidden_size == theirs.hidden_size
    assert json.loads((tower / "config.json").read_text())["architectures"] == ["CLIPVisionModel"]
    processor, original = CLIPImageProcessor.from_pretrained(tower), CLIPImageProcessor()
    assert tuple(processor.image_mean) == (0.25, 0.5, 0.75)
    assert tuple(processor.image_std) == tuple(original.image_std)
    assert processor.size == {"shortest_edge": 336} and processor.crop_size == {"height": 336, "width": 336}
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "resample"):
        assert getattr(processor, name) == getattr(original, name), name
    assert processor.rescale_factor == original.rescale_factor
    written = json.loads((tower / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor" and len(written) == 12
    weights = load_file(tower / "model.safetensors")
    assert weights and all(name.startswith("vision_model.") for name in weights)


def test_exports_in_several_shards_are_the_same(tmp_path, converted, monkeypatch):
    monkeypatch.setattr("mgllava.conversion.slime.export._SHARD_SIZE", "200KB")
    back = export_original(converted, tmp_path / "back")
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert _same(convert_checkpoint(back, output=tmp_path / "again"), converted)


def test_model_folders_that_are_not_exported(tmp_path, converted, caplog):
    folder = shutil.copytree(converted, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def fails(said, name, content):
        path = folder / name
        old = path.read_bytes()
        path.write_text(content)
        with pytest.raises(ConversionError, match=said):
            export_original(folder, tmp_path / "back")
        path.write_bytes(old)
        assert not (tmp_path / "back").exists()

    text = {**config["text_config"], "model_type": "mistral"}
    fails("has Llama for its language model", "config.json", json.dumps({**config, "text_config": text}))
    fails(r"generation_config\.json of .* cannot be read", "generation_config.json", "{")
    fails("The tokenizer in .* cannot be read", "tokenizer.json", "{")
    assert "router_sees_answers" not in caplog.text
    _edit(folder / "config.json", router_sees_answers=False)
    back = export_original(folder, tmp_path / "back")
    assert "The original has no `router_sees_answers=False`" in caplog.text
    # Weights in the output that would be replaced.
    (folder / "model.safetensors").rename(back / "own.safetensors")
    (folder / "model.safetensors").symlink_to(back / "own.safetensors")
    with pytest.raises(ConversionError, match="which would be replaced"):
        export_original(folder, back, overwrite=True)


def test_placeholder_is_no_special_token_of_an_export(tmp_path, converted):
    folder = shutil.copytree(converted, tmp_path / "model")
    names = ("extra_special_tokens", "additional_special_tokens")
    _edit(folder / "tokenizer_config.json", **{name: ["<image>", "</s>"] for name in names})
    back = export_original(folder, tmp_path / "back")
    settings = json.loads((back / "tokenizer_config.json").read_text())
    found = [settings[name] for name in names if name in settings]
    assert found and all(tokens == ["</s>"] for tokens in found)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["padding_side"] == "right"
    unknown = {
        "backend",
        "is_local",
        "local_files_only",
        "chat_template",
        "image_token",
        "processor_class",
        "auto_map",
    }
    assert not unknown & settings.keys()


def test_models_that_were_not_converted_are_exported_whole(tmp_path, converted):
    folder = shutil.copytree(converted, tmp_path / "model")
    (folder / "conversion_report.json").unlink()
    back = export_original(folder, tmp_path / "back")
    again = convert_checkpoint(back, output=tmp_path / "again")
    assert _same(folder, again)
    first, second = ((path / "config.json").read_text() for path in (folder, again))
    assert json.loads(first) == json.loads(second)


def test_lora_release_is_merged(tmp_path):
    folder = convert_checkpoint(LORA, LLM, TOWER, output=tmp_path / "model", dtype="float32")
    case = cases()["lora_merged"]
    expected = tensors(case)["logits_last64"][0]
    _, inputs, logits = _logits(folder, case)
    is_text = inputs["input_ids"][0, -64:] != 300
    # Placeholders that are dropped have no logits, so the text at the end is compared.
    count = int(is_text.flip(0).cumprod(0).sum())
    torch.testing.assert_close(logits[-count:], expected[-count:], atol=5e-4, rtol=0)
    assert _report(folder)["computed"] == [
        "model.multi_modal_projector.query_adapter.positions",
        "model.local_compressor.positions",
    ]
    settings = json.loads((LORA / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "use_rslora", "base_model_name_or_path")
    assert _report(folder)["checkpoint"]["lora"] == {name: settings.get(name) for name in names}
    assert _report(folder)["checkpoint"]["kind"] == "lora" and settings["lora_alpha"] > 0


def test_positions_in_a_lora_release_are_used(tmp_path, adapter):
    state = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    state["base_model.model.model.sampler.post_qformer.pos_embed"] = torch.full((16, 128), 0.25)
    torch.save(state, adapter / "non_lora_trainables.bin")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = _weights(convert_checkpoint(adapter, LLM, TOWER, output=tmp_path / "out"))
    assert found["model.local_compressor.positions"].eq(0.25).all()
    positions = found["model.multi_modal_projector.query_adapter.positions"]
    assert torch.equal(positions, sincos_positions(24, 128).bfloat16())


def test_rank_of_a_module_scales_its_update(tmp_path, adapter):
    """`rank_pattern` makes some updates of another rank, which the factor follows."""
    path = adapter / "adapter_model.safetensors"
    weights, name = load_file(path), "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights[name.format("A")] = torch.eye(64)[:2].bfloat16()
    weights[name.format("B")] = torch.ones(64, 2, dtype=torch.bfloat16)
    save_file(weights, path)
    _edit(adapter / "adapter_config.json", rank_pattern={"q_proj": 2})
    found = _weights(convert_checkpoint(adapter, LLM, TOWER, output=tmp_path / "out", dtype="float32"))
    base = load_file(LLM / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    update = found["model.language_model.layers.0.self_attn.q_proj.weight"] - base
    torch.testing.assert_close(update[:, :2], torch.full((64, 2), 8 / 2), atol=0.05, rtol=0)
    assert not update[:, 2:].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha_pattern": {"q_proj": 3}}, "`alpha_pattern`"),
        ({"use_dora": True}, "`use_dora`"),
        ({"peft_type": "IA3"}, "`peft_type`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights`"),
        ({"modules_to_save": ["lm_head"]}, "does not hold lm_head"),
        ({"lora_alpha": "absent"}, "`lora_alpha`"),
        ({"target_modules": ["q_proj", "k_proj", "lm_head"]}, "lacks the updates of 1 of the modules"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"bias": "all"}, "`bias`"),
        ({"layer_replication": [[0, 1]]}, "`layer_replication`"),
        ({"target_parameters": ["x"]}, "`target_parameters`"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` in adapter_config.json must be a list of names"),
        ({"modules_to_save": [3]}, "`modules_to_save` in adapter_config.json must be a list of names"),
        *(({"lora_alpha": value}, "`lora_alpha`") for value in (0, -1, "8", True, float("nan"))),
    ],
)
def test_adapter_of_another_kind_is_refused(tmp_path, adapter, settings, said):
    _edit(adapter / "adapter_config.json", **settings)
    assert said in _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": value} for value in (True, False, None, "gaussian", "eva", "orthogonal")),
        *({name: None} for name in ("fan_in_fan_out", "use_dora", "lora_bias", "bias", "alpha_pattern")),
        *({name: False} for name in ("fan_in_fan_out", "use_dora", "lora_bias", "use_qalora", "use_rslora")),
        *({name: []} for name in ("layer_replication", "target_parameters", "trainable_token_indices")),
        *({name: {}} for name in ("alpha_pattern", "rank_pattern", "trainable_token_indices")),
        *({name: [3]} for name in ("layers_to_transform", "layers_pattern", "exclude_modules")),
    ],
    ids=str,
)
def test_settings_that_leave_plain_lora_are_taken(adapter, settings):
    """Where only some layers were trained, a module without an update is none that is lost."""
    if [3] in settings.values():
        settings = {**settings, "target_modules": ["q_proj", "k_proj", "lm_head"]}
    _edit(adapter / "adapter_config.json", **settings)
    merged, unexpected = open_adapter(adapter, False).merge(open_weights(LLM)[0])
    assert merged and not unexpected


@pytest.mark.parametrize(("use_rslora", "factor"), [(False, 8 / 4), (True, 8 / 2)])
def test_update_is_scaled_by_the_rank_or_its_root(tmp_path, adapter, use_rslora, factor):
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    low_a, low_b = torch.randn(4, 64), torch.randn(64, 4)
    save_file(
        {f"{name}.lora_A.weight": low_a, f"{name}.lora_B.default.weight": low_b}, adapter / "adapter_model.safetensors"
    )
    settings = {"lora_alpha": 8, "use_rslora": use_rslora, "target_modules": "all-linear"}
    _edit(adapter / "adapter_config.json", **settings)
    base, (own,) = open_weights(LLM)[0], ["model.layers.0.self_attn.q_proj.weight"]
    merged, _ = open_adapter(adapter, False).merge(base)
    expected = base[own].load().float() + factor * low_b @ low_a
    torch.testing.assert_close(merged[own].load(), expected)


def test_adapters_that_are_not_whole_are_refused(tmp_path, adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    changes = {
        "(its other factor is missing)": {name: None},
        "(its base weight is missing)": {name.replace("layers.0", "layers.9"): weights[name].clone()},
    }
    for said, change in changes.items():
        found = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(found, path)
        message = _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)
        assert said in message and "unexpected: 1\n" in message
    save_file(weights, path)
    state = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    twice = next(iter(state))
    save_file({**weights, twice: state[twice].contiguous()}, path)
    assert f"two tensors for {twice}" in _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)
    save_file(weights, path)
    llm = shutil.copytree(LLM, tmp_path / "llm")
    _edit(llm / "config.json", model_type="mistral")
    assert "got model type 'mistral'" in _failure(adapter, tmp_path, llm=llm, vision_tower=TOWER)
    (adapter / "config.json").unlink()
    assert "has no config.json" in _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)
    path.unlink()
    with pytest.raises(ConversionError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        open_adapter(adapter, False)


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model.", "module.base_model.model."])
def test_names_of_wrappers_are_taken_off(wrapper):
    theirs = {
        "model.norm.weight": "model.language_model.norm.weight",
        "model.mm_projector.w_gate": "model.multi_modal_projector.gate",
        "model.vision_tower.vision_tower.vision_model.encoder.x": "model.vision_tower.encoder.x",
    }
    tensors = {f"{wrapper}{name}": from_tensor(torch.zeros(1), name) for name in theirs}
    unused = [f"{wrapper}model.{name}" for name in ("image_newline", "mm_projector.mean", "mm_projector.std")]
    source = to_model(tensors | {name: from_tensor(torch.zeros(1), name) for name in unused}, [CHECKPOINT / "x"])
    assert source.names == {ours: f"{wrapper}{name}" for name, ours in theirs.items()}
    assert list(source.dropped) == unused and not source.unexpected
    tensors["module.model.norm.weight" if wrapper != "module." else "model.norm.weight"] = tensors[
        f"{wrapper}model.norm.weight"
    ]
    with pytest.raises(ConversionError, match="two tensors for one parameter"):
        to_model(tensors, [CHECKPOINT / "x"])
    assert to_original({"model.new": None, "lm_head.weight": None}) == ({"lm_head.weight": None}, ["model.new"])


PATHS = [
    *("README.md", "config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"),
    *("vision_tower/config.json", "vision_tower/model.safetensors", "old/config.json", "old/pytorch_model.bin"),
    *("lora/adapter_config.json", "lora/non_lora_trainables.bin", "lora/config.json", "half/adapter_config.json"),
    *("lora/checkpoint-5/adapter_config.json", "lora/checkpoint-5/non_lora_trainables.bin"),
    *("stage/mm_projector.bin", "stage/sampler.bin", "other/sampler.bin", "old/mm_projector.bin"),
]


@pytest.mark.parametrize(
    ("source_format", "start", "found"),
    [
        (SLIME, "", ["."]),
        (SLIME, "old", ["old"]),
        (SLIME, "lora", []),
        (SLIME_LORA, "", ["lora"]),
        (SLIME_LORA, "half", []),
        (SLIME_STAGE, "", ["other", "stage"]),
    ],
)
def test_checkpoints_in_a_repository(source_format, start, found):
    """Outermost folders: neither their vision towers nor states of a training inside them."""
    paths = [PurePosixPath(path) for path in PATHS if path.startswith(start)]
    assert sorted(map(str, source_format.find(paths))) == found


def test_presets_are_the_published_models():
    clip = {"vision_tower": "openai/clip-vit-large-patch14-336"}
    llama3 = {**clip, "prompt_template": "llama3"}
    assert SLIME.presets == {
        "slime-vicuna-7b": {**clip, "prompt_template": "v1"},
        "slime-llama3-8b": llama3,
        "slime-vicuna-13b": {**clip, "prompt_template": "v1"},
    }
    assert SLIME_LORA.presets == {"slime-llama3-70b": {**llama3, "llm": "meta-llama/Meta-Llama-3-70B-Instruct"}}


def test_separator_is_the_last_token_of_a_comma():
    def tokenizer(ids):
        return lambda text, add_special_tokens: {
            "input_ids": ids if (text, add_special_tokens) == (",", False) else []
        }

    assert separator_of(tokenizer([29871, 1919])) == 1919
    with pytest.raises(ConversionError, match="no token for a comma"):
        separator_of(tokenizer([]))


def test_module_that_was_trained_whole_replaces_the_base(tmp_path, adapter):
    path = adapter / "adapter_model.safetensors"
    head = torch.randn(300, 64).bfloat16()
    save_file({**load_file(path), "base_model.model.lm_head.weight": head}, path)
    _edit(adapter / "adapter_config.json", modules_to_save=["lm_head"])
    folder = convert_checkpoint(adapter, LLM, TOWER, output=tmp_path / "out")
    assert torch.equal(_weights(folder)["lm_head.weight"][:300], head)
    assert _report(folder)["dropped"]["llm"]["replaced by the checkpoint's own"] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["mm_projector.bin", "sampler.bin", ""])
def test_stage_files_are_completed_with_new_modules(tmp_path, name):
    folder = convert_checkpoint(GOLDEN / "more" / name, LLM, TOWER, output=tmp_path / "model")
    found = _weights(folder)
    own = {
        "model.multi_modal_projector.linear_1.bias": ("mm_projector.bin", "model.mm_projector.projection.0.bias"),
        "model.local_compressor.queries": ("sampler.bin", "model.sampler.post_qformer.query"),
    }
    for ours, (file, theirs) in own.items():
        if name in ("", file):
            assert torch.equal(found[ours], torch.load(GOLDEN / "more" / file, weights_only=True)[theirs])
    new = {"": [], "mm_projector.bin": ["model.local_compressor"], "sampler.bin": ["model.multi_modal_projector"]}
    assert _report(folder)["initialized"] == new[name]
    assert found["model.local_compressor.queries"].shape[0] == (144 if name == "mm_projector.bin" else 16)
    if name == "sampler.bin":
        assert not found["model.multi_modal_projector.gate"].any()
    model = AutoModel.from_pretrained(folder)
    assert model.config.separator_token_id == 15 and model.dtype == torch.bfloat16
    assert _report(folder)["checkpoint"]["kind"] == "stage"
    if name == "sampler.bin":
        # A conversion that is resumed gets the same new modules, and other random numbers are not touched.
        torch.manual_seed(3)
        again = convert_checkpoint(GOLDEN / "more" / name, LLM, TOWER, output=tmp_path / "again")
        assert _weights(again).keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in _weights(again).items())
        numbers = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(3), numbers)


def test_two_stage_files_with_the_same_tensor_are_refused(tmp_path):
    for name in ("mm_projector.bin", "sampler.bin"):
        shutil.copy(GOLDEN / "more" / "sampler.bin", tmp_path / name)
    message = _failure(tmp_path, tmp_path.parent / "other", llm=LLM, vision_tower=TOWER)
    assert "holds tensors that another file" in message


def test_release_without_a_sampler(tmp_path, checkpoint):
    """`mm_resampler_type` identity: the compressor's tensors are listed, the prompt has all tokens of all views."""
    _edit(checkpoint / "config.json", mm_resampler_type="identity")
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out", dtype="float32")
    reasons = _report(folder)["dropped"]["checkpoint"]
    assert len(reasons["not used: mm_resampler_type is 'identity'"]) == 12
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(image_path(cases()["no_sampler_spatial"]), "<image>", return_tensors="pt")
    assert (inputs["input_ids"] == 300).sum() == 5 * 576
    assert AutoModel.from_pretrained(folder).model.local_compressor is None
    back = export_original(folder, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["mm_resampler_type"] == "identity"


def test_llama3_release_with_a_padded_table_and_a_padding_token_of_its_own(tmp_path, checkpoint, caplog):
    """Grouped heads, a table with more rows than tokens, and a padding token that only config.json names."""
    weights = _weights(checkpoint)
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "self_attn" in name and "vision" not in name:
            weights[name] = weights[name][:32].contiguous()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name][:20]])
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(weights, checkpoint / "model.safetensors")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    eot = {**tokenizer["added_tokens"][0], "id": 300, "content": "<|eot_id|>"}
    tokenizer["added_tokens"].append(eot)
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "special_tokens_map.json").unlink()
    _edit(checkpoint / "tokenizer_config.json", pad_token="absent", unk_token="absent")
    _edit(checkpoint / "config.json", vocab_size=320, num_key_value_heads=2, pad_token_id=301, seperator=17)
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == SLIME_CHAT_TEMPLATES["llama3"]
    assert processor.tokenizer.pad_token_id == model.generation_config.pad_token_id == 301
    assert processor.image_token_id == model.config.image_token_id == 302
    assert model.config.unpadded_vocab_size == 302 and model.config.text_config.vocab_size == 320
    assert 300 in model.generation_config.eos_token_id and model.config.unused_token_ids == list(range(302, 320))
    assert torch.equal(model.get_input_embeddings().weight[300:], model.get_input_embeddings().weight[:20])
    # That of the training wins over the tokenizer's, and that is said.
    assert model.config.separator_token_id == 17 and "comma is 15" in caplog.text
    back = export_original(folder, tmp_path / "back")
    assert _weights(back)["lm_head.weight"].shape == (320, 64)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "`mm_projector_type`"),
        ({"mm_resampler_type": "qformer"}, "`mm_resampler_type`"),
        ({"mm_vision_select_layer": -1}, "`mm_vision_select_layer`"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "`mm_patch_merge_type`"),
        ({"mm_projector_type": "absent"}, "`mm_projector_type`"),
        ({"mm_vision_select_layer": -2.0}, "`mm_vision_select_layer`"),
        ({"mm_vision_select_feature": "cls_patch"}, "`mm_vision_select_feature`"),
        ({"mm_learnable_gated": 2}, "`mm_learnable_gated`"),
        ({"mm_learnable_gated": True}, "`mm_learnable_gated`"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end`"),
        ({"mm_use_im_patch_token": True}, "`mm_use_im_patch_token`"),
        *(({"image_aspect_ratio": value}, "`image_aspect_ratio`") for value in ("pad", "pad_then_devide", "any_res")),
        ({"use_local_only": 1}, "`use_local_only` in its config.json must be true or false"),
        ({"use_global_only": "yes"}, "`use_global_only` in its config.json must be true or false"),
        *(
            ({name: 16.0}, f"`{name}` in its config.json must be a whole number")
            for name in ("mm_resampler_dim", "mm_hidden_size", "seperator", "pad_token_id")
        ),
        *(
            ({name: "absent"}, f"its config.json has no `{name}`")
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        ),
        *(({name: 0}, f"`{name}` in config.json of") for name in ("vocab_size", "intermediate_size")),
        ({"hidden_size": "64"}, "its config.json cannot be read"),
        *(({"mm_resampler_temp": value}, "`mm_resampler_temp`") for value in ("hot", True, None, 1e9, -1e9)),
        ({"use_global_only": True, "use_local_only": True}, "both"),
        ({"mm_resampler_dim": 15}, "square number"),
        ({"mm_resampler_dim": "absent"}, "`mm_resampler_dim`"),
        ({"mm_resampler_topp": float("nan")}, "`mm_resampler_topp`"),
        ({"mm_hidden_size": 64}, "`vision_tower` is not the one of the training"),
        ({"seperator": 10**6}, "separator_token_id"),
        ({"num_hidden_layers": 10**9}, "from 1 to 10000"),
        ({"hidden_size": 128}, "wrong shape"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized"),
    ],
)
def test_values_that_are_not_converted_are_named(tmp_path, checkpoint, values, said):
    _edit(checkpoint / "config.json", **values)
    assert said in _failure(checkpoint, tmp_path)


def test_padding_that_the_tokenizer_replaces_comes_back(tmp_path, checkpoint, caplog):
    """A file of an earlier stage next to the release is left alone, and that is said."""
    _edit(checkpoint / "config.json", pad_token_id=7)
    shutil.copy(GOLDEN / "more" / "sampler.bin", checkpoint)
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    assert "sampler.bin, a file of the first training stages, is not used" in caplog.text
    assert json.loads((folder / "config.json").read_text())["text_config"]["pad_token_id"] == 0
    assert "`pad_token_id` in config.json is 7" in caplog.text
    back = export_original(folder, tmp_path / "back")
    assert json.loads((back / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())


def test_switches_of_stages_and_unknown_fields_are_taken(tmp_path, checkpoint):
    values = {"use_local_only": True, "mm_learnable_gated": 1, "mm_resampler_topp": 1, "mm_patch_merge_type": "flat"}
    _edit(checkpoint / "config.json", **values, mm_new="x", seperator="absent", use_global_only=None)
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    switches = {name: config[name] for name in ("branch", "forced_expert", "router_top_p", "local_order")}
    assert switches == {"branch": "local", "forced_expert": 1, "router_top_p": 1.0, "local_order": "flat"}
    assert config["separator_token_id"] == 15
    assert _report(folder)["checkpoint"]["unused_config"]["mm_new"] == "x"


def test_fields_that_the_original_does_not_need(tmp_path, checkpoint):
    """Without them it takes these values."""
    names = ("layer", "feature")
    gone = [f"mm_vision_select_{name}" for name in names] + ["mm_use_im_start_end", "mm_use_im_patch_token"]
    gone += ["mm_patch_merge_type", "mm_learnable_gated", "use_local_only", "use_global_only", "mm_hidden_size"]
    _edit(checkpoint / "config.json", **dict.fromkeys([*gone, "mm_resampler_topp", "mm_resampler_temp"], "absent"))
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    config = AutoConfig.from_pretrained(folder)
    assert (config.branch, config.forced_expert, config.local_order) == ("both", None, "flat")
    default = SlimeConfig()
    assert (config.router_top_p, config.router_temperature) == (default.router_top_p, default.router_temperature)


@pytest.mark.parametrize("value", ["absent", "square"])
def test_release_without_tiles_shows_one_view(tmp_path, checkpoint, caplog, value):
    _edit(checkpoint / "config.json", image_aspect_ratio=value)
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    assert not AutoProcessor.from_pretrained(folder).image_processor.do_tile
    (note,) = _report(folder)["notes"]
    assert note in caplog.text and f"is {None if value == 'absent' else value!r}, not 'anyres'" in note


def test_tensors_of_a_release_keep_their_dtype(tmp_path, checkpoint):
    for path in checkpoint.glob("model-*.safetensors"):
        save_file({k: v.float() if "w_gate" in k else v for k, v in load_file(path).items()}, path)
    found = _weights(convert_checkpoint(checkpoint, output=tmp_path / "out"))
    wide = [name for name, value in found.items() if value.dtype != torch.bfloat16]
    assert wide == ["model.multi_modal_projector.gate"] and found[wide[0]].dtype == torch.float32


def test_tokenizer_with_more_tokens_than_the_table_is_noted(tmp_path, checkpoint, caplog):
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<new>"})
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    assert "The tokenizer has 301 tokens and the embedding table 300 rows" in caplog.text
    config = AutoConfig.from_pretrained(folder)
    assert (config.image_token_id, config.unpadded_vocab_size) == (301, 300)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "a/../../outside", "link", "vision_tower/absent/x", "", 3, "\x00"]
)
def test_vision_tower_of_a_checkpoint_is_no_path_out_of_it(tmp_path, checkpoint, monkeypatch, name):
    shutil.copytree(TOWER, tmp_path / "outside")
    (checkpoint / "link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(tmp_path)
    _edit(checkpoint / "config.json", mm_vision_tower=name)
    assert "`mm_vision_tower` in its config.json must be" in _failure(checkpoint, tmp_path)


def test_hub_id_in_a_checkpoint_is_not_a_folder_here(tmp_path, checkpoint, monkeypatch):
    shutil.copytree(TOWER, tmp_path / "owner" / "clip")
    monkeypatch.chdir(tmp_path)
    _edit(checkpoint / "config.json", mm_vision_tower="owner/clip")
    assert "cannot be fetched from the Hub" in _failure(checkpoint, tmp_path)
    # What the user names is one.
    assert convert_checkpoint(checkpoint, vision_tower="owner/clip", output=tmp_path / "out")


class _Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_broken_and_hostile_files(tmp_path, checkpoint, adapter):
    weights = _weights(checkpoint)
    for path in checkpoint.glob("model*"):
        path.unlink()
    broken = {
        "missing: 1\n  model.multi_modal_projector.gate": {"model.mm_projector.w_gate": None},
        "missing: 1\n  model.local_compressor.positions": {"model.sampler.post_qformer.pos_embed": None},
        "three parts of equal size": {"model.mm_projector.attn.attn.in_proj_bias": torch.zeros(100)},
        "wrong shape: 1": {"model.sampler.post_qformer.query": torch.zeros(9, 128)},
        "unexpected: 1": {"model.mm_projector.new": torch.zeros(1)},
        "embed_tokens.weight is missing": {"model.embed_tokens.weight": None},
        "must be a matrix, got shape (300,)": {"model.embed_tokens.weight": torch.zeros(300)},
        "must be a matrix, got shape (0, 64)": {"model.embed_tokens.weight": torch.zeros(0, 64)},
    }
    for said, change in broken.items():
        state = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_file(state, checkpoint / "model.safetensors")
        assert said in _failure(checkpoint, tmp_path)
    (checkpoint / "model.safetensors").unlink()
    for folder, file in ((checkpoint, "pytorch_model.bin"), (adapter, "non_lora_trainables.bin")):
        torch.save({**weights, "code": _Code()}, folder / file)
        options = {"llm": LLM} if folder is adapter else {}
        assert "pickled objects" in _failure(folder, tmp_path, vision_tower=TOWER, **options)
    (adapter / "non_lora_trainables.bin").unlink()
    assert "no non_lora_trainables.bin" in _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)


def test_arguments_that_a_format_needs_or_does_not_take(tmp_path):
    assert "needs `llm`" in _failure(LORA, tmp_path)
    assert "needs `llm`" in _failure(GOLDEN / "more" / "sampler.bin", tmp_path)
    assert "does not say what its vision tower is" in _failure(GOLDEN / "more" / "sampler.bin", tmp_path, llm=LLM)
    assert "does not take `llm`" in _failure(CHECKPOINT, tmp_path, llm=LLM)
    assert "`prompt_template` must be one of" in _failure(CHECKPOINT, tmp_path, prompt_template="vicuna")


def test_positions_that_are_not_numbers_are_computed_as_the_original_does(tmp_path, checkpoint):
    for path in checkpoint.glob("model-*.safetensors"):
        weights = load_file(path)
        for name, value in weights.items():
            if name.endswith("pos_embed"):
                value[0, 0] = torch.nan
        save_file(weights, path)
    folder = convert_checkpoint(checkpoint, output=tmp_path / "out")
    for prefix, size in (("model.multi_modal_projector.query_adapter", 24), ("model.local_compressor", 4)):
        positions = _weights(folder)[f"{prefix}.positions"]
        assert torch.equal(positions, sincos_positions(size, 128).bfloat16())
    assert len(_report(folder)["computed"]) == 2


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000, "\udcff"])
def test_broken_json_is_one_message(tmp_path, content):
    broken = {
        CHECKPOINT: ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"),
        LORA: ("config.json", "adapter_config.json"),
    }
    for source, names in broken.items():
        for name in names:
            folder = tmp_path / source.name / name
            shutil.copytree(source, folder)
            (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
            options = {"llm": LLM} if source is LORA else {}
            message = _failure(folder, tmp_path, vision_tower=TOWER, **options)
            assert str(folder) in message and "\n" not in message
            assert message.startswith("`checkpoint`") or name.endswith("index.json")


def test_published_model_in_one_line_and_llava_before_its_weights_are_fetched(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(model_sources, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(fetch, "HfApi", lambda: hub)
    repository, clip = "yifzhang114/SliME-vicuna-7B", "openai/clip-vit-large-patch14-336"
    hub.add(repository, {path.name: path for path in CHECKPOINT.iterdir() if path.is_file()})
    _edit(hub.root / repository / "config.json", mm_vision_tower=clip)
    hub.add(clip, {path.name: path for path in TOWER.iterdir()})
    for name, options in (("preset", presets()["slime-vicuna-7b"]), ("plain", {})):
        assert (convert_checkpoint(repository, **options, output=tmp_path / name) / "model.safetensors").is_file()
    assert f"{clip}/config.json" in hub.downloaded and f"{clip}/model.safetensors" not in hub.downloaded
    hub.add("acme/llava", {"config.json": b'{"model_type": "llava_llama"}', "pytorch_model.bin": b"large"})
    assert "LlavaForConditionalGeneration" in _failure("acme/llava", tmp_path)
    hub.add("acme/lora", {path.name: path for path in LORA.iterdir()})
    assert "needs `llm`" in _failure("acme/lora", tmp_path)
    assert not {"acme/llava/pytorch_model.bin", "acme/lora/non_lora_trainables.bin"} & set(hub.downloaded)


def test_llava_is_not_taken_for_slime(tmp_path, checkpoint):
    gone = dict.fromkeys(("mm_resampler_type", "mm_learnable_gated"), "absent")
    _edit(checkpoint / "config.json", **gone, mm_projector_type="mlp2x_gelu")
    assert "LlavaForConditionalGeneration" in _failure(checkpoint, tmp_path)


def test_computed_positions_keep_their_dtype():
    tensors = GatheredTensors()
    tensors.used["model.local_compressor.queries"] = from_tensor(torch.zeros(4, 8, dtype=torch.bfloat16), "x")
    assert add_positions(tensors, False) == ["model.local_compressor.positions"]
    assert tensors.kept == {"model.local_compressor.positions"}
