import datetime
import hashlib
import json
import platform
import re
import shutil
import signal
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, MGLlavaProcessor
from mgllava.conversion import ConversionError, convert_checkpoint, convert_ram_plus, pipeline
from mgllava.conversion.pipeline import set_max_positions
from mgllava.conversion.xtuner.key_mapping import to_xtuner
from mgllava.processing import CHAT_TEMPLATES
from tests import processes
from tests.ram_plus.golden import SOURCES

from .zero_folders import write_zero

EMBEDDING = "model.language_model.embed_tokens.weight"


def _weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _save(path, state, cfg="image_size_aux = 768\n"):
    torch.save({"meta": {"cfg": cfg}, "state_dict": state}, path)
    return path


def _assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# What is written


def test_every_weight_is_that_of_its_source(converted, golden, golden_state):
    weights = _weights(converted)
    checkpoint = golden_state("iter_10.pth")
    clip = load_file(golden / "clip" / "model.safetensors")
    trunk = torch.load(golden / "convnext" / "open_clip_pytorch_model.bin", weights_only=True)
    for name, value in weights.items():
        if name.startswith("model.vision_tower."):
            _assert_same(value, clip[name.replace("model.vision_tower.", "vision_model.")])
        elif name.startswith("model.high_res_vision_tower."):
            _assert_same(value, trunk[name.replace("model.high_res_vision_tower.", "visual.trunk.")])
        else:
            original = checkpoint.pop(to_xtuner(name))
            _assert_same(value[: len(original)], original)
    assert not checkpoint


def test_unused_clip_parts_are_not_stored(converted):
    names = _weights(converted).keys()
    layers = {name.split(".")[4] for name in names if name.startswith("model.vision_tower.encoder.layers.")}
    assert layers == {"0", "1"}
    assert not [name for name in names if "post_layernorm" in name]
    assert MGLlavaConfig.from_pretrained(converted).vision_config.num_hidden_layers == 2


def test_tables_grow_by_the_mean_row(converted, golden_state):
    weights = _weights(converted)
    for name in (EMBEDDING, "lm_head.weight"):
        original = golden_state("iter_10.pth")[to_xtuner(name)]
        assert weights[name].shape == (448, 64)
        torch.testing.assert_close(weights[name][420:], original.mean(0).expand(28, -1), rtol=0, atol=1e-7)


def test_config_tokenizer_and_generation(converted, golden):
    config = MGLlavaConfig.from_pretrained(converted)
    assert (config.text_config.vocab_size, config.unpadded_vocab_size, config.image_token_id) == (448, 420, 420)
    assert (config.fusion_type, config.box_feature_type, config.object_merging) == ("conv_gate", "pyramid", "concat")
    assert config.high_res_vision_config.hidden_sizes == [16, 24, 32, 48]
    assert config.high_res_vision_config.depths == [1, 1, 2, 1]
    assert config.dtype == torch.float32
    generation = GenerationConfig.from_pretrained(converted)
    assert generation.suppress_tokens == list(range(420, 448))
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 0, 1)
    processor = MGLlavaProcessor.from_pretrained(converted)
    assert processor.image_token_id == 420
    assert processor.image_seq_length == 576
    assert processor.chat_template == CHAT_TEMPLATES["vicuna"]
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size["shortest_edge"] == 768
    assert str(golden) not in (converted / "config.json").read_text()


def test_token_ids_stay_as_they_are(converted, golden):
    before, after = AutoTokenizer.from_pretrained(golden / "llm"), AutoTokenizer.from_pretrained(converted)
    assert {**before.get_vocab(), "<image>": 420, "<video>": 421} == after.get_vocab()
    cases = json.loads((golden / "cases.json").read_text())["cases"]
    prompts = [case for case in cases if case["kind"] == "image"]
    assert prompts
    for case in prompts:
        first, second = case["prompt"].split("<image>")
        ids = [
            1,
            *after.encode(first, add_special_tokens=False),
            -200,
            *after.encode(second, add_special_tokens=False),
        ]
        assert ids == case["input_ids"]


