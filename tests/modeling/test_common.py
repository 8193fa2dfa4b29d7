"""What transformers expects of every model, under the names that its `ModelTesterMixin` and `VLMModelTest` use.

Not repeated here is what other files of this folder state already; docs/testing.md lists all names.
"""

import copy
import importlib.util
import inspect
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GenerationMixin, PreTrainedModel

from mgllava import MGLlavaForConditionalGeneration, MGLlavaModel
from tests.tiny import IMAGE_TOKEN_ID, NUM_FUSED_TOKENS, VOCAB_SIZE, tiny_config, tiny_inputs, tiny_model

MIXED = [[3], [], [1, 5], [2]]
IMAGES = ("pixel_values", "boxes", "num_boxes")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def logits(model, inputs=None):
    with torch.no_grad():
        return model.eval()(**(inputs or tiny_inputs(MIXED))).logits


def load(folder, **kwargs):
    return MGLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)


# Saving and loading


def test_can_use_safetensors_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    stored = [name for shard in shards for name in load_file(shard)]
    assert sorted(stored) == sorted(model.state_dict())  # each tensor once, under the name that it has in the model
    loaded, info = load(tmp_path)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))


def test_torch_save_load(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = tiny_model(seed=1)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_from_pretrained_no_checkpoint(model):
    loaded = MGLlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


def test_load_contiguous_weights(tmp_path):
    model = tiny_model()
    weight = model.model.multi_modal_projector.linear_1.weight
    weight.data = weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_tied_weights_keys(llm, tmp_path):
    model = tiny_model(llm, text_config={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # the file is no mapping
    loaded, info = load(tmp_path)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


def test_load_save_without_tied_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)[0]
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_correct_missing_keys(model, tmp_path):
    state = model.state_dict()
    gone = ["model.box_projector.linear_2.weight", "model.fusion.low_res_proj.bias"]
    assert set(gone) <= set(state)
    model.save_pretrained(
        tmp_path,
        state_dict={name: value for name, value in state.items() if name not in gone} | {"stray": torch.ones(1)},
    )
    loaded, info = load(tmp_path)
    assert sorted(info["missing_keys"]) == gone
    assert list(info["unexpected_keys"]) == ["stray"]
    # What is missing starts as in a new model: this projection at zero.
    assert not loaded.model.fusion.low_res_proj.bias.any()


def test_base_model_prefix_loads_base_weights(model, saved, tmp_path):
    base, info = MGLlavaModel.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.model.state_dict().items())
    base.save_pretrained(tmp_path)
    headed, info = load(tmp_path)
    assert list(info["missing_keys"]) == ["lm_head.weight"] and not info["unexpected_keys"]
    assert all(torch.equal(value, headed.model.state_dict()[name]) for name, value in model.model.state_dict().items())


def test_load_with_mismatched_shapes(saved):
    config = tiny_config(text_config={"vocab_size": VOCAB_SIZE + 8})
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`"):
        load(saved, config=config)


def test_can_load_ignoring_mismatched_shapes(model, saved):
    config = tiny_config(text_config={"vocab_size": VOCAB_SIZE + 8})
    loaded, info = load(saved, config=config, ignore_mismatched_sizes=True)
    names = {name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]}
    assert names == {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert torch.equal(
        loaded.model.vision_tower.state_dict()["pre_layrnorm.weight"],
        model.model.vision_tower.state_dict()["pre_layrnorm.weight"],
    )
    assert torch.isfinite(loaded.lm_head.weight).all()


@pytest.mark.parametrize("variant", [{}, {"fusion_type": "resampler", "object_merging": "box_to_fused"}])
def test_can_init_all_missing_weights(variant):
    """Weights that no file has get the distribution of a new model, wherever the model was built."""
    torch.manual_seed(0)
    new = MGLlavaForConditionalGeneration(tiny_config(**variant))
    filled = MGLlavaForConditionalGeneration.from_pretrained(None, config=tiny_config(**variant), state_dict={})
    for name, value in filled.named_parameters():
        expected = new.get_parameter(name)
        if name.startswith("model.vision_tower"):  # transformers passes by CLIP's own rules in that case
            assert torch.isfinite(value).all()
        else:
            spread = {"rel": 0.5, "abs": 1e-8}
            assert value.norm().item() == pytest.approx(expected.norm().item(), **spread), name
            assert value.abs().max().item() == pytest.approx(expected.abs().max().item(), **spread), name


def test_can_load_with_device_context_manager(model, saved):
    with torch.device("cpu"):
        loaded = load(saved)[0]
    assert torch.equal(logits(loaded), logits(model))


def test_cannot_load_with_meta_device_context_manager(saved):
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        load(saved)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_bc_torch_dtype(saved, name):
    loaded = load(saved, **{name: torch.bfloat16})[0]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for part in (loaded, loaded.model.vision_tower, loaded.model.high_res_vision_tower, loaded.model.language_model):
        assert part.dtype == part.config.dtype == torch.bfloat16


def test_reverse_loading_mapping(model, saved):
    """No renaming happens on the way: other readers of safetensors find the names of the modules."""
    assert sorted(load_file(saved / "model.safetensors")) == sorted(model.state_dict())


# What a model is made of


def test_forward_signature():
    for model_class in (MGLlavaModel, MGLlavaForConditionalGeneration):
        names = list(inspect.signature(model_class.forward).parameters)[1:]
        assert names[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
        assert {*IMAGES, "mm_encoder_outputs", "kwargs"} <= set(names)
        assert model_class.main_input_name == "input_ids" and model_class.base_model_prefix == "model"
    assert issubclass(MGLlavaForConditionalGeneration, GenerationMixin)
    assert not issubclass(MGLlavaModel, GenerationMixin)


def test_model_get_set_embeddings():
    for model in (tiny_model(), tiny_model().model):
        table = torch.nn.Embedding(VOCAB_SIZE, 32)
        model.set_input_embeddings(table)
        assert model.get_input_embeddings() is table
    model, head = tiny_model(), torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    assert model.get_output_embeddings() is model.lm_head
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.lm_head is head


@pytest.mark.parametrize("tied", [False, True])
def test_resize_tokens_embeddings(tied):
    model = tiny_model(text_config={"tie_word_embeddings": tied})
    inputs = tiny_inputs([[2]])
    before = logits(model, inputs)
    for rows in (VOCAB_SIZE + 10, VOCAB_SIZE - 10):
        model.resize_token_embeddings(rows)
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows
        assert model.config.text_config.vocab_size == model.vocab_size == rows
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        kept = min(rows, VOCAB_SIZE)
        torch.testing.assert_close(logits(model, inputs)[..., :kept], before[..., :kept])


def test_resize_embeddings_untied_no_reinit_on_post_init():
    model = tiny_model()
    model.resize_token_embeddings(VOCAB_SIZE + 10)
    head = model.lm_head.weight.clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, head)


def test_internal_model_config_and_subconfig_are_same(model):
    config = model.config
    assert model.model.config is config
    assert model.model.vision_tower.config is config.vision_config
    assert model.model.high_res_vision_tower.config is config.high_res_vision_config
    assert model.model.language_model.config is config.text_config


def test_tp_plan_matches_params(model):
    names = [re.sub(r"\d+", "*", name.removesuffix(".weight")) for name, _ in model.named_parameters()]
    assert "lm_head" in model.tp_plan
    assert [pattern for pattern in model.tp_plan if pattern not in names] == []
    assert any("q_proj" in pattern for pattern in model.tp_plan)


# Outputs


@pytest.mark.parametrize("training", [False, True])
def test_determinism(training):
    """A model is deterministic in training too: nothing is dropped at random."""
    model, inputs = tiny_model().train(training), tiny_inputs(MIXED)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_hidden_states_output(model):
    inputs = tiny_inputs([[2], [1]])
    length = inputs["input_ids"].shape[1]
    for part in (model, model.model):
        assert part(**inputs).hidden_states is None
        states = part(**inputs, output_hidden_states=True).hidden_states
        assert [tuple(state.shape) for state in states] == [(2, length, 32)] * 3
    torch.testing.assert_close(states[-1], model.model(**inputs).last_hidden_state)
    # The first one is what the language model is given: text and images in their places.
    given = model.model(**inputs, output_hidden_states=True)
    is_image = inputs["input_ids"] == IMAGE_TOKEN_ID
    assert torch.equal(given.hidden_states[0][is_image], given.image_hidden_states)


def test_attention_outputs():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs([[2], [1]])
    length = inputs["input_ids"].shape[1]
    output = model(**inputs, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, length, length)] * 2
    real = inputs["attention_mask"].bool()
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1)[:, 0][real], torch.ones(int(real.sum())))
    model.config.text_config.output_attentions = True
    assert len(model(**inputs).attentions) == 2


def test_retain_grad_hidden_states_attentions():
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model(**tiny_inputs([[2]]), output_hidden_states=True, output_attentions=True)
    for tensor in (output.hidden_states[0], output.attentions[0], output.image_hidden_states):
        tensor.retain_grad()
    output.logits.flatten()[-1].backward()
    for tensor in (output.hidden_states[0], output.attentions[0], output.image_hidden_states):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("part", ["model", "base"])
def test_get_image_features_output(model, part):
    inputs = tiny_inputs([[2, 3]])
    part = model if part == "model" else model.model
    images = {name: inputs[name] for name in IMAGES}
    output = part.get_image_features(**images)
    assert output.last_hidden_state.shape == (2, NUM_FUSED_TOKENS, 32)
    assert [tuple(tokens.shape) for tokens in output.pooler_output] == [(11, 32), (12, 32)]
    assert output.hidden_states is None and output.attentions is None
    as_tuple = part.get_image_features(**images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.last_hidden_state)


def test_get_image_features_hidden_states_and_attentions():
    """They are those of the low-resolution tower: 2 layers on 9 patches and CLS."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs([[2, 3]])
    images = {name: inputs[name] for name in IMAGES}
    output = model.get_image_features(**images, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 10, 10)] * 2
    assert torch.equal(output.last_hidden_state, model.get_image_features(**images).last_hidden_state)


def test_mismatching_num_image_tokens(model):
    inputs = tiny_inputs([[2], [2]])
    one = {name: inputs[name][:1] for name in IMAGES}
    with pytest.raises(ValueError, match=r"holds 22 image placeholders, but its 1 image\(s\) give 11 embeddings"):
        model(**{**inputs, **one})
    with pytest.raises(ValueError, match="holds 11 image placeholders, but its 2"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]})


# Attention implementations


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("use_mask", [True, False])
def test_eager_matches_sdpa_inference(padding_side, use_mask):
    inputs = tiny_inputs(MIXED, padding_side=padding_side)
    mask = inputs["attention_mask"].bool()
    if not use_mask:
        del inputs["attention_mask"]
    results = {}
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        results[implementation] = logits(model, inputs)[mask]
    torch.testing.assert_close(results["sdpa"], results["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # compiles
def test_flex_attention_matches_eager():
    inputs = tiny_inputs(MIXED)
    mask, model = inputs["attention_mask"].bool(), tiny_model()
    model.set_attn_implementation("eager")
    expected = logits(model, inputs)[mask]
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(logits(model, inputs)[mask], expected, rtol=1e-4, atol=1e-4)


def test_sdpa_can_dispatch_composite_models(saved):
    for implementation in ("sdpa", "eager"):
        loaded = load(saved, attn_implementation=implementation)[0]
        parts = [module for module in loaded.modules() if isinstance(module, PreTrainedModel)]
        assert len(parts) >= 5
        assert {part.config._attn_implementation for part in parts} == {implementation}
    # By default each part takes the best that it has.
    assert load(saved)[0].model.vision_tower.config._attn_implementation == "sdpa"


def test_attn_implementation_composite_models(model, saved):
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    loaded = load(saved, attn_implementation=chosen)[0]
    assert loaded.model.language_model.config._attn_implementation == "eager"
    assert loaded.model.vision_tower.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(loaded, tiny_inputs([[2]])), logits(model, tiny_inputs([[2]])))


def test_config_attn_implementation_setter():
    config = tiny_config()
    config._attn_implementation = "eager"
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    config._attn_implementation = {"text_config": "sdpa"}
    assert config.text_config._attn_implementation == "sdpa"
    assert config.vision_config._attn_implementation == "eager"


def test_can_set_attention_dynamically_composite_model():
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_flash_attn_2_can_dispatch_composite_models(saved):
    """No part refuses it; what is missing here is the package (where it is there, the model loads)."""
    if importlib.util.find_spec("flash_attn") is not None:
        assert load(saved, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
        return
    with pytest.raises(ImportError, match=r"(?i)flash.?att.*install"):
        load(saved, attn_implementation="flash_attention_2", dtype=torch.bfloat16)


# Training


def gradients(model, inputs):
    model.zero_grad()
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_training():
    torch.manual_seed(0)
    model, inputs = tiny_model().train(), tiny_inputs([[3], [1, 2]], padding_side="right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_training_gradient_checkpointing_use_reentrant_true():
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    loss, expected = gradients(tiny_model(), inputs)
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    checkpointed, found = gradients(model, inputs)
    torch.testing.assert_close(checkpointed, loss)
    # Re-entrant checkpoints give no gradient to what lies before the first layer that asks for one.
    assert {name for name in expected if "language_model" in name} <= set(found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_checkpointing_with_frozen_towers():
    """Stage 1 of the paper's training: towers and language model frozen, the rest learns through them."""
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        for part in (model.model.vision_tower, model.model.high_res_vision_tower, model.model.language_model):
            part.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, inputs))
    (loss, expected), (checkpointed, found) = results
    assert expected and all(name.startswith(("model.fusion", "model.multi_modal", "model.box")) for name in expected)
    torch.testing.assert_close(checkpointed, loss)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_gradient_checkpointing_enable_disable():
    model = tiny_model()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(layers) >= 4 and all(layer.gradient_checkpointing for layer in layers)
    assert model.model.language_model.is_gradient_checkpointing and model.model.vision_tower.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not any(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_enable_input_require_grads(checkpointing):
    """What adapters on a frozen model rely on: the first layer's input has a gradient."""
    model = tiny_model().requires_grad_(False)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = torch.nn.Parameter(torch.zeros(32))
    model.model.language_model.norm.register_forward_pre_hook(lambda module, given: (given[0] + adapter,))
    inputs = tiny_inputs([[2]])
    output = model.train()(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
    assert output.hidden_states[0].requires_grad
    output.loss.backward()
    assert adapter.grad.abs().sum() > 0
    if not checkpointing:  # which keeps the gradient for itself
        model.disable_input_require_grads()
        assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_causal_lm_loss_honors_shift_labels(model):
    """Sequence-parallel training hands over targets that are shifted already, placeholders among them."""
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    zeros = torch.zeros_like(labels)
    torch.testing.assert_close(model(**inputs, labels=zeros, shift_labels=shifted).loss, expected)
    assert (shifted == IMAGE_TOKEN_ID).any()  # the caller's tensor is left as it was


def test_loss_from_embeddings_equals_the_loss_from_ids(model):
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).loss
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs, labels=labels).loss, expected)
