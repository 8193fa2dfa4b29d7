"""Models with small random weights: inputs, loss, gradients, variants, saving and loading."""

import importlib.util
import inspect

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from mgllava import MGLlavaForConditionalGeneration, MGLlavaModel
from tests.modeling.conftest import comparable_positions
from tests.tiny import IMAGE_TOKEN_ID, NUM_FUSED_TOKENS, VARIANTS, one_prompt, tiny_config, tiny_inputs, tiny_model

MIXED = [[3], [], [1, 5], [2]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("llm", ["llama", "phi3", "qwen2", "qwen3", "mistral"])
def test_tied_head_is_stored_once_and_tied_again(family, llm, tmp_path):
    model = family.model(llm, text_config={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(set(model.state_dict()) - {"lm_head.weight"})
    loaded = family.model_class.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = family.inputs(MIXED)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_body_loads_from_the_whole_model_and_vice_versa(family, any_model, tmp_path):
    any_model.save_pretrained(tmp_path / "whole")
    body, info = family.body_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    body.save_pretrained(tmp_path / "body")
    whole, info = family.model_class.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert list(info["missing_keys"]) == ["lm_head.weight"] and not info["unexpected_keys"]
    for name, value in any_model.model.state_dict().items():
        assert torch.equal(value, body.state_dict()[name]) and torch.equal(value, whole.model.state_dict()[name])


@pytest.mark.parametrize("variant", [{}, {"fusion_type": "resampler", "object_merging": "box_to_fused"}])
def test_missing_weights_start_as_in_a_new_model(variant):
    torch.manual_seed(0)
    new = MGLlavaForConditionalGeneration(tiny_config(**variant))
    filled = MGLlavaForConditionalGeneration.from_pretrained(None, config=tiny_config(**variant), state_dict={})
    for name, value in filled.named_parameters():
        expected = new.get_parameter(name)
        if name.startswith("model.vision_tower"):  # transformers does not apply the rules of CLIP here
            assert torch.isfinite(value).all()
        else:
            spread = {"rel": 0.5, "abs": 1e-8}
            assert value.norm().item() == pytest.approx(expected.norm().item(), **spread), name
            assert value.abs().max().item() == pytest.approx(expected.abs().max().item(), **spread), name


def test_arguments_of_forward_and_configurations_of_submodules(model):
    for model_class in (MGLlavaModel, MGLlavaForConditionalGeneration):
        names = list(inspect.signature(model_class.forward).parameters)[1:]
        assert names[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
        # `Trainer` drops inputs that the signature does not name.
        assert {"pixel_values", "boxes", "num_boxes", "image_position_ids", "mm_encoder_outputs"} <= set(names)
    parts = model.model
    assert parts.config is model.config
    assert parts.vision_tower.config is model.config.vision_config
    assert parts.high_res_vision_tower.config is model.config.high_res_vision_config
    assert parts.language_model.config is model.config.text_config


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_give_the_model_that_generates(family, auto_class, any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is family.model_class


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_equals_one_prompt_at_a_time(model, padding_side):
    inputs = tiny_inputs(MIXED, padding_side=padding_side)
    with torch.no_grad():
        batch = model(**inputs).logits
        for index in range(len(MIXED)):
            single = model(**one_prompt(inputs, MIXED, index)).logits[0]
            row = batch[index, inputs["attention_mask"][index].bool()]
            torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-4)


def test_box_tokens_follow_the_fused_tokens_of_their_image(model):
    inputs = tiny_inputs([[2, 3]])
    fused, boxes, _ = model.model.encode_images(inputs["pixel_values"], inputs["boxes"], inputs["num_boxes"])
    features = model.get_image_features(inputs["pixel_values"], inputs["boxes"], inputs["num_boxes"]).pooler_output
    for index, count in enumerate((2, 3)):
        assert torch.equal(features[index], torch.cat([fused[index], boxes[index, :count]]))


def test_states_and_attentions_on_request():
    model, inputs = tiny_model(), tiny_inputs([[2], [1]])
    model.set_attn_implementation("eager")
    plain, length = model(**inputs), inputs["input_ids"].shape[1]
    assert plain.hidden_states is None and plain.attentions is None
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, length, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, length, length)] * 2
    torch.testing.assert_close(output.hidden_states[-1], model.model(**inputs).last_hidden_state)
    # The first state is the input of the language model, with image embeddings at the placeholders.
    is_image = inputs["input_ids"] == IMAGE_TOKEN_ID
    assert torch.equal(output.hidden_states[0][is_image], output.image_hidden_states)


def test_image_features_have_the_states_of_the_low_resolution_tower():
    """The tower has two layers; its tokens are CLS and 9 patches."""
    model, inputs = tiny_model(), tiny_inputs([[2, 3]])
    model.set_attn_implementation("eager")
    images = {name: inputs[name] for name in ("pixel_values", "boxes", "num_boxes")}
    plain = model.get_image_features(**images)
    assert plain.last_hidden_state.shape == (2, NUM_FUSED_TOKENS, 32)
    assert plain.hidden_states is None and plain.attentions is None
    output = model.get_image_features(**images, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 10, 10)] * 2
    as_tuple = model.get_image_features(**images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)


def test_missing_boxes_are_an_error_for_a_model_that_uses_them(model):
    """The number of placeholders is right here, since an image without objects has one for its zero box."""
    inputs = tiny_inputs([[1], [1]])
    images = {"pixel_values": inputs.pop("pixel_values")}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="`boxes` must be given with `pixel_values`, got None for 2 image"):
            call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **images)
    without = tiny_model(object_merging="none")
    prompts = tiny_inputs([[1], [1]], tokens_per_box=0)
    del prompts["boxes"], prompts["num_boxes"]
    assert torch.isfinite(without(**prompts).logits).all()