def test_report_lists_all_sources_and_tensors(converted, golden, sources):
    report = json.loads((converted / "conversion_report.json").read_text())
    (source,) = report["sources"]["checkpoint"]
    assert source["sha256"] == hashlib.sha256((golden / "xtuner" / "iter_10.pth").read_bytes()).hexdigest()
    assert report["tensors"].keys() == _weights(converted).keys()
    assert report["tensors"]["lm_head.weight"]["from"].startswith("iter_10.pth:llm.lm_head.weight")
    assert report["checkpoint"]["kind"] == "sft" and report["checkpoint"]["lora_scaling"] is None
    assert report["checkpoint"]["meta"]["iter"] == 10
    assert report["files"] == {"model.safetensors": (converted / "model.safetensors").stat().st_size}
    assert source["bytes"] == (golden / "xtuner" / "iter_10.pth").stat().st_size
    assert {Path(entry["file"]).name for entry in report["sources"]["llm"]} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert report["variant"] == {"fusion_type": "conv_gate", "object_merging": "concat", "box_feature_type": "pyramid"}
    assert report["vocabulary"] == {
        "image_token_id": 420,
        "original_rows": 420,
        "padded_rows": 448,
        "video_token_id": 421,
    }
    assert report["arguments"] == {
        "checkpoint": str(golden / "xtuner" / "iter_10.pth"),
        **{name: str(value) for name, value in sources.items()},
        **{"dtype": "auto", "max_shard_size": "5GB", "trust_pickle": "False"},
        **{"lora_alpha": None, "max_positions": None},
    }
    assert report["versions"] | {"mgllava": "any"} == {
        "mgllava": "any",
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "timm": timm.__version__,
    }
    assert datetime.datetime.fromisoformat(report["created"]).utcoffset() == datetime.timedelta(0)
    dropped = [name for reasons in report["dropped"].values() for names in reasons.values() for name in names]
    clip = load_file(golden / "clip" / "model.safetensors")
    trunk = torch.load(golden / "convnext" / "open_clip_pytorch_model.bin", weights_only=True)
    # Every tensor of the sources is used or listed.
    used = len(_weights(converted))
    assert len(dropped) + used == len(clip) + len(trunk) + len(report["checkpoint"]["keys"])


