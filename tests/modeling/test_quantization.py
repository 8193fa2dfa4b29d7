"""Quantization: which modules are quantized, saving and loading, closeness, and adapters."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, FineGrainedFP8Config

import mgllava
from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, MGLlavaModel
from tests.modeling.conftest import comparable_positions
from tests.tiny import VARIANTS, tiny_inputs, tiny_model, tiny_slime

LLMS = ["llama", "phi3", "qwen2", "qwen3", "mistral"]
LAYERS = {4: "Linear4bit", 8: "Linear8bitLt"}
MIXED = [[3], [], [1, 5]]


def plain_config(bits):
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def language_model_layers(model, prefix="model."):
    """Names of the linear layers of the language model, which are those to quantize."""
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(f"{prefix}language_model.")
    }


def quantized_layers(model):
    return {name for name, module in model.named_modules() if type(module).__name__ in LAYERS.values()}


@pytest.fixture(autouse=True)
def quiet_bitsandbytes(caplog):
    caplog.set_level(logging.ERROR, logger="bitsandbytes")  # it logs every cast of every layer


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Save a tiny model once per set of arguments, and return it with its folder."""
    saved = {}

    def run(*args, make=tiny_model, **kwargs):
        key = str((make.__name__, args, kwargs))
        if key not in saved:
            folder = tmp_path_factory.mktemp("model")
            model = make(*args, **kwargs)
            model.save_pretrained(folder)
            saved[key] = model, folder
        return saved[key]

    return run


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("llm", LLMS)
def test_only_the_language_model_is_quantized_by_default(save, llm, bits):
    model, folder = save(llm)
    quantized = AutoModel.from_pretrained(folder, quantization_config=plain_config(bits), dtype=torch.bfloat16)
    expected = language_model_layers(model)
    assert quantized_layers(quantized) == expected
    assert {type(quantized.get_submodule(name)).__name__ for name in expected} == {LAYERS[bits]}
    others = {
        name: parameter.dtype
        for name, parameter in quantized.named_parameters()
        if name.rpartition(".")[0] not in expected
    }
    assert set(others.values()) == {torch.bfloat16}
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(others)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "published"] + ["tied_head", "slime"])
def test_variants_are_quantized_alike(save, variant, bits):
    others = {"tied_head": {"text_config": {"tie_word_embeddings": True}}, "slime": {"make": tiny_slime}}
    model, folder = save(**(VARIANTS | others)[variant])
    quantized = AutoModel.from_pretrained(folder, quantization_config=plain_config(bits))
    assert quantized_layers(quantized) == language_model_layers(model)
    is_tied = quantized.lm_head.weight is quantized.get_input_embeddings().weight
    assert is_tied == (variant == "tied_head")


@pytest.mark.parametrize("load", [AutoModelForImageTextToText.from_pretrained, MGLlavaModel.from_pretrained])
@pytest.mark.parametrize("config", [{"load_in_4bit": True}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}])
def test_configurations_as_dictionaries_and_the_model_without_head(save, load, config):
    model, folder = save()
    given = dict(config)
    quantized = load(folder, quantization_config=config)
    prefix = "" if type(quantized) is MGLlavaModel else "model."
    expected = language_model_layers(model if prefix else model.model, prefix)
    assert expected
    assert quantized_layers(quantized) == expected
    assert config == given


def test_the_users_configuration_is_not_changed(save):
    config = plain_config(8)
    before = copy.deepcopy(config.to_dict())
    quantized = MGLlavaForConditionalGeneration.from_pretrained(save()[1], quantization_config=config)
    assert config.to_dict() == before
    assert quantized.config.quantization_config is not config


def test_list_of_the_user_replaces_the_default(save):
    model, folder = save()
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.language_model"])
    quantized = AutoModel.from_pretrained(folder, quantization_config=config)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert quantized_layers(quantized) == linear - language_model_layers(model)
    assert quantized(**tiny_inputs(MIXED)).logits.isfinite().all()


def test_8_bits_never_quantize_the_high_resolution_tower(save):
    """LLM.int8 cannot multiply inputs of four dimensions."""
    model, folder = save()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    quantized = AutoModel.from_pretrained(folder, quantization_config=config)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    tower = {name for name in linear if name.startswith("model.high_res_vision_tower.")}
    assert tower
    assert quantized_layers(quantized) == linear - tower
    assert quantized(**tiny_inputs(MIXED)).logits.isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_public_configuration_lists_the_modules_to_skip(save, bits):
    model, folder = save()
    config = mgllava.quantization_config(bits)
    assert {"model.vision_tower", "model.box_projector", "vision_tower", "lm_head"} <= set(
        config.llm_int8_skip_modules
    )
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    quantized = AutoModel.from_pretrained(folder, quantization_config=config)
    assert quantized_layers(quantized) == language_model_layers(model)
    if bits == 4:
        weight = quantized.model.language_model.layers[0].self_attn.q_proj.weight
        assert (weight.quant_type, weight.quant_state.nested) == ("nf4", True)
        assert (weight.dtype, weight.quant_storage) == (torch.bfloat16, torch.bfloat16)
    config.llm_int8_skip_modules.clear()
    assert mgllava.quantization_config(bits).llm_int8_skip_modules


@pytest.mark.parametrize(
    ("has_gpu", "has_bfloat16", "dtype"),
    [(False, False, torch.bfloat16), (True, True, torch.bfloat16), (True, False, torch.float16)],
)
def test_4_bits_are_computed_in_bfloat16_unless_a_gpu_lacks_it(monkeypatch, has_gpu, has_bfloat16, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    # Emulation would be slow.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bfloat16
    )
    config = mgllava.quantization_config(4)
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == dtype