def test_placeholders_without_images_are_an_error(model):
    inputs = tiny_inputs([[3], []])
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    message = "The prompt holds 12 image placeholders, but no image"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**ids)
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=model.get_input_embeddings()(ids["input_ids"]), attention_mask=ids["attention_mask"])
    # Embeddings may contain the images already.
    embeds = model.get_input_embeddings()(ids["input_ids"]).masked_fill((ids["input_ids"] == 100)[..., None], 0.5)
    assert torch.isfinite(model(inputs_embeds=embeds, attention_mask=ids["attention_mask"]).logits).all()


def test_boxes_without_pixels_are_ignored(model):
    inputs = tiny_inputs([[], []])
    with_boxes = {**inputs, "boxes": torch.rand(2, 3, 4), "num_boxes": torch.tensor([3, 1])}
    assert torch.equal(model(**with_boxes).logits, model(**inputs).logits)


def test_precomputed_features_equal_pixels(family, any_model):
    inputs = family.inputs(MIXED)
    expected = any_model(**inputs).logits
    images = {name: inputs.pop(name) for name in any_model.image_arguments}
    features = any_model.get_image_features(**images)
    assert torch.equal(any_model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


def test_inputs_embeds_equal_input_ids(family, any_model):
    inputs = family.inputs([[3], [], [1, 2]], padding_side="right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = any_model(**inputs)
    embeds = any_model.get_input_embeddings()(inputs.pop("input_ids"))
    output = any_model(inputs_embeds=embeds, **inputs)
    assert torch.equal(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


def test_logits_to_keep_selects_positions(family, any_model):
    inputs = family.inputs([[2], [1]])
    full = any_model(**inputs).logits
    positions, of_each_row = torch.tensor([2, 5]), torch.tensor([[1, 3], [4, 0]])
    mask = torch.rand(full.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    for kept, expected in (
        (1, full[:, -1:]),
        (4, full[:, -4:]),
        (positions, full[:, positions]),
        (of_each_row, torch.stack([full[0, of_each_row[0]], full[1, of_each_row[1]]])),
        (mask, full[mask]),
    ):
        torch.testing.assert_close(any_model(**inputs, logits_to_keep=kept).logits, expected)
    with pytest.raises(ValueError, match=r"`logits_to_keep` must be .* got shape \(1, 1, 1\)"):
        any_model(**inputs, logits_to_keep=torch.zeros(1, 1, 1, dtype=torch.long))


def test_return_dict_false_gives_a_tuple(family, any_model):
    inputs = family.inputs([[2]])
    output = any_model(**inputs, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], any_model(**inputs).logits)


def test_loss_is_cross_entropy_over_the_original_vocabulary_without_image_positions(model):
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == IMAGE_TOKEN_ID, -100)
    logits = output.logits[:, :-1, :100]  # the 28 rows after them are the placeholder and padding
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    total = model(**inputs, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(total, expected * (targets != -100).sum() / 10)


def test_shifted_labels_replace_labels(model):
    """Trainers that split sequences pass them, with the labels at placeholders."""
    inputs = tiny_inputs([[3], [1, 2]], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    zeros = torch.zeros_like(labels)
    torch.testing.assert_close(model(**inputs, labels=zeros, shift_labels=shifted).loss, expected)
    assert (shifted == IMAGE_TOKEN_ID).any()  # the tensor of the caller is not changed


def test_resized_vocabulary_counts_in_loss_and_generation(family):
    model = family.model()
    model.generation_config.suppress_tokens = [7, *model.config.unused_token_ids]  # 7 is from the user
    model.resize_token_embeddings(105, pad_to_multiple_of=8)
    assert model.config.text_config.vocab_size == 112
    assert model.config.unpadded_vocab_size == 105
    assert model.generation_config.suppress_tokens == [7, 100, *range(105, 112)]
    ids = torch.tensor([[1, 5, 103, 104, 2]])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_padding_rows_of_the_table_are_not_vocabulary(family):
    model = family.model(unpadded_vocab_size=None)
    model.resize_token_embeddings(pad_to_multiple_of=100)
    assert model.config.text_config.vocab_size == 200
    assert model.config.unused_token_ids == [100, *range(128, 200)]
    model.resize_token_embeddings(130)
    model.resize_token_embeddings(150)
    assert model.config.unused_token_ids == [100]


def test_table_without_the_placeholder_is_refused(family, tmp_path):
    model = family.model()
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"`new_num_tokens` must be greater than .* 100\), got 100"):
            part.resize_token_embeddings(100)
    assert model.get_input_embeddings().num_embeddings == 128
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path)
    assert family.model_class.from_pretrained(tmp_path).config.text_config.vocab_size == 101


def test_labels_after_the_vocabulary_are_refused(family, any_model):
    ids = torch.tensor([[1, 5, 103, 2]])  # 103 is a padding row of the table
    for labels in (ids, ids.where(ids != 103, -1)):
        with pytest.raises(ValueError, match=r"`labels` must be ids from 0 to 99 or -100.*resize_token_embeddings"):
            any_model(input_ids=ids, labels=labels)


@pytest.mark.parametrize("is_stage_1", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, is_stage_1):
    """In stage 1, towers and language model are frozen, and gradients pass through them."""
    inputs = family.inputs([[3], [1, 2]], padding_side="right")
    gradients = []
    frozen = ("model.vision_tower", "model.high_res_vision_tower", "model.language_model", "lm_head")
    for checkpointing in (False, True):
        model = family.model().train()
        if is_stage_1:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of noise in training
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith(frozen) for name in gradients[0]) != is_stage_1
    torch.testing.assert_close(gradients[1], gradients[0])


def test_every_parameter_has_a_gradient():
    for variant in VARIANTS.values():
        model = tiny_model(**variant)
        inputs = tiny_inputs([[3]], tokens_per_box=model.config.num_tokens_per_box)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(family, any_model, implementation, tmp_path):
    any_model.save_pretrained(tmp_path)
    other = family.model_class.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    for part in (other, other.model.vision_tower, other.model.language_model):
        assert part.config._attn_implementation == implementation
    inputs = family.inputs(MIXED)
    mask = comparable_positions(any_model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(
            other(**inputs).logits[mask], any_model(**inputs).logits[mask], rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow  # compiles
def test_flex_attention_matches_eager():
    inputs = tiny_inputs(MIXED)
    mask, model = inputs["attention_mask"].bool(), tiny_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs).logits[mask]
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[mask], expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_is_not_refused(family):
    """If the package is missing, the error says so instead of refusing the model."""
    model = family.model().to(torch.bfloat16)
    if importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
        return
    with pytest.raises(ImportError, match=r"(?i)flash.?att.*install"):
        model.set_attn_implementation("flash_attention_2")


VALUES = [
    *({"fusion_type": name} for name in ("conv_gate_concat", "channel_concat", "plain_channel_concat")),
    *({"fusion_type": name} for name in ("patch_info_mining", "resampler", "none")),
    *({"object_merging": name} for name in ("box_to_fused", "fused_to_box", "none")),
    *({"box_feature_type": name} for name in ("multi_level", "last_stage")),
    {"fusion_type": "none", "object_merging": "none"},
]


@pytest.mark.parametrize("variant", VALUES, ids=lambda variant: "-".join(variant.values()))
def test_variants_save_load_and_batch_like_single(variant, tmp_path):
    model = tiny_model(**variant)
    model.save_pretrained(tmp_path)
    loaded, info = MGLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tiny_inputs(MIXED, tokens_per_box=model.config.num_tokens_per_box)
    with torch.no_grad():
        batch = loaded.eval()(**inputs).logits
        for index in range(len(MIXED)):
            single = model(**one_prompt(inputs, MIXED, index)).logits[0]
            row = batch[index, inputs["attention_mask"][index].bool()]
            torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vision_on_disk_gives_the_same_logits(variant, tmp_path):
    model = tiny_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    placement = {"model.language_model": "cpu", "lm_head": "cpu"}
    placement |= {f"model.{name}": "disk" for name, _ in model.model.named_children() if name != "language_model"}
    offloaded = MGLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=placement, offload_folder=tmp_path / "offload"
    )
    inputs = tiny_inputs([[3], [1]], tokens_per_box=model.config.num_tokens_per_box)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("object_merging", ["concat", "box_to_fused", "fused_to_box"])
def test_boxes_matter_and_padding_boxes_do_not(object_merging):
    model = tiny_model(object_merging=object_merging)
    inputs = tiny_inputs([[2], [4]], tokens_per_box=model.config.num_tokens_per_box)
    logits = model(**inputs).logits
    padded = {**inputs, "boxes": inputs["boxes"].clone()}
    padded["boxes"][0, 2:] = torch.tensor([10.0, 10.0, 50.0, 50.0])
    torch.testing.assert_close(model(**padded).logits, logits)
    padded["boxes"][0, :2] = torch.tensor([0.0, 0.0, 96.0, 96.0])
    assert (model(**padded).logits - logits).abs().max() > 1e-3


WRONG_INPUTS = [
    (
        {"num_boxes": torch.tensor([2])},
        "The prompt holds 12 image placeholders, but its 1 image.s. give 11 embeddings",
    ),
    ({"num_boxes": torch.tensor([0])}, "`num_boxes` must lie between 1 and the 3 rows of `boxes`, got .0."),
    ({"num_boxes": torch.tensor([4])}, "`num_boxes` must lie between 1 and the 3 rows of `boxes`, got .4."),
    ({"num_boxes": torch.tensor([3, 3])}, r"`num_boxes` must have shape \(1,\), got \(2,\)"),
    ({"boxes": torch.zeros(1, 3, 5)}, r"`boxes` must have shape \(num_images, max_boxes, 4\).*got \(1, 3, 5\)"),
    ({"boxes": torch.zeros(3, 4)}, r"`boxes` must have shape .*got \(3, 4\)"),
    ({"boxes": torch.zeros(2, 3, 4)}, r"`boxes` must have shape .* with 1 images.*got \(2, 3, 4\)"),
    ({"boxes": torch.zeros(1, 3, 4, dtype=torch.bfloat16)}, "`boxes` must be int64.*got torch.bfloat16.*lose digits"),
    ({"boxes": torch.zeros(1, 3, 4, dtype=torch.float16)}, "`boxes` must be int64.*got torch.float16.*lose digits"),
    ({"boxes": torch.zeros(1, 3, 4, dtype=torch.uint8)}, "`boxes` must be int64.*got torch.uint8.*lose digits"),
    ({"num_boxes": torch.tensor([3.0])}, "`num_boxes` must be int64 or int32, got torch.float32"),
    ({"boxes": torch.full((1, 3, 4), torch.nan)}, r"`boxes` must be finite, got NaN or infinity for image.s. \[0\]"),
    ({"pixel_values": torch.zeros(1, 3, 64, 64)}, r"`pixel_values` must have shape \(num_images, 3, 96, 96\), got"),
    ({"inputs_embeds": torch.zeros(1, 18, 32)}, "exactly one of `input_ids` and `inputs_embeds`"),
    ({"mm_encoder_outputs": {"image": object()}}, "either `pixel_values` or `mm_encoder_outputs`"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG_INPUTS, ids=lambda value: None if isinstance(value, dict) else value
)
def test_wrong_inputs_are_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(**{**tiny_inputs([[3]]), **wrong})
