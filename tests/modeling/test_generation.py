"""All modes of `generate`, on prompts with no image, one and two images."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
)

from mgllava.modeling import CACHE_NAME, language_model_common
from tests.tiny import one_prompt, tiny_config, tiny_inputs, tiny_model

MIXED = [[3], [], [1, 5], [2]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **kwargs)


def new_tokens(model, inputs, **kwargs):
    return generate(model, inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def greedy_without_cache(model, inputs, steps):
    """Run the model on the whole prompt for every token."""
    inputs, tokens = dict(inputs), []
    for _ in range(steps):
        scores = model(**inputs, use_cache=False).logits[:, -1]
        scores[:, model.config.unused_token_ids] = -torch.inf
        tokens.append(scores.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return torch.cat(tokens, dim=1)


def test_greedy_with_cache_equals_greedy_without_cache(model):
    inputs = one_prompt(tiny_inputs(MIXED), MIXED, 2)
    assert torch.equal(new_tokens(model, inputs), greedy_without_cache(model, inputs, 6))


def test_answers_depend_on_the_image(family, any_model):
    inputs = family.inputs([[3], [3]])
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(new_tokens(any_model, inputs), new_tokens(any_model, other))


def test_batch_of_eight_with_0_to_120_boxes_equals_one_at_a_time():
    # With random weights, scores may nearly tie, and rounding would decide. This seed has no near ties in float64.
    model = tiny_model(text_config={"max_position_embeddings": 1024}).double()
    counts = [[1], [120], [17], [], [60], [2, 3], [99], [5]]
    inputs = tiny_inputs(counts)
    batch = new_tokens(model, inputs, max_new_tokens=8)
    for index in range(len(counts)):
        single = new_tokens(model, one_prompt(inputs, counts, index), max_new_tokens=8)
        assert batch[index].tolist() == single[0].tolist()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    ],
)
def test_beams_of_a_mixed_batch_equal_those_of_each_prompt(family, any_model, kwargs):
    inputs = family.inputs(MIXED)
    batch = new_tokens(any_model, inputs, **kwargs)
    per_prompt = kwargs.get("num_return_sequences", 1)
    for index in range(len(MIXED)):
        single = new_tokens(any_model, family.one_prompt(inputs, MIXED, index), **kwargs)
        assert batch[index * per_prompt : (index + 1) * per_prompt].tolist() == single.tolist()


def test_beams_without_num_boxes(model):
    """Then `boxes` has no padding."""
    inputs = tiny_inputs([[2, 2], [2]])
    expected = new_tokens(model, inputs, num_beams=3)
    del inputs["num_boxes"]
    assert torch.equal(new_tokens(model, inputs, num_beams=3), expected)


def repeated_logits(model, inputs):
    """Logits of inputs that `generate` repeated before images were encoded, and those of each prompt, repeated."""
    ids, others = model._expand_inputs_for_generation(expand_size=2, **inputs)
    with torch.no_grad():
        return model(input_ids=ids, **others).logits, model(**inputs).logits.repeat_interleave(2, dim=0)


def test_images_that_are_not_encoded_yet_are_repeated_prompt_by_prompt(family, any_model):
    """Releases of transformers that do not encode images before the prefill ask for this."""
    torch.testing.assert_close(*repeated_logits(any_model, family.inputs(MIXED)))


def test_repeated_images_without_padded_boxes(model):
    inputs = tiny_inputs([[2, 2], [2]])
    del inputs["num_boxes"]
    torch.testing.assert_close(*repeated_logits(model, inputs))


def test_several_samples_per_prompt_see_their_own_images(family, any_model):
    inputs = family.inputs(MIXED)
    # Sampling from the best candidate alone is greedy.
    samples = new_tokens(any_model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    greedy = new_tokens(any_model, inputs)
    assert samples.tolist() == greedy.repeat_interleave(3, dim=0).tolist()


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_static_cache_equals_dynamic_cache(family, any_model, kwargs):
    inputs = family.inputs(MIXED)
    output = generate(
        any_model, inputs, cache_implementation="static", disable_compile=True, return_dict_in_generate=True, **kwargs
    )
    assert isinstance(output[CACHE_NAME], StaticCache)
    assert torch.equal(output.sequences, generate(any_model, inputs, **kwargs))


def test_without_cache_equals_with_cache(family, any_model):
    inputs = family.inputs(MIXED)
    assert torch.equal(new_tokens(any_model, inputs, use_cache=False), new_tokens(any_model, inputs))


def test_placeholder_and_padding_are_never_generated(family):
    """Neither by default nor with options that replace or extend the generation configuration of the model."""
    model, inputs = family.model(), family.inputs(MIXED)
    with torch.no_grad():
        model.lm_head.weight[model.config.unused_token_ids] *= 50.0
    assert model(**inputs).logits[:, -1].argmax(-1).max() >= 100  # they have the highest scores
    replaced = {"generation_config": GenerationConfig(max_new_tokens=10)}
    for kwargs in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 3.0}, {"suppress_tokens": [5]}, replaced):
        assert new_tokens(model, inputs, max_new_tokens=10, **kwargs).max() < 100


def test_streamer_receives_every_token(family, any_model):
    class Collector(TextIteratorStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    inputs, collector = family.inputs([[3]]), Collector()
    output = generate(any_model, inputs, streamer=collector)
    assert collector.tokens == output[0].tolist()


def text_model():
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(tiny_config().text_config).eval()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(lambda family: {"prompt_lookup_num_tokens": 3}, id="prompt lookup"),
        pytest.param(
            lambda family: {"assistant_model": family.model(text_config={"num_hidden_layers": 1}, seed=1)},
            id="fewer layers",
        ),
        # It drafts without the images.
        pytest.param(
            lambda family: {
                "assistant_model": family.model(text_config={"hidden_size": 16, "num_key_value_heads": 4}, seed=1)
            },
            id="another width",
        ),
        pytest.param(
            lambda family: {"assistant_model": text_model()},
            id="text model",
            marks=pytest.mark.skipif(
                not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
                reason="this release of transformers passes images to the assistant, which a text model refuses",
            ),
        ),
    ],
)
def test_assisted_decoding_equals_greedy(family, any_model, options):
    inputs = family.inputs([[3]])
    expected = new_tokens(any_model, inputs, max_new_tokens=12)
    assert torch.equal(new_tokens(any_model, inputs, max_new_tokens=12, **options(family)), expected)


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="on this release of transformers, the assistant encodes the images itself",
)
def test_an_assistant_of_the_same_width_sees_the_images(family, any_model, monkeypatch):
    said = []
    monkeypatch.setattr(language_model_common.logger, "warning_once", said.append)
    for hidden_size, is_warned in ((32, False), (16, True)):
        text_config = {"hidden_size": hidden_size, "num_key_value_heads": 4}
        generate(any_model, family.inputs([[3]]), assistant_model=family.model(text_config=text_config))
        assert any("the layers of the assistant model are" in message for message in said) == is_warned


def test_without_a_prompt_answers_begin_with_the_first_token(any_model):
    answer = any_model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None)
    bos = torch.tensor([[any_model.generation_config.bos_token_id]])
    assert torch.equal(answer, generate(any_model, {"input_ids": bos}, max_new_tokens=3))


def test_early_exit_is_refused(family, any_model):
    inputs, config = family.inputs([[3]]), GenerationConfig(assistant_early_exit=1)
    for options in ({"assistant_early_exit": 1}, {"generation_config": config}):
        with pytest.raises(ValueError, match="`assistant_early_exit` must be None, got 1"):
            generate(any_model, inputs, **options)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_from_embeddings_equals_ids(family, any_model, kwargs):
    inputs = family.inputs([[3], [1, 2]])
    expected = new_tokens(any_model, inputs, **kwargs)
    embeds = any_model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(generate(any_model, {**inputs, "inputs_embeds": embeds}, **kwargs), expected)


def test_second_turn_continues_on_the_cache(model):
    inputs = tiny_inputs([[3]])
    first = generate(model, inputs, return_dict_in_generate=True)
    question = torch.tensor([[11, 12, 13]])
    ids = torch.cat([first.sequences, question], dim=1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    continued = generate(model, longer, **{CACHE_NAME: first[CACHE_NAME]})
    images = {name: inputs[name] for name in ("pixel_values", "boxes", "num_boxes")}
    assert torch.equal(continued, generate(model, {**longer, **images}))


def test_second_image_in_a_later_turn(model):
    """The prefix with the first image is in the cache."""
    inputs = one_prompt(tiny_inputs([[3, 2]]), [[3, 2]], 0)
    images = ("pixel_values", "boxes", "num_boxes")
    ids, is_image = inputs["input_ids"], inputs["input_ids"][0] == 100
    second = int(is_image.nonzero().flatten()[12])  # 9 + 3 placeholders belong to the first image
    cut = second - 2
    with torch.no_grad():
        first = {name: inputs[name][:1] for name in images}
        prefix = model(input_ids=ids[:, :cut], attention_mask=torch.ones(1, cut), **first, use_cache=True)
    later = {**inputs, **{name: inputs[name][1:] for name in images}}
    output = generate(model, later, **{CACHE_NAME: prefix[CACHE_NAME]})
    assert torch.equal(output, generate(model, inputs))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cache_has_the_names_of_all_releases(model, name, recwarn):
    """transformers passes `past_key_values` before 5.24 and `cache` later. No deprecated name is used inside."""
    inputs = tiny_inputs([[3]])
    prompt = {**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
    cache = model(**prompt, use_cache=True)[CACHE_NAME]
    last = model(input_ids=inputs["input_ids"][:, -1:], **{name: cache})
    torch.testing.assert_close(last.logits, model(**inputs).logits[:, -1:])
    assert last[CACHE_NAME].get_seq_length() == inputs["input_ids"].shape[1]
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_two_caches_are_refused(family, any_model):
    inputs = family.inputs([[]])
    with pytest.raises(ValueError, match="either `past_key_values` or `cache`"):
        any_model(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="this release of transformers does not pass images to a chunked prefill",
)
@pytest.mark.parametrize("kwargs", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 7, "num_beams": 2}])
def test_chunked_prefill_equals_prefill_at_once(family, any_model, kwargs):
    """Some chunks end inside the placeholders of an image."""
    inputs = family.inputs([[3], [1, 2]])
    beams = {"num_beams": kwargs["num_beams"]} if "num_beams" in kwargs else {}
    assert torch.equal(generate(any_model, inputs, **kwargs), generate(any_model, inputs, **beams))


def test_logits_processors_of_the_caller_are_applied(family, any_model):
    inputs = family.inputs([[3]])

    def only_seven(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([7]), 0.0)

    output = new_tokens(any_model, inputs, logits_processor=LogitsProcessorList([only_seven]))
    assert output.tolist() == [[7] * 6]