def test_report_names_packages_that_are_not_installed(tmp_path, monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(pipeline, "version", version)
    report = json.loads((convert_ram_plus(**SOURCES, output=tmp_path / "out") / "conversion_report.json").read_text())
    assert {name for name, value in report["versions"].items() if value == "not installed"} == {
        *("mgllava", "torch", "transformers", "timm")
    }


def test_progress_counts_every_byte(tmp_path, golden, sources):
    reported = {}

    def progress(stage, done, total):
        sums, totals = reported.setdefault(stage, ([0], set()))
        sums[0] += done
        totals.add(total)

    arguments = {**sources, "max_shard_size": "200KB", "progress": progress}
    output = convert_checkpoint(golden / "xtuner" / "iter_10.pth", **arguments, output=tmp_path / "out")
    report = json.loads((output / "conversion_report.json").read_text())
    files = {entry["file"]: entry["bytes"] for entries in report["sources"].values() for entry in entries}
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert reported == {
        "reading sources": ([sum(files.values())], {sum(files.values())}),
        "writing weights": ([written], {written}),
    }


def test_pretrain_checkpoint_gets_the_language_model(tmp_path, golden, sources):
    output = convert_checkpoint(golden / "xtuner" / "iter_5_pretrain.pth", **sources, output=tmp_path / "out")
    base = load_file(golden / "llm" / "model.safetensors")
    _assert_same(_weights(output)["model.language_model.norm.weight"], base["model.norm.weight"])
    _assert_same(_weights(output)[EMBEDDING][:420], base["model.embed_tokens.weight"])


def test_lora_checkpoint_is_merged(tmp_path, golden, sources, golden_state):
    output = convert_checkpoint(golden / "xtuner" / "iter_8_lora.pth", **sources, output=tmp_path / "out")
    base = load_file(golden / "llm" / "model.safetensors")
    state, weights = golden_state("iter_8_lora.pth"), _weights(output)
    modules = {key.split(".lora_")[0] for key in state if ".lora_A." in key}
    assert len(modules) == 14
    for module in modules:
        name = module.removeprefix("llm.base_model.model.")
        update = state[f"{module}.lora_B.default.weight"] @ state[f"{module}.lora_A.default.weight"]
        expected = base[f"{name}.weight"] + 32 / 8 * update
        ours = weights[f"{name}.weight".replace("model.", "model.language_model.", 1)]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        assert not torch.equal(ours, base[f"{name}.weight"])


def test_lora_checkpoint_with_its_base_weights_does_not_read_those_of_the_llm(
    tmp_path, sources, converted, golden_state
):
    # The fine-tuned weights under PEFT's names, with an update of zero: the same as the plain conversion.
    state = {}
    for key, value in golden_state("iter_10.pth").items():
        wrapped = key.replace("llm.", "llm.base_model.model.", 1)
        if "_proj.weight" in key and key.startswith("llm."):
            module = wrapped.removesuffix(".weight")
            state[f"{module}.base_layer.weight"] = value
            state[f"{module}.lora_A.default.weight"] = torch.randn(2, value.shape[1])
            state[f"{module}.lora_B.default.weight"] = torch.zeros(value.shape[0], 2)
        else:
            state[wrapped] = value
    checkpoint = _save(tmp_path / "lora.pth", state)
    with pytest.raises(ConversionError, match="Pass `lora_alpha`"):
        convert_checkpoint(checkpoint, **sources, output=tmp_path / "out")
    output = convert_checkpoint(checkpoint, **sources, output=tmp_path / "out", lora_alpha=4)
    assert (output / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_folder_with_frozen_towers(tmp_path, sources, golden, golden_state, converted, stage):
    pytest.importorskip("deepspeed")
    clip = load_file(golden / "clip" / "model.safetensors")
    frozen = {f"visual_encoder.{k}": 2 * v for k, v in clip.items() if k.startswith("vision_model.")}
    folder = write_zero(tmp_path / "iter_10.pth", golden_state("iter_10.pth"), stage=stage, frozen=frozen)
    output = convert_checkpoint(folder, **sources, output=tmp_path / "out")
    ours, plain = _weights(output), _weights(converted)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        # The checkpoint's tower is used instead of `vision_tower`.
        _assert_same(ours[name], 2 * value if name.startswith("model.vision_tower.") else value)


# Tensors that do not fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llm.visual.weight": torch.zeros(3)}, r"unexpected: 1\n  language model: llm\.visual\.weight \(3,\)"),
        ({"other.weight": torch.zeros(3)}, r"unexpected: 1\n  checkpoint: other\.weight \(3,\)"),
        ({"llm.lm_head.weight": None, "llm.model.norm.weight": None}, "missing: 2\n"),
        ({"llm.model.embed_tokens.weight": None}, r"embedding table llm\.model\.embed_tokens\.weight is missing"),
        (
            {f"a{number}": torch.zeros(1) for number in range(10)},
            r"unexpected: 10\n(  .*\n){9}  .*a9.*\nwrong shape: 0$",
        ),
        ({f"a{number}": torch.zeros(1) for number in range(11)}, r"unexpected: 11\n(  .*\n){10}  and 1 more\n"),
    ],
)
def test_tensors_of_the_checkpoint_that_do_not_fit_are_listed(tmp_path, sources, golden_state, changes, said):
    state = {key: value for key, value in {**golden_state("iter_10.pth"), **changes}.items() if value is not None}
    with pytest.raises(ConversionError, match=f"^The sources do not match the model(.|\n)*{said}|{said}"):
        convert_checkpoint(_save(tmp_path / "odd.pth", state), **sources, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("argument", "name", "said"),
    [
        ("llm", "model.extra.weight", None),
        ("llm", "visual.weight", "unexpected: 1\n  llm: visual.weight (3,)"),
        ("vision_tower", "vision_model.new.weight", "unexpected: 1\n  vision_tower: vision_model.new.weight (3,)"),
        ("vision_tower", "text_model.new.weight", ""),
    ],
)
def test_tensors_of_the_parts_that_do_not_fit_are_listed(tmp_path, sources, golden, edit_folder, argument, name, said):
    folder = edit_folder(sources[argument])
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.zeros(3)}, folder / "model.safetensors")
    arguments = {**sources, argument: folder, "output": tmp_path / "out"}
    if said == "":
        report = json.loads(
            (
                convert_checkpoint(golden / "xtuner" / "iter_5_pretrain.pth", **arguments) / "conversion_report.json"
            ).read_text()
        )
        assert name in report["dropped"]["vision_tower"]["text tower of CLIP"]
        return
    with pytest.raises(
        ConversionError,
        match=re.escape(said or f"model.language_model.extra.weight (3,) from model.safetensors:{name}"),
    ):
        convert_checkpoint(golden / "xtuner" / "iter_5_pretrain.pth", **arguments)


