import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
)

from mgllava import build_from_parts
from mgllava.training import TrainingError, write_starting_model
from tests.golden_cases import GOLDEN, IMAGE_ID, case, load_tensors, process, run

PARTS = {"llm": GOLDEN / "llm", "vision_tower": GOLDEN / "clip", "high_res_tower": GOLDEN / "convnext"}


@pytest.fixture(scope="module")
def assembled():
    torch.manual_seed(0)
    return build_from_parts(**PARTS)


def test_parts_are_what_the_converter_makes_of_them(assembled, convert):
    """Towers and language model have the same weights, under the same names, as a converted pretrain checkpoint."""
    converted = AutoModel.from_pretrained(convert("iter_5_pretrain.pth"), dtype=torch.float32)
    expected, own = converted.state_dict(), assembled.state_dict()
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        if "fusion" in name or "projector" in name:
            continue
        rows = 420 if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else None
        assert torch.equal(own[name][:rows], value[:rows]), name
    # The rows above the language model's own are not words: neither the loss nor the answers know them.
    assert assembled.config.unpadded_vocab_size == converted.config.unpadded_vocab_size == 420
    assert assembled.config.unused_token_ids == list(range(420, 448))


def test_parameters_are_the_models_own(assembled, tmp_path):
    """Not views of the files, which would be read-only, or change when a file does."""
    tower = assembled.model.high_res_vision_tower
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0)
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_a_placeholder_that_the_tokenizer_has_keeps_its_id(tmp_path):
    shutil.copytree(PARTS["llm"], tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_tokens([str(number) for number in range(40)])
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "llm")
    model = build_from_parts(**{**PARTS, "llm": tmp_path / "llm"})
    assert model.config.image_token_id == len(tokenizer) - 1 == 460
    assert model.get_input_embeddings().num_embeddings == 512 and model.config.unpadded_vocab_size == 420


def test_the_new_parts_start_as_a_new_model_does(assembled):
    fusion = assembled.model.fusion
    assert not fusion.high_res_proj.weight.any() and not fusion.low_res_proj.weight.any()
    for layer in (fusion.high_res_conv, fusion.low_res_conv, assembled.model.box_projector.linear_1):
        assert layer.weight.isfinite().all() and layer.weight.std() > 0
    assert not any(parameter.is_meta for parameter in assembled.parameters())
    # Identity at the start: the fused tokens are the tokens of the low-resolution tower.
    with torch.no_grad():
        tokens = torch.randn(1, 576, 64)
        assert torch.equal(fusion(tokens, (torch.randn(1, 48, 24, 24),)), tokens)


def test_a_variant_and_another_dtype():
    model = build_from_parts(
        **PARTS,
        dtype=torch.bfloat16,
        fusion_type="resampler",
        box_feature_type="multi_level",
        object_merging="box_to_fused",
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.fusion.queries.isfinite().all() and model.model.fusion.queries.std() > 0
    assert not model.model.object_attention.o_proj.weight.any()


def test_the_written_repository_works(tmp_path):
    torch.manual_seed(0)
    output = write_starting_model(tmp_path / "start", **PARTS, prompt_template="vicuna")
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(output, backend="pil")
    assert processor.image_token_id == model.config.image_token_id == IMAGE_ID
    golden, tensors = case("landscape_basic"), load_tensors("cases/landscape_basic")
    stages = run(model, process(processor, golden))
    torch.testing.assert_close(stages["clip_features"], tensors["clip_features"], rtol=0, atol=5e-5)
    torch.testing.assert_close(stages["box_features"], tensors["box_features"], rtol=0, atol=5e-5)
    assert model.generation_config.suppress_tokens == model.config.unused_token_ids
    with pytest.raises(TrainingError, match="exists"):
        write_starting_model(tmp_path / "start", **PARTS, prompt_template="vicuna")
    with pytest.raises(TrainingError, match="`vision_tower`, `high_res_tower` must be given"):
        write_starting_model(tmp_path / "other", llm=PARTS["llm"], prompt_template="vicuna")
    with pytest.raises(TrainingError, match=r"`family` must be one of .*'mgllava'.*got 'ram_plus'"):
        write_starting_model(tmp_path / "other", **PARTS, prompt_template="vicuna", family="ram_plus")
    with pytest.raises(TrainingError, match="prompt_template"):
        write_starting_model(tmp_path / "other", **PARTS, prompt_template="alpaca")


def test_the_standard_deviation_of_new_weights_can_be_chosen(tmp_path):
    options = {"prompt_template": "vicuna", "initializer_range": 0.08}
    model = AutoModel.from_pretrained(write_starting_model(tmp_path / "start", **PARTS, **options))
    assert model.config.initializer_range == 0.08
    weight = model.model.multi_modal_projector.linear_1.weight
    assert weight.std().item() == pytest.approx(0.08, rel=0.1)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("high_res_tower", GOLDEN / "clip", OSError),
        ("high_res_tower", "no/such/folder", OSError),
        ("vision_tower", GOLDEN / "llm", ValueError),
    ],
)
def test_a_part_of_another_kind_is_refused(part, value, error):
    with pytest.raises(error):
        build_from_parts(**{**PARTS, part: value})


