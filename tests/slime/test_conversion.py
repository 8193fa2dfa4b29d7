"""Checkpoints of SliME: the original's numbers after a conversion, the way back, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from mgllava.conversion import ConversionError, convert_checkpoint, export_original, fetch
from mgllava.conversion.detect import presets
from mgllava.conversion.slime.new_modules import add_positions
from mgllava.conversion.source_format import GatheredTensors
from mgllava.model_files import sources as model_sources
from mgllava.model_files.lazy_tensor import from_tensor
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
    ],
)
def test_adapter_of_another_kind_is_refused(tmp_path, adapter, settings, said):
    _edit(adapter / "adapter_config.json", **settings)
    assert said in _failure(adapter, tmp_path, llm=LLM, vision_tower=TOWER)


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
        ({"mm_learnable_gated": 2}, "`mm_learnable_gated`"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end`"),
        ({"image_aspect_ratio": "pad_then_devide"}, "`image_aspect_ratio`"),
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