@pytest.mark.parametrize("bits", [16, 0, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"`bits` must be 4 or 8, got"):
        mgllava.quantization_config(bits)


# Every pair of two of the three values is in a fast case.
FAST = {(4, "plain", "float32"), (4, "tuned", "bfloat16"), (8, "tuned", "float32"), (8, "plain", "bfloat16")}
FAST |= {(4, "plain", "float16"), (8, "tuned", "float16")}
CASES = [
    pytest.param(bits, config, getattr(torch, dtype), marks=[] if (bits, config, dtype) in FAST else pytest.mark.slow)
    for bits, config, dtype in itertools.product((4, 8), ("plain", "tuned"), ("float32", "bfloat16", "float16"))
]


@pytest.mark.parametrize(("bits", "config", "dtype"), CASES)
def test_saving_and_loading_a_quantized_model_changes_nothing(family, save, tmp_path, bits, config, dtype):
    config = plain_config(bits) if config == "plain" else mgllava.quantization_config(bits)
    quantized = AutoModel.from_pretrained(save(make=family.model)[1], quantization_config=config, dtype=dtype)
    quantized.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert quantized_layers(reloaded) == quantized_layers(quantized)
    assert reloaded.get_memory_footprint() == quantized.get_memory_footprint()
    inputs = family.inputs(MIXED)
    logits, expected = reloaded(**inputs).logits, quantized(**inputs).logits
    assert logits.dtype == dtype
    assert torch.equal(logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert reloaded.generate(**inputs, **options).tolist() == quantized.generate(**inputs, **options).tolist()


def test_layers_that_cannot_be_packed_run_in_4_bits(monkeypatch, tmp_path):
    """With AVX512-BF16, bitsandbytes packs layers in blocks, and fails at sizes that are not multiples of a block."""
    layers = pytest.importorskip("bitsandbytes").nn.modules
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: True)
    tiny_model(text_config={"hidden_size": 128, "intermediate_size": 344}).save_pretrained(tmp_path)
    quantized = AutoModel.from_pretrained(tmp_path, quantization_config=plain_config(4), dtype=torch.float32)
    packed = {
        name.rpartition(".")[2]: module.support_avx512bf16_for_cpu
        for name, module in quantized.named_modules()
        if isinstance(module, layers.Linear4bit)
    }
    assert packed["q_proj"] and packed["o_proj"]
    assert not packed["up_proj"] and not packed["down_proj"]


def test_list_of_a_quantized_model_is_kept(save, tmp_path):
    """It describes the stored weights, unlike the default list."""
    everything = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    quantized = AutoModel.from_pretrained(save()[1], quantization_config=everything)
    quantized.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="quantization_config"):
        reloaded = AutoModel.from_pretrained(tmp_path, quantization_config=plain_config(4))
    assert quantized_layers(reloaded) == quantized_layers(quantized)
    inputs = tiny_inputs(MIXED)
    assert torch.equal(reloaded(**inputs).logits, quantized(**inputs).logits)


def test_loading_options_of_a_quantized_model_have_no_list(save, monkeypatch):
    """In transformers, a list in an fp8 configuration would override the stored one."""
    seen = {}

    def from_pretrained(cls, *args, **kwargs):
        seen.update(kwargs)
        return torch.nn.Module()

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", classmethod(from_pretrained))
    options = FineGrainedFP8Config(dequantize=True)
    config = MGLlavaConfig.from_pretrained(save()[1])
    AutoModel.from_pretrained(save()[1], config=config, quantization_config=options)
    assert "model.vision_tower" in seen["quantization_config"].modules_to_not_convert
    config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    AutoModel.from_pretrained(save()[1], config=config, quantization_config=options)
    assert seen["quantization_config"].modules_to_not_convert is None


def test_quantized_answers_stay_close(family, save):
    """A layer with a wrong weight or scale causes a larger difference than rounding does."""
    model, folder = save(
        make=family.model, text_config={"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    )
    inputs = family.inputs(MIXED)
    mask = comparable_positions(model, inputs)
    expected = model(**inputs).logits[mask]
    for bits, limit in ((8, 0.05), (4, 0.3)):
        quantized = AutoModel.from_pretrained(folder, quantization_config=plain_config(bits), dtype=torch.float32)
        logits = quantized(**inputs).logits[mask]
        assert (logits - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_skips_the_same_modules(save, tmp_path, dtype):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, folder = save()
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = AutoModel.from_pretrained(folder, quantization_config=config, dtype=dtype)
    assert config.modules_to_not_convert is None
    tensors = {
        name.removesuffix(".weight")
        for name, parameter in quantized.named_parameters()
        if type(parameter) is not nn.Parameter
    }
    assert tensors == language_model_layers(model)
    quantized.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    inputs = tiny_inputs(MIXED)
    assert torch.equal(reloaded(**inputs).logits, quantized(**inputs).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_train_on_the_quantized_model(save, bits):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(
        save()[1], quantization_config=mgllava.quantization_config(bits), dtype=torch.bfloat16
    )
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert base.model.language_model.gradient_checkpointing
    lora = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*(q|v)_proj", modules_to_save=["multi_modal_projector"]
    )
    model = peft.get_peft_model(base, lora).train()
    inputs = tiny_inputs([[2], [1, 3]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in with_gradient)
    assert {
        "base_model.model.model.language_model.layers.1.self_attn.v_proj.lora_A.default.weight",
        "base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.weight",
    } <= with_gradient