def test_generation_config_of_the_language_model_is_kept(tmp_path):
    shutil.copytree(PARTS["llm"], tmp_path / "llm")
    GenerationConfig(eos_token_id=[2, 5, 7], temperature=0.3, do_sample=True).save_pretrained(tmp_path / "llm")
    model = build_from_parts(**{**PARTS, "llm": tmp_path / "llm"}, attn_implementation="eager", device_map="cpu")
    assert model.generation_config.eos_token_id == [2, 5, 7] and model.generation_config.temperature == 0.3
    assert model.generation_config.suppress_tokens == model.config.unused_token_ids
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.text_config is model.model.language_model.config
    assert not {"device_map", "attn_implementation"} & model.config.to_dict().keys()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"fusion_typ": "none"}, TypeError, "unexpected keyword argument 'fusion_typ'"),
        ({"quantization_config": {}}, ValueError, "`quantization_config` is for a complete model folder"),
        ({"device_map": "auto"}, ValueError, "`device_map` must be a single device here"),
        ({"device_map": {"": "cpu", "x": "cpu"}}, ValueError, "`device_map` must be a single device here"),
        # What `from_pretrained` of transformers takes for a model in a folder.
        *(
            ({name: None}, ValueError, f"`{name}` is for a complete model folder")
            for name in (
                *("load_in_4bit", "load_in_8bit", "max_memory", "offload_folder", "offload_buffers", "tp_plan"),
                *("tp_size", "device_mesh", "distributed_config", "output_loading_info", "ignore_mismatched_sizes"),
                *("state_dict", "config", "adapter_kwargs", "key_mapping", "use_kernels", "low_cpu_mem_usage"),
            )
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        build_from_parts(**PARTS, **wrong)


class _AskedError(Exception):
    """Says that a part was asked for."""


@pytest.fixture
def asked(monkeypatch):
    """Record how the parts are loaded, up to the given one, in place of loading them."""
    calls = {}

    def record(name, value):
        def load(*given, **options):
            calls[name] = {**options, **({"name": given[-1]} if name != "AutoTokenizer" else {})}
            if value is None:
                raise _AskedError
            return value

        return load

    def until(model):
        info = {"missing_keys": ()}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record("llm", (model, info)))
        monkeypatch.setattr(CLIPVisionModel, "from_pretrained", record("vision_tower", model and (tiny_clip(), info)))
        monkeypatch.setattr("mgllava.conversion.build.open_high_res_tower", record("high_res_tower", None))
        return calls

    return until


def tiny_clip():
    return CLIPVisionModel(CLIPVisionConfig.from_pretrained(PARTS["vision_tower"]))


LOCATION = {"cache_dir": "c", "force_download": True, "local_files_only": True, "token": "t"}
OF_THE_LLM = {"revision": "r", "subfolder": "s", "gguf_file": "g", "trust_remote_code": True, "code_revision": "v"}
OF_ITS_WEIGHTS = {"variant": "x", "use_safetensors": True, "weights_only": True}


def test_each_part_gets_the_arguments_of_its_download(asked):
    calls = asked(SimpleNamespace(dtype=torch.float16))
    with pytest.raises(_AskedError):
        build_from_parts(**PARTS, **LOCATION, **OF_THE_LLM, **OF_ITS_WEIGHTS, torch_dtype="float16")
    shared = {"output_loading_info": True, **LOCATION}
    assert calls["llm"] == {**shared, **OF_THE_LLM, **OF_ITS_WEIGHTS, "dtype": "float16", "name": PARTS["llm"]}
    assert calls["vision_tower"] == {**shared, "dtype": torch.float16, "name": PARTS["vision_tower"]}
    assert calls["high_res_tower"] == {**LOCATION, "name": str(PARTS["high_res_tower"])}


@pytest.mark.parametrize(
    ("dtype", "older", "expected"), [("auto", "float16", "float16"), ("bfloat16", "float16", "bfloat16")]
)
def test_older_name_of_dtype(asked, dtype, older, expected):
    calls = asked(SimpleNamespace(dtype=torch.float32))
    with pytest.raises(_AskedError):
        build_from_parts(**PARTS, dtype=dtype, torch_dtype=older)
    assert calls["llm"]["dtype"] == expected


def test_parts_that_are_quantized_or_lack_weights_are_refused(asked, monkeypatch):
    asked(SimpleNamespace(dtype=torch.float16, is_quantized=True))
    with pytest.raises(ValueError, match=r"`llm`: .* is quantized. Pass its weights in 16 or 32 bits"):
        build_from_parts(**PARTS)
    lacking = (None, {"missing_keys": {"b", "a"}})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **options: lacking)
    with pytest.raises(ValueError, match=r"`llm`: .* lacks the weights \['a', 'b'\]"):
        build_from_parts(**PARTS)


def test_tokenizer_gets_the_arguments_of_its_download(monkeypatch):
    calls = []

    def load(name, **options):
        calls.append((name, options))
        raise _AskedError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    options = {"local_files_only": True, "revision": "main", "use_safetensors": True}
    with pytest.raises(_AskedError):
        build_from_parts(**PARTS, **options)
    assert calls == [(PARTS["llm"], {"local_files_only": True, "revision": "main"})]


def test_values_of_the_configuration_and_the_device(assembled):
    values = {"object_merging": "none", "box_feature_type": "multi_level", "box_multi_level_size": 40}
    values |= {"projector_hidden_act": "relu", "initializer_range": 0.5, "fusion_type": "none"}
    ids = {"image_token_id": 430, "video_token_id": 455}
    model = build_from_parts(**PARTS, **values, **ids, high_res_image_size=736, device_map={"": "cpu"})
    assert model.config.high_res_vision_config.image_size == 736
    assert {name: getattr(model.config, name) for name in values} == values
    assert (model.config.image_token_id, model.config.video_token_id) == (430, 455)
    assert model.get_input_embeddings().num_embeddings == 512 and not model.training
    assert assembled.config.video_token_id is None and assembled.config.high_res_vision_config.image_size == 768
