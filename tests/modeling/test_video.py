"""Videos in the model: features, batches, generation, loss, and inputs that do not fit."""

import pytest
import torch
from transformers import CompileConfig

from tests.tiny import (
    IMAGE_TOKEN_ID,
    NUM_FUSED_TOKENS,
    VARIANTS,
    VIDEO_TOKEN_ID,
    one_prompt_with_videos,
    tiny_inputs,
    tiny_model,
    tiny_video_inputs,
)

# A prompt of text alone, and images (numbers of boxes) and videos (numbers of boxes of their frames) in any order.
MIXED = [[[2, 1, 3]], [1, [1, 2], 2], [], [[1], [2, 2], 3]]
VIDEO_NAMES = (
    "pixel_values_videos",
    "low_res_pixel_values_videos",
    "video_boxes",
    "num_video_boxes",
    "num_video_frames",
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(video_token_id=VIDEO_TOKEN_ID)


@pytest.fixture(scope="module")
def inputs():
    return tiny_video_inputs(MIXED)


def video_part(inputs):
    return {name: inputs[name] for name in VIDEO_NAMES}


def generate(model, inputs, **kwargs):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_each_frame_is_embedded_like_an_image_with_its_own_low_resolution_pixels(model, inputs):
    videos = video_part(inputs)
    outputs = model.get_video_features(**videos)
    assert outputs.last_hidden_state.shape == (8, NUM_FUSED_TOKENS, 32)
    assert [len(tokens) for tokens in outputs.pooler_output] == [33, 21, 10, 22]
    with torch.no_grad():
        fused, boxes, _ = model.model.encode_images(
            videos["pixel_values_videos"],
            videos["video_boxes"],
            videos["num_video_boxes"],
            videos["low_res_pixel_values_videos"],
        )
    frames = [torch.cat([fused[j], boxes[j, :count]]) for j, count in enumerate(videos["num_video_boxes"].tolist())]
    torch.testing.assert_close(outputs.pooler_output[1], torch.cat(frames[3:5]))
    # Low-resolution frames that are made from the others would be different ones.
    derived = model.get_image_features(videos["pixel_values_videos"], videos["video_boxes"], videos["num_video_boxes"])
    assert not torch.allclose(derived.last_hidden_state, outputs.last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("frames_per_step", [1, 3, 8])
def test_steps_do_not_change_features_and_limit_the_frames_in_a_tower(model, inputs, frames_per_step, monkeypatch):
    videos = video_part(inputs)
    expected = model.get_video_features(**videos, frames_per_step=100, output_hidden_states=True)
    sizes = []
    hook = model.model.high_res_vision_tower.register_forward_pre_hook(lambda m, i: sizes.append(len(i[0])))
    monkeypatch.setattr(model.config, "frames_per_step", frames_per_step)
    outputs = model.get_video_features(**videos, output_hidden_states=True)
    hook.remove()
    assert max(sizes) == frames_per_step and sum(sizes) == 8
    torch.testing.assert_close(list(outputs.pooler_output), list(expected.pooler_output), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "absent"),
    [(MIXED, []), ([[[2, 2, 2]]], ["num_video_frames", "num_video_boxes"])],
    ids=["mixed", "one"],
)
def test_videos_that_are_not_encoded_yet_are_repeated_prompt_by_prompt(model, prompts, absent):
    inputs = tiny_video_inputs(prompts)
    for name in absent:  # then there is one video, and its boxes are not padded
        del inputs[name]
    ids, others = model._expand_inputs_for_generation(expand_size=2, **inputs)
    with torch.no_grad():
        expected = model(**inputs).logits.repeat_interleave(2, dim=0)
        torch.testing.assert_close(model(input_ids=ids, **others).logits, expected)


def test_features_replace_the_placeholders_of_their_modality(model, inputs):
    embeds = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        outputs = model(**inputs)
    hook.remove()
    ids = inputs["input_ids"]
    torch.testing.assert_close(embeds[0][ids == VIDEO_TOKEN_ID], torch.cat(outputs.video_outputs.pooler_output))
    torch.testing.assert_close(embeds[0][ids == IMAGE_TOKEN_ID], torch.cat(outputs.image_outputs.pooler_output))
    torch.testing.assert_close(outputs.video_hidden_states, torch.cat(outputs.video_outputs.pooler_output))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_equals_its_prompts_alone(variant):
    model = tiny_model(video_token_id=VIDEO_TOKEN_ID, **VARIANTS[variant])
    per_box = model.config.num_tokens_per_box
    prompts = MIXED if per_box else [[[0] * len(i) if isinstance(i, list) else 0 for i in p] for p in MIXED]
    inputs = tiny_video_inputs(prompts)
    if not per_box:  # the boxes have no tokens, but are there
        counts = {"num_boxes": (3, "boxes"), "num_video_boxes": (8, "video_boxes")}
        for name, (count, boxes) in counts.items():
            inputs[name] = torch.ones(count, dtype=torch.int64)
            inputs[boxes] = torch.tensor([[[10, 12, 40, 50]]]).repeat(count, 1, 1)
    with torch.no_grad():
        logits = model(**inputs).logits
        for index in range(len(prompts)):
            single = one_prompt_with_videos(inputs, prompts, index)
            expected = model(**single).logits[0]
            torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=2e-3, rtol=1e-3)


