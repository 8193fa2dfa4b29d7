"""Any causal language model computes the same inside our model, or is refused by its type."""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration
from mgllava.modeling import CACHE_NAME
from mgllava.modeling.language_model_common import UnsupportedLanguageModelError, load_language_model
from tests.tiny import IMAGE_SIZE, tiny_config

from .causal_types import ROWS, TYPES, small_config

PAGE = Path(__file__).parents[2] / "docs" / "language_models.md"
PLACEHOLDER = ROWS - 1
# Common types, and types of every special kind: scaled and capped logits, a bias, embeddings with other names, learned
# positions, experts, tied heads, states instead of keys and values.
SAMPLE = [
    "bloom",
    "cohere",
    "dory",
    "falcon",
    "falcon_h1",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_next",
]

# Refused before transformers 5.24.
NEWER_TYPES = ("dbrx", "falcon_mamba", "inkling_text", "mamba", "mamba2")


def listed(heading: str) -> list[str]:
    """List the types under a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"`([\w.-]+)`", section)


NEWER = set(NEWER_TYPES) if CACHE_NAME == "past_key_values" else set()
ACCEPTED = [name for name in listed("Accepted") if name in TYPES and name not in NEWER]


def around(text_config, **kwargs):
    """Build a model around a language model, whose weights are all random, also initial zeros and ones."""
    torch.manual_seed(0)
    vision = tiny_config()
    config = MGLlavaConfig(
        text_config=text_config,
        vision_config=vision.vision_config,
        high_res_vision_config=vision.high_res_vision_config,
        image_token_id=PLACEHOLDER,
        **kwargs,
    )
    model = MGLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("model.language_model.", "lm_head.")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def bare_of(model):
    """Return the language model itself, as its class in transformers, with the same weights."""
    bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    inside = {id(module): name for name, module in bare.named_modules()}
    body = next(name for name, child in bare.named_children() if isinstance(child, type(model.model.language_model)))
    head = inside[id(bare.get_output_embeddings())]
    names = {"model.language_model": body, "lm_head": head}
    state = {
        new + name.removeprefix(old): value
        for name, value in model.state_dict().items()
        for old, new in names.items()
        if name.startswith(f"{old}.")
    }
    bare.load_state_dict(state)
    return bare


def padded_prompts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, PLACEHOLDER, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def with_image(model):
    ids = torch.randint(3, PLACEHOLDER, (1, 14), generator=torch.Generator().manual_seed(0))
    ids[0, 2:12] = PLACEHOLDER
    boxes = torch.tensor([[[1, 2, 30, 40]]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), "boxes": boxes}


def check(text_config, folder):
    model = around(text_config)
    bare, inputs = bare_of(model), padded_prompts()
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, bare(**inputs).logits)

    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = bare.generate(**inputs, suppress_tokens=[PLACEHOLDER], **options)
    assert torch.equal(model.generate(**inputs, **options), expected)

    images = with_image(model)
    model(**images, labels=images["input_ids"]).loss.backward()
    gradient = model.model.multi_modal_projector.linear_2.weight.grad
    assert torch.isfinite(gradient).all() and gradient.any()

    model.save_pretrained(folder)
    loaded, info = MGLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=0, atol=1e-6)
        images["pixel_values"] = torch.zeros_like(images["pixel_values"])
        torch.testing.assert_close(loaded(**images).logits, model(**images).logits)


@pytest.mark.parametrize("model_type", [name for name in SAMPLE if name in ACCEPTED])
def test_logits_answers_and_saving_equal_the_language_model(model_type, tmp_path):
    check(small_config(model_type), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in ACCEPTED if name not in SAMPLE])
def test_every_accepted_type(model_type, tmp_path):
    check(small_config(model_type), tmp_path)


def test_page_lists_every_type_of_this_release_once():
    names = listed("Accepted") + listed("Refused")
    assert len(names) == len(set(names))
    assert sorted(set(TYPES) - set(names)) == []


@pytest.mark.parametrize("model_type", [name for name in listed("Refused") if name in TYPES])
def test_every_refused_type(model_type):
    try:
        config = small_config(model_type)
    except Exception:
        pytest.skip("no small configuration")
    with torch.device("meta"), pytest.raises(UnsupportedLanguageModelError, match=re.escape(repr(model_type))):
        load_language_model(config)


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe"])
def test_loss_of_the_experts_is_added(model_type):
    model, inputs = around(small_config(model_type)), padded_prompts()
    bare = bare_of(model)
    with torch.no_grad():
        expected = bare(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        output = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        plain = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.loss != plain.loss and plain.aux_loss is None
    assert len(output.router_logits) == len(expected.router_logits)


def test_position_ids_are_refused_by_types_without_them():
    model = around(small_config("bloom"))
    ids = torch.randint(3, PLACEHOLDER, (1, 5))
    with pytest.raises(ValueError, match="'bloom' takes no `position_ids`"):
        model(input_ids=ids, position_ids=torch.arange(5)[None])


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_replaced_head_is_used(model_type):
    """PEFT, quantization and resizing replace `lm_head` by another module."""
    model, inputs = around(small_config(model_type)), padded_prompts()
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(ROWS + 5)
        torch.testing.assert_close(model(**inputs).logits[..., :ROWS], before)
        head = torch.nn.Linear(32, ROWS + 5)
        model.set_output_embeddings(head)
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).logits, head(hidden))
        again = copy.deepcopy(model)
        again.lm_head.weight.zero_()
        assert not torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.skipif(
    CACHE_NAME == "past_key_values", reason="this release of transformers drops the cache of Phi-3 then"
)
def test_phi3_gets_its_images_again_when_its_positions_change():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    text_config = small_config("phi3", original_max_position_embeddings=16, rope_parameters=rope, sliding_window=None)
    model = around(text_config)
    inputs = with_image(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, r"read token ids.*`hidden_size_per_layer_input`"),
        ("opt", {"word_embed_proj_dim": 16}, r"token embeddings \(16\) and its layers \(32\) differ in width"),
    ],
)
def test_configurations_of_accepted_types_that_do_not_fit_are_refused(model_type, options, reason):
    with pytest.raises(UnsupportedLanguageModelError, match=f"'{model_type}' cannot be used, since .*{reason}"):
        load_language_model(small_config(model_type, **options))


class OwnGeneration(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


class NoGeneration(LlamaPreTrainedModel):
    pass


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(OwnGeneration, r"overrides how transformers generates \(generate\)"), (NoGeneration, "does not generate")],
)
def test_classes_that_generate_in_their_own_way_or_not_at_all_are_refused(model_class, reason):
    config_class = type("Config", (LlamaConfig,), {"model_type": model_class.__name__.lower()})
    model_class.config_class = config_class
    AutoModelForCausalLM.register(config_class, model_class)
    with pytest.raises(UnsupportedLanguageModelError, match=f"since it {reason}"):
        load_language_model(config_class())


class StrangeConfig(LlamaConfig):
    model_type = "strange_llm"


class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output


def test_third_party_language_model_works_after_registration(tmp_path):
    sizes = small_config("llama").to_dict()
    sizes.pop("model_type")
    with pytest.raises(ValueError, match=r"'strange_llm'.*AutoConfig.register"):
        MGLlavaConfig(text_config={"model_type": "strange_llm"})
    with pytest.raises(UnsupportedLanguageModelError, match=r"'strange_llm'.*AutoModelForCausalLM.register"):
        around(StrangeConfig(**sizes))
    AutoConfig.register("strange_llm", StrangeConfig)
    AutoModelForCausalLM.register(StrangeConfig, StrangeForCausalLM)
    check(StrangeConfig(**sizes), tmp_path)