LORA_MODULE = "llm.base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{LORA_MODULE}.lora_B.default.weight": None}, r"lora_A\.default\.weight \(its other factor is missing\)"),
        (
            {f"llm.base_model.model.model.new.lora_{factor}.default.weight": torch.zeros(2, 2) for factor in "AB"},
            r"unexpected: 2\n.*new\.lora_A.* \(its base weight is missing\)",
        ),
    ],
)
def test_updates_without_their_counterpart_are_refused(tmp_path, golden, sources, changes, said):
    content = torch.load(golden / "xtuner" / "iter_8_lora.pth", weights_only=True)
    state = {**content["state_dict"], **changes}
    content["state_dict"] = {key: value for key, value in state.items() if value is not None}
    torch.save(content, tmp_path / "lora.pth")
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(tmp_path / "lora.pth", **sources, output=tmp_path / "out")


def test_module_that_was_trained_whole_replaces_the_base(tmp_path, golden, sources):
    content = torch.load(golden / "xtuner" / "iter_8_lora.pth", weights_only=True)
    head = "llm.base_model.model.lm_head"
    content["state_dict"][f"{head}.original_module.weight"] = torch.zeros(420, 64)
    content["state_dict"][f"{head}.modules_to_save.default.weight"] = torch.randn(420, 64)
    torch.save(content, tmp_path / "lora.pth")
    output = convert_checkpoint(tmp_path / "lora.pth", **sources, output=tmp_path / "out")
    _assert_same(
        _weights(output)["lm_head.weight"][:420], content["state_dict"][f"{head}.modules_to_save.default.weight"]
    )
    report = json.loads((output / "conversion_report.json").read_text())
    assert [f"{head}.original_module.weight"] in report["dropped"]["checkpoint"].values()
    assert report["dropped"]["llm"] == {"replaced by the checkpoint's own": ["lm_head.weight"]}
    assert report["checkpoint"]["kind"] == "lora" and report["checkpoint"]["lora_scaling"] == 32 / 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, "`llm`: the dtype in its config.json must be a float, got torch.int8"),
        ({"hidden_act": "no such function"}, "No model can be built from these parts"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` in config.json of .* must be a number from 1 to 10000, got 0"),
        ({"num_hidden_layers": 10_001}, "from 1 to 10000, got 10001"),
        ({"vocab_size": (1 << 30) + 1}, f"from 1 to {1 << 30}, got {(1 << 30) + 1}"),
    ],
)
def test_config_of_the_language_model_with_impossible_values(tmp_path, golden, sources, edit_folder, changes, said):
    sources = {**sources, "llm": edit_folder(golden / "llm", **changes)}
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(golden / "xtuner" / "iter_5_pretrain.pth", **sources, output=tmp_path / "out")


# Dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", None])
def test_other_tensors_get_the_dtype_of_the_language_model(tmp_path, golden, sources, edit_folder, dtype):
    llm = edit_folder(golden / "llm", dtype=dtype, torch_dtype=dtype)
    output = convert_checkpoint(
        golden / "xtuner" / "iter_5_pretrain.pth", **{**sources, "llm": llm}, output=tmp_path / "out"
    )
    dtypes = {name: value.dtype for name, value in _weights(output).items()}
    assert dtypes[EMBEDDING] == dtypes["model.vision_tower.pre_layrnorm.weight"] == getattr(torch, dtype or "float32")
    assert dtypes["model.fusion.gate.0.weight"] == torch.float32


def test_dtypes_of_the_checkpoint_are_kept(tmp_path, sources, golden_state):
    state = golden_state("iter_10.pth")
    state = {key: value.bfloat16() if key.startswith("llm.") else value for key, value in state.items()}
    output = convert_checkpoint(_save(tmp_path / "mixed.pth", state), **sources, output=tmp_path / "out")
    dtypes = {name: value.dtype for name, value in _weights(output).items()}
    assert dtypes[EMBEDDING] == torch.bfloat16
    assert dtypes["model.vision_tower.pre_layrnorm.weight"] == torch.bfloat16
    assert dtypes["model.fusion.gate.0.weight"] == torch.float32
    assert MGLlavaConfig.from_pretrained(output).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.bfloat16])
def test_dtype_on_request(tmp_path, golden, sources, converted, dtype):
    output = convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out", dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float16
    plain = _weights(converted)
    for name, value in _weights(output).items():
        _assert_same(value, plain[name].to(wanted))
    config = MGLlavaConfig.from_pretrained(output)
    parts = (config, config.text_config, config.vision_config, config.high_res_vision_config)
    assert [part.dtype for part in parts] == [wanted] * 4


# Variants


def _variant(state, fusion, boxes):
    """Turn the golden checkpoint into one of another variant, with random weights where shapes change."""
    state = dict(state)
    width = {"conv_gate": 64, "conv_gate_concat": 128, "channel_concat": 128, "plain_channel_concat": 112, "none": 64}
    box_width = {"pyramid": 120, "multi_level": 40, "last_stage": 48}
    state["projector.model.0.weight"] = torch.randn(64, width[fusion])
    state["bbox_projector.model.0.weight"] = torch.randn(64, box_width[boxes])
    if fusion in ("plain_channel_concat", "none", "channel_concat"):
        unwanted = "fuse_module.gate." if fusion == "channel_concat" else "fuse_module."
        state = {key: value for key, value in state.items() if not key.startswith(unwanted)}
    if boxes == "multi_level":
        for level, channels in enumerate((16, 24, 32, 48)):
            state[f"multi_level_linear.{level}.weight"] = torch.randn(40, channels)
            state[f"multi_level_linear.{level}.bias"] = torch.randn(40)
    return state


@pytest.mark.parametrize("fusion", ["conv_gate", "conv_gate_concat", "channel_concat", "plain_channel_concat", "none"])
@pytest.mark.parametrize("boxes", ["pyramid", "multi_level", "last_stage"])
def test_variant_is_detected_from_its_shapes(tmp_path, sources, golden_state, fusion, boxes):
    state = _variant(golden_state("iter_10.pth"), fusion, boxes)
    output = convert_checkpoint(_save(tmp_path / "variant.pth", state), **sources, output=tmp_path / "out")
    config, weights = MGLlavaConfig.from_pretrained(output), _weights(output)
    assert (config.fusion_type, config.box_feature_type) == (fusion, boxes)
    _assert_same(weights["model.multi_modal_projector.linear_1.weight"], state["projector.model.0.weight"])
    if boxes == "multi_level":
        assert config.box_multi_level_size == 40


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("projector.model.0.weight", (64, 65), r"reads 65 channels.*projector\.model\.0\.weight \(64, 65\)"),
        ("bbox_projector.model.0.weight", (64, 121), r"reads 121 channels.*\[16, 24, 32, 48\]"),
    ],
)
def test_unknown_variant_lists_the_shapes(tmp_path, sources, golden_state, key, shape, said):
    state = {**golden_state("iter_10.pth"), key: torch.zeros(shape)}
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(_save(tmp_path / "odd.pth", state), **sources, output=tmp_path / "out")


# Tied heads and vocabularies


@pytest.mark.parametrize("stored", [True, False])
def test_tied_head_is_not_stored(tmp_path, sources, golden, golden_state, edit_folder, stored):
    sources = {**sources, "llm": edit_folder(golden / "llm", tie_word_embeddings=True)}
    state = golden_state("iter_10.pth")
    del state["llm.lm_head.weight"]
    if stored:
        state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
    output = convert_checkpoint(_save(tmp_path / "tied.pth", state), **sources, output=tmp_path / "out")
    assert "lm_head.weight" not in _weights(output)
    model, info = MGLlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_tied_head_that_differs_is_refused(tmp_path, sources, golden, edit_folder):
    sources = {**sources, "llm": edit_folder(golden / "llm", tie_word_embeddings=True)}
    with pytest.raises(ConversionError, match="ties lm_head"):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out")


@pytest.mark.parametrize(("rows", "padded"), [(448, 448), (449, 512), (400, 448)])
def test_large_tables_grow_to_a_multiple_of_64_rows_only(tmp_path, sources, golden_state, rows, padded):
    state = golden_state("iter_10.pth")
    for key in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        state[key] = torch.randn(rows, 64)
    output = convert_checkpoint(_save(tmp_path / "rows.pth", state), **sources, output=tmp_path / "out")
    config = MGLlavaConfig.from_pretrained(output)
    assert (config.text_config.vocab_size, config.unpadded_vocab_size) == (padded, rows)
    assert GenerationConfig.from_pretrained(output).suppress_tokens == sorted({420, 421, *range(rows, padded)})
    _assert_same(_weights(output)["lm_head.weight"][:rows], state["llm.lm_head.weight"])


def test_template_stop_words_end_answers(tmp_path, sources, golden, edit_folder):
    tokenizer = AutoTokenizer.from_pretrained(golden / "llm")
    tokenizer.add_tokens(["<|im_end|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    llm = edit_folder(golden / "llm")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, llm)
    sources = {**sources, "llm": llm, "prompt_template": "yi"}
    output = convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out")
    assert GenerationConfig.from_pretrained(output).eos_token_id == [2, 420]
    assert MGLlavaConfig.from_pretrained(output).image_token_id == 422


def test_missing_pad_token_is_set(tmp_path, sources, golden, edit_folder):
    llm = edit_folder(golden / "llm", file="tokenizer_config.json", pad_token=None)
    (llm / "special_tokens_map.json").unlink()
    output = convert_checkpoint(golden / "xtuner" / "iter_10.pth", **{**sources, "llm": llm}, output=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(output).pad_token == "<unk>"


# Wrong and damaged sources


def test_error_counts_all_mismatches_and_lists_samples(tmp_path, sources, golden_state):
    state = golden_state("iter_10.pth")
    state = {key: value for key, value in state.items() if ".layers.1." not in key}
    state["llm.model.norm.weight"] = torch.ones(65)
    state["surprise.weight"] = torch.ones(1)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(_save(tmp_path / "part.pth", state), **sources, output=tmp_path / "out")
    message = str(error.value)
    assert "missing: 9" in message
    assert "model.language_model.layers.1.mlp.up_proj.weight (160, 64)" in message
    assert "unexpected: 1\n  checkpoint: surprise.weight (1,)" in message
    assert "wrong shape: 1\n  model.language_model.norm.weight: expected (64,), got (65,)" in message
    assert not list(tmp_path.glob("out*"))


def test_missing_embedding_table_is_named(tmp_path, sources, golden_state):
    state = golden_state("iter_10.pth")
    del state["llm.model.embed_tokens.weight"]
    with pytest.raises(ConversionError, match=r"llm\.model\.embed_tokens\.weight is missing"):
        convert_checkpoint(_save(tmp_path / "part.pth", state), **sources, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "`vision_tower` is not the one of the training: it is 32 channels wide"),
        ({"image_size": 224}, "needs equal grids"),
        ({"num_hidden_layers": 2}, r"(?s)unexpected: 16.*layers\.2\."),
        ({"num_hidden_layers": 5}, r"(?s)missing: 16.*layers\.3\."),
    ],
)
def test_clip_of_another_size(tmp_path, sources, golden, edit_folder, changes, said):
    config = json.loads((golden / "clip" / "config.json").read_text())["vision_config"]
    sources = {**sources, "vision_tower": edit_folder(golden / "clip", vision_config={**config, **changes})}
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("argument", "folder", "said"),
    [
        ("vision_tower", "llm", "`vision_tower` must be a CLIP"),
        ("vision_tower", "xtuner", "has no config.json"),
        ("vision_tower", "no/such/folder", "neither"),
        ("high_res_tower", "clip", "not an open_clip repository"),
        ("high_res_tower", "no_such_model", "none of these"),
        ("high_res_tower", "convnext_large_d_320", "say which weights"),
        ("llm", "clip", "not a language model"),
        ("llm", "./nowhere", "neither"),
    ],
)
def test_folder_of_another_kind(tmp_path, sources, golden, argument, folder, said):
    name = golden / folder if (golden / folder).is_dir() else folder
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **{**sources, argument: name}, output=tmp_path / "out")


def test_convnext_of_another_size(tmp_path, sources, golden, edit_folder):
    tower = edit_folder(golden / "convnext", file="open_clip_config.json")
    weights = torch.load(tower / "open_clip_pytorch_model.bin", weights_only=True)
    weights = {k: torch.cat([v, v]) if "stages.3" in k and v.ndim else v for k, v in weights.items()}
    torch.save(weights, tower / "open_clip_pytorch_model.bin")
    with pytest.raises(ConversionError, match="`high_res_tower` is not the one of the training: it is 96"):
        convert_checkpoint(
            golden / "xtuner" / "iter_10.pth", **{**sources, "high_res_tower": tower}, output=tmp_path / "out"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "has neither open_clip_model.safetensors nor open_clip_pytorch_model.bin"),
        ({"stages.1.": ""}, r"has no blocks of visual\.trunk\.stages\.1\."),
        ({"stages.2.blocks.1.": "stages.2.blocks.10000."}, r"names 10004 blocks, and has \d+ tensors"),
        ({"stages.2.blocks.1.": "stages.2.blocks.2."}, r"missing: \d+\n"),
    ],
)
def test_damaged_open_clip_models(tmp_path, sources, golden, edit_folder, changes, said):
    tower = edit_folder(golden / "convnext", file="open_clip_config.json")
    path = tower / "open_clip_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    path.unlink()
    if changes is not None:
        ((old, new),) = changes.items()
        weights = {name.replace(old, new): value for name, value in weights.items() if new or old not in name}
        torch.save({"state_dict": weights, "epoch": 3}, path)
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(
            golden / "xtuner" / "iter_10.pth", **{**sources, "high_res_tower": tower}, output=tmp_path / "out"
        )


def test_open_clip_safetensors_and_local_dir_schema(tmp_path, sources, golden, converted, edit_folder):
    tower = edit_folder(golden / "convnext", file="open_clip_config.json")
    weights = torch.load(tower / "open_clip_pytorch_model.bin", weights_only=True)
    save_file(weights, tower / "open_clip_model.safetensors")
    (tower / "open_clip_pytorch_model.bin").unlink()
    sources = {**sources, "high_res_tower": f"local-dir:{tower}"}
    output = convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out")
    assert (output / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


# Outputs


def test_full_disk_stops_before_writing(tmp_path, golden, sources, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConversionError, match="Not enough disk space"):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from mgllava.conversion import convert_checkpoint
written = 0
def progress(stage, done, total):
    global written
    written += done if stage == "writing weights" else 0
    if written > 700_000:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint, llm, clip, convnext, output = sys.argv[1:]
convert_checkpoint(checkpoint, llm, clip, convnext, "vicuna", output, max_shard_size="200KB", progress=progress)
"""


def test_killed_run_leaves_no_output_and_is_resumed(tmp_path, golden, sources):
    checkpoint, output = golden / "xtuner" / "iter_10.pth", tmp_path / "out"
    arguments = [checkpoint, golden / "llm", golden / "clip", golden / "convnext", output]
    assert processes.run("-c", KILLED, *arguments) == -signal.SIGKILL
    assert not output.exists()
    staging = tmp_path / "out.incomplete"
    finished = {path.name: path.stat() for path in staging.glob("*.safetensors")}
    assert len(finished) >= 2
    assert not (staging / "config.json").exists()
    with pytest.raises(OSError):
        MGLlavaForConditionalGeneration.from_pretrained(staging)

    convert_checkpoint(checkpoint, **sources, output=output, max_shard_size="200KB")
    whole = convert_checkpoint(checkpoint, **sources, output=tmp_path / "whole", max_shard_size="200KB")
    for name, before in finished.items():
        after = (output / name).stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    for path in whole.iterdir():
        if path.name != "conversion_report.json":
            assert (output / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    assert not staging.exists()


@pytest.mark.parametrize("template", ["gpt", "v1", "plain"])
def test_prompt_template_must_be_one_of_the_family(tmp_path, golden, sources, template):
    with pytest.raises(ConversionError, match=rf"`prompt_template` must be one of .*'vicuna'.*, got '{template}'"):
        convert_checkpoint(
            golden / "xtuner" / "iter_10.pth", **{**sources, "prompt_template": template}, output=tmp_path / "out"
        )


def test_max_positions(convert):
    """The number is noted; the weights and other values stay."""
    config = AutoConfig.from_pretrained(convert(max_positions=9000))
    assert config.text_config.max_position_embeddings == 9000
    assert config.video_token_id == config.image_token_id + 1


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
        (
            {"rope_parameters": {"a": {"rope_type": "default"}, "b": {"rope_type": "longrope"}}},
            "of type longrope: they depend on this number",
        ),
        ({"rope_parameters": None}, "no rotary position embeddings"),
    ],
)
def test_max_positions_that_would_change_the_model_are_refused(text_config, message):
    text = SimpleNamespace(model_type="some", max_position_embeddings=64, **text_config)
    with pytest.raises(ConversionError, match=message):
        set_max_positions(SimpleNamespace(get_text_config=lambda: text), 128)
    assert text.max_position_embeddings == 64
    with pytest.raises(ConversionError, match="`max_positions` must be a positive number"):
        set_max_positions(SimpleNamespace(get_text_config=lambda: text), 0)