def test_generation_of_a_mixed_batch_equals_its_prompts_alone(model, inputs):
    answers = generate(model, inputs)
    singles = [one_prompt_with_videos(inputs, MIXED, index) for index in range(len(MIXED))]
    assert answers == [generate(model, single)[0] for single in singles]
    changed = {**inputs, "low_res_pixel_values_videos": -3 * inputs["low_res_pixel_values_videos"]}
    assert generate(model, changed) != answers


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static", "compile_config": None},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_ways_to_generate(model, inputs, options):
    if "prompt_lookup_num_tokens" in options:
        inputs = one_prompt_with_videos(inputs, MIXED, 1)
    options = {name: value for name, value in options.items() if value is not None}
    if "cache_implementation" in options:
        options |= {"compile_config": CompileConfig(backend="eager", fullgraph=False), "disable_compile": True}
    answers = generate(model, inputs, **options)
    if "num_beams" in options:
        singles = [one_prompt_with_videos(inputs, MIXED, index) for index in range(len(MIXED))]
        assert answers == [generate(model, single, **options)[0] for single in singles]
    else:
        assert answers == generate(model, inputs)


def test_generation_from_features_and_from_embeddings(model, inputs):
    expected = generate(model, inputs, num_beams=2)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = {
            "image": model.get_image_features(inputs["pixel_values"], inputs["boxes"], inputs["num_boxes"]),
            "video": model.get_video_features(**video_part(inputs)),
        }
    assert generate(model, {**text, "mm_encoder_outputs": features}, num_beams=2) == expected
    embeds = {"inputs_embeds": model.get_input_embeddings()(text["input_ids"]).detach()}
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert model.generate(**rest, **embeds, **options).tolist() == expected


def test_embeddings_of_placeholders_with_equal_rows(inputs):
    """New rows of a converted table are all the mean of the others."""
    model = tiny_model(video_token_id=VIDEO_TOKEN_ID)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[VIDEO_TOKEN_ID] = table[IMAGE_TOKEN_ID]
    for index in (0, 2):  # a video, and text alone
        single = one_prompt_with_videos(inputs, MIXED, index)
        embeds = {**single, "inputs_embeds": model.get_input_embeddings()(single["input_ids"]), "input_ids": None}
        torch.testing.assert_close(model(**embeds).logits, model(**single).logits)
    single = one_prompt_with_videos(inputs, MIXED, 1)
    embeds = {**single, "inputs_embeds": model.get_input_embeddings()(single["input_ids"]), "input_ids": None}
    with pytest.raises(ValueError, match="Pass `input_ids` for a prompt with images and videos"):
        model(**embeds)


