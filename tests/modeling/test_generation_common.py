"""What transformers expects of `generate`, under the names that its `GenerationTesterMixin` uses.

Not repeated here is what test_generation.py states already; docs/testing.md lists all names.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationMixin, StaticCache

from mgllava.modeling import CACHE_NAME
from tests.tiny import VOCAB_SIZE, one_prompt, tiny_inputs, tiny_model

MIXED = [[3], [], [1, 5], [2]]
IMAGES = ("pixel_values", "boxes", "num_boxes")
STEPS = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **kwargs})


def new_tokens(model, inputs, **kwargs):
    return generate(model, inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("kwargs", "rows"),
    [
        ({}, 4),
        ({"do_sample": True, "num_return_sequences": 2}, 8),
        ({"num_beams": 2}, 4),
        ({"num_beams": 3, "do_sample": True, "num_return_sequences": 2}, 8),
    ],
    ids=["greedy", "sample", "beam_search", "beam_sample"],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_dict_outputs_use_cache(kwargs, rows, use_cache):
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(MIXED)
    torch.manual_seed(0)
    output = generate(
        model,
        inputs,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **kwargs,
    )
    width, length = 4 * kwargs.get("num_beams", kwargs.get("num_return_sequences", 1)), inputs["input_ids"].shape[1]
    assert output.sequences.shape == (rows, length + STEPS)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == STEPS
    assert {tuple(scores.shape) for scores in output.scores} == {(width, VOCAB_SIZE)}
    for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        queries = 1 if use_cache and step > 0 else length + step
        assert {tuple(state.shape) for state in states} == {(width, queries, 32)}
        assert {tuple(weight.shape) for weight in weights} == {(width, 4, queries, length + step)}
    assert (output.get(CACHE_NAME) is not None) == use_cache


def test_beam_sample_generate(model):
    inputs = tiny_inputs(MIXED)
    torch.manual_seed(0)
    once = new_tokens(model, inputs, num_beams=2, do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    assert torch.equal(once, new_tokens(model, inputs, num_beams=2, do_sample=True, temperature=2.0))
    torch.manual_seed(1)
    assert not torch.equal(once, new_tokens(model, inputs, num_beams=2, do_sample=True, temperature=2.0))


def test_generate_without_input_ids(model):
    output = model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert output.shape == (1, 4) and output[0, 0] == 1  # BOS


@pytest.mark.parametrize("box_counts", [[[]], [[4]], [[1, 5]]], ids=["text", "image", "images"])
def test_past_key_values_format(model, box_counts):
    inputs = tiny_inputs(box_counts)
    cache = model(**inputs, use_cache=True)[CACHE_NAME]
    assert isinstance(cache, DynamicCache) and len(cache) == 2
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, inputs["input_ids"].shape[1], 8)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_the_names_of_all_releases(model, name, recwarn):
    """Releases before 5.24 pass `past_key_values`, later ones `cache`; neither passes on what it deprecates."""
    inputs = tiny_inputs([[3]])
    prompt = {**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
    cache = model(**prompt, use_cache=True)[CACHE_NAME]
    last = model(input_ids=inputs["input_ids"][:, -1:], **{name: cache})
    torch.testing.assert_close(last.logits, model(**inputs).logits[:, -1:])
    assert last[CACHE_NAME].get_seq_length() == inputs["input_ids"].shape[1]
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_one_cache_at_a_time(model):
    inputs = tiny_inputs([[]])
    with pytest.raises(ValueError, match="either `past_key_values` or `cache`"):
        model(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


def test_generate_from_random_inputs_embeds(model):
    """Embeddings need no ids, and other embeddings give another answer."""
    torch.manual_seed(0)
    answers = [
        model.generate(inputs_embeds=torch.randn(2, 5, 32), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        for _ in range(2)
    ]
    assert answers[0].shape == (2, STEPS)
    assert not torch.equal(*answers)


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"use_cache": False}]
)
def test_generate_from_inputs_embeds(model, kwargs):
    inputs = tiny_inputs([[3], [1, 2]])
    expected = new_tokens(model, inputs, **kwargs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(generate(model, inputs, **kwargs), expected)


def test_generate_from_inputs_embeds_with_static_cache(model):
    inputs = tiny_inputs([[3], [1, 2]])
    expected = new_tokens(model, inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    output = generate(model, inputs, cache_implementation="static", disable_compile=True, return_dict_in_generate=True)
    assert isinstance(output[CACHE_NAME], StaticCache)
    assert torch.equal(output.sequences, expected)


def test_generate_continue_from_past_key_values(model):
    inputs = tiny_inputs(MIXED)
    whole = generate(model, inputs, max_new_tokens=6)
    first = generate(model, inputs, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    rest = generate(
        model,
        {"input_ids": first.sequences, "attention_mask": mask},
        max_new_tokens=3,
        **{CACHE_NAME: first[CACHE_NAME]},
    )
    assert torch.equal(rest, whole)


def test_generate_continue_with_another_image(model):
    """A second picture in a later turn: the prefix with the first one comes from the cache."""
    inputs = one_prompt(tiny_inputs([[3, 2]]), [[3, 2]], 0)
    ids, is_image = inputs["input_ids"], inputs["input_ids"][0] == 100
    second = int(is_image.nonzero().flatten()[12])  # 9 + 3 placeholders belong to the first image
    cut = second - 2
    with torch.no_grad():
        first = {name: inputs[name][:1] for name in IMAGES}
        prefix = model(input_ids=ids[:, :cut], attention_mask=torch.ones(1, cut), **first, use_cache=True)
    later = {**inputs, **{name: inputs[name][1:] for name in IMAGES}}
    output = generate(model, later, **{CACHE_NAME: prefix[CACHE_NAME]})
    assert torch.equal(output, generate(model, inputs))


def test_generate_continue_from_inputs_embeds(model):
    inputs = tiny_inputs([[3]])
    whole = new_tokens(model, inputs, max_new_tokens=6)
    embed = model.get_input_embeddings()
    given = {**inputs, "inputs_embeds": embed(inputs["input_ids"])}
    del given["input_ids"]
    first = generate(model, given, max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat([given["inputs_embeds"], embed(first.sequences)], dim=1)
    rest = generate(
        model,
        {"inputs_embeds": longer, "attention_mask": torch.ones(longer.shape[:2])},
        max_new_tokens=3,
        **{CACHE_NAME: first[CACHE_NAME]},
    )
    assert torch.equal(torch.cat([first.sequences, rest], dim=1), whole)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}])
def test_generate_with_static_cache(model, kwargs):
    inputs = tiny_inputs(MIXED)
    output = generate(
        model, inputs, cache_implementation="static", disable_compile=True, return_dict_in_generate=True, **kwargs
    )
    assert isinstance(output[CACHE_NAME], StaticCache)
    width, length = 4 * kwargs.get("num_beams", 1), inputs["input_ids"].shape[1]
    assert output[CACHE_NAME].layers[0].keys.shape[:3] == (width, 2, length + STEPS - 1)
    assert torch.equal(output.sequences, generate(model, inputs, **kwargs))


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="the quantized cache needs hqq")
def test_generate_with_quant_cache(model):
    """Eight bits, and none of the prompt left out: the prefill with the image runs, and the answer starts alike."""
    inputs = tiny_inputs([[3], [1, 2]])
    config = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 4}
    output = generate(
        model, inputs, cache_implementation="quantized", cache_config=config, return_dict_in_generate=True
    )
    assert type(output[CACHE_NAME]).__name__ == "QuantizedCache"
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, : length + 1], generate(model, inputs)[:, : length + 1])


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="this release of transformers leaves images out of a prefill in chunks",
)
@pytest.mark.parametrize("kwargs", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 7, "num_beams": 2}])
def test_generate_with_chunked_prefill(model, kwargs):
    """Chunks end inside the run of placeholders of an image."""
    inputs = tiny_inputs([[3], [1, 2]])
    beams = {"num_beams": kwargs["num_beams"]} if "num_beams" in kwargs else {}
    assert torch.equal(generate(model, inputs, **kwargs), generate(model, inputs, **beams))


def test_generate_methods_with_logits_to_keep(model):
    inputs = tiny_inputs(MIXED)
    assert torch.equal(generate(model, inputs, logits_to_keep=0), generate(model, inputs))


def test_generate_with_and_without_position_ids(model):
    inputs = tiny_inputs(MIXED)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(generate(model, inputs, position_ids=positions), generate(model, inputs))


def test_eager_matches_sdpa_generate():
    inputs, answers = tiny_inputs(MIXED), []
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        answers.append(new_tokens(model, inputs).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_custom_4d_attention_mask(implementation):
    """Two endings behind one prompt with an image in a single row equal two rows."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    inputs = tiny_inputs([[3]])
    prompt = inputs["input_ids"]
    length, ending = prompt.shape[1], torch.tensor([[11, 12], [13, 14]])
    images = {name: inputs[name] for name in IMAGES}
    twice = {name: torch.cat([value, value]) for name, value in images.items()}
    with torch.no_grad():
        rows = model(input_ids=torch.cat([prompt.repeat(2, 1), ending], dim=1), **twice).logits
        total = length + 4
        allowed = torch.ones(total, total).tril().bool()
        allowed[length + 2 :, length : length + 2] = False
        mask = torch.zeros(1, 1, total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        positions = torch.cat([torch.arange(length + 2), torch.arange(length, length + 2)])[None]
        shared = model(
            input_ids=torch.cat([prompt, ending.reshape(1, -1)], dim=1),
            attention_mask=mask,
            position_ids=positions,
            **images,
        ).logits
    torch.testing.assert_close(shared[0, length : length + 2], rows[0, length:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared[0, length + 2 :], rows[1, length:], rtol=1e-4, atol=1e-4)


def test_prompt_lookup_decoding_stops_at_eos(model):
    inputs = tiny_inputs([[3]])
    answer = new_tokens(model, inputs, max_new_tokens=12)[0].tolist()
    eos = answer[5]
    stopped = new_tokens(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3, eos_token_id=eos)[0].tolist()
    assert stopped == answer[: answer.index(eos) + 1]


def test_assisted_decoding_sample(model):
    """Each sampled token is one that the model itself may give; with one candidate that is the greedy answer."""
    inputs = tiny_inputs([[3]])
    assistant = tiny_model(text_config={"num_hidden_layers": 1}, seed=1)
    sampled = new_tokens(model, inputs, assistant_model=assistant, do_sample=True, top_k=1)
    assert torch.equal(sampled, new_tokens(model, inputs))


@pytest.mark.parametrize("same", [True, False])
def test_assisted_decoding_with_logits_to_keep(model, same):
    inputs = tiny_inputs([[1, 2]])
    assistant = model if same else tiny_model(seed=2)
    answers = [
        new_tokens(model, inputs, assistant_model=assistant, **kwargs) for kwargs in ({}, {"logits_to_keep": 0})
    ]
    assert torch.equal(*answers)
    assert torch.equal(answers[0], new_tokens(model, inputs))


@pytest.mark.parametrize("rule", [{"bad_words_ids": True}, {"min_new_tokens": 5}, {"max_length": True}])
def test_generate_obeys_the_usual_rules(model, rule):
    inputs = tiny_inputs([[3]])
    length, plain = inputs["input_ids"].shape[1], new_tokens(model, inputs)[0].tolist()
    if "bad_words_ids" in rule:
        assert plain[0] not in new_tokens(model, inputs, bad_words_ids=[[plain[0]]])[0].tolist()
    elif "min_new_tokens" in rule:
        assert len(new_tokens(model, inputs, eos_token_id=plain[0])[0]) == 1
        assert len(new_tokens(model, inputs, eos_token_id=plain[0], **rule)[0]) >= 5
    else:
        assert (
            model.generate(**inputs, do_sample=False, eos_token_id=None, max_length=length + 2).shape[1] == length + 2
        )


def test_generation_config_is_loaded_with_model(model, tmp_path):
    changed = tiny_model()
    changed.generation_config.update(repetition_penalty=1.3, max_new_tokens=4, eos_token_id=None)
    changed.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generation_config.repetition_penalty == 1.3
    assert loaded.generation_config.suppress_tokens == list(range(100, 128))
    inputs = tiny_inputs([[3]])
    assert torch.equal(loaded.generate(**inputs), changed.generate(**inputs))