def test_the_towers_run_once_in_generation(model, inputs):
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, inputs)
    hook.remove()
    assert len(calls) == 2  # of the images, and of the videos


def test_placeholders_are_neither_generated_nor_learned(model, inputs):
    assert VIDEO_TOKEN_ID in model.config.unused_token_ids
    assert VIDEO_TOKEN_ID in model.generation_config.suppress_tokens
    with torch.no_grad():
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        is_placeholder = (labels == VIDEO_TOKEN_ID) | (labels == IMAGE_TOKEN_ID)
        torch.testing.assert_close(model(**inputs, labels=labels.masked_fill(is_placeholder, -100)).loss, loss)
    # The row of a placeholder that is a word of the vocabulary is not learned either.
    inside = tiny_model(video_token_id=VIDEO_TOKEN_ID, unpadded_vocab_size=120)
    with torch.no_grad():
        head = inside.lm_head.weight
        head[VIDEO_TOKEN_ID] = 100 * head.mean(0)
        assert all(VIDEO_TOKEN_ID not in row for row in generate(inside, inputs))


@pytest.mark.parametrize("frames_per_step", [2, None])
def test_gradient_checkpointing_gives_the_same_gradients(inputs, frames_per_step):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(video_token_id=VIDEO_TOKEN_ID, frames_per_step=frames_per_step).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of noise in training
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


def test_modules_run_once_if_other_processes_run_them_too(model, inputs, monkeypatch):
    expected = model(**inputs).logits
    monkeypatch.setattr("mgllava.modeling.modeling_mgllava.must_be_touched", lambda modules: True)
    monkeypatch.setattr(model.config, "frames_per_step", 1)
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1)) for module in model.model.vision_modules() if module
    ]
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_arguments_of_videos_are_ignored_without_pixels(model):
    inputs = tiny_inputs([[2]])
    expected = model(**inputs).logits
    extra = {"video_boxes": torch.zeros(1, 1, 4), "num_video_frames": torch.tensor([3])}
    torch.testing.assert_close(model(**inputs, **extra).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_res_pixel_values_videos": None}, r"`low_res_pixel_values_videos` must have shape \(8, 3, 42, 42\)"),
        ({"pixel_values_videos": torch.zeros(8, 3, 42, 42)}, r"`pixel_values_videos` must have shape \(num_frames"),
        ({"video_boxes": None}, "`video_boxes` must be given with `pixel_values_videos`"),
        ({"video_boxes": torch.zeros(7, 1, 4)}, "`video_boxes` must have shape .* with 8 frames"),
        ({"num_video_frames": torch.tensor([3, 4])}, r"8 in all, got \[3, 4\]"),
        ({"num_video_boxes": torch.zeros(8, dtype=torch.int64)}, "`num_video_boxes` must lie between 1"),
        ({"pixel_values_videos": None}, "video placeholders, but no video: `pixel_values_videos`"),
        ({"mm_encoder_outputs": {"video": object()}}, "`pixel_values_videos` or `mm_encoder_outputs` with a video"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error(model, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **change})


def test_a_model_without_videos_says_so(inputs):
    with pytest.raises(ValueError, match=r"`config.video_token_id` is not set. docs/video.md"):
        tiny_model()(**inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video_token_id": IMAGE_TOKEN_ID}, "`video_token_id` must differ"),
        ({"video_token_id": 128}, "`video_token_id` must be a row"),
        ({"frames_per_step": 0}, "`frames_per_step` must be a positive number"),
    ],
)
def test_configurations_that_do_not_fit_are_an_error(arguments, message):
    with pytest.raises(Exception, match=message):
        tiny_model(**arguments)


def test_the_vocabulary_keeps_the_row_of_videos():
    model = tiny_model(video_token_id=VIDEO_TOKEN_ID)
    with pytest.raises(ValueError, match=r"`config.video_token_id`, 101"):
        model.resize_token_embeddings(101)
