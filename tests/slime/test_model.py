"""The model next to other implementations of its parts, and what belongs to SliME alone."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, CLIPVisionModel, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mgllava import SlimeConfig, SlimeForConditionalGeneration
from mgllava.modeling.adapters_slime import SlimeQueryAdapter, route
from mgllava.modeling.pretrained_common import CACHE_NAME
from tests.slime.golden import GOLDEN, VOCAB_SIZE
from tests.tiny import NUM_FUSED_TOKENS, one_slime_prompt, slime_inputs, tiny_slime

MIXED = [[3], [], [1, 0], [2, 4]]


@pytest.fixture(scope="module")
def model():
    return tiny_slime().double()


@torch.no_grad()
def test_vision_features_are_those_of_clip(slime):
    clip = CLIPVisionModel.from_pretrained(GOLDEN / "checkpoint" / "vision_tower", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 336, 336)
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(slime.model.vision_tower(pixels).last_hidden_state, expected)


@torch.no_grad()
def test_text_alone_is_the_bare_llama(slime):
    llama = LlamaForCausalLM(slime.config.text_config).eval()
    weights = slime.state_dict()
    own = {
        name.replace("model.language_model.", "model."): weights[name] for name in weights if "language_model" in name
    }
    llama.load_state_dict({**own, "lm_head.weight": weights["lm_head.weight"]})
    ids = torch.randint(3, VOCAB_SIZE, (2, 20))
    torch.testing.assert_close(slime(ids).logits, llama(ids).logits)


@torch.no_grad()
def test_attention_of_the_adapters_is_that_of_torch():
    adapter = SlimeQueryAdapter(256, 9).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    peer = nn.MultiheadAttention(256, 2, batch_first=True).double()
    peer.in_proj_weight.copy_(torch.cat([layer.weight for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj)]))
    peer.in_proj_bias.copy_(torch.cat([layer.bias for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj)]))
    peer.out_proj.load_state_dict(adapter.out_proj.state_dict())
    tokens = torch.randn(3, 25, 256, dtype=torch.float64)
    context = adapter.context_norm(tokens)
    queries = (adapter.query_norm(adapter.queries) + adapter.positions).expand(3, -1, -1)
    attended, _ = peer(queries, context + adapter.key_positions(25), context)
    torch.testing.assert_close(adapter(tokens), adapter.output_norm(attended))


def written_out(local, text, is_text, top_p, temperature):
    """Which tokens the router keeps, one after the other, in double precision."""
    scores = []
    for token in local.double():
        similarities = [
            nn.functional.cosine_similarity(token, word, dim=0, eps=1e-8) for word in text.double()[is_text]
        ]
        scores.append(sum(similarities, torch.zeros((), dtype=torch.float64)))
    probabilities = (torch.stack(scores) / temperature).softmax(0).tolist()
    order = sorted(range(len(probabilities)), key=lambda index: (-probabilities[index], index))
    kept, total = [], 0.0
    for index in order:
        kept.append(index)
        total += probabilities[index]
        if total > top_p:
            break
    return sorted(kept), probabilities


def test_router_on_random_cases_with_ties():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    compared = 0
    for case in range(1000):
        num_tokens, num_words = 1 + case % 13, 1 + case % 5
        local = draw(num_tokens, 8) * (1, 1e-4)[case % 3 // 2]  # however short, a token has a direction
        if case % 2:  # every token twice: of two equal ones the first is kept
            local = local.repeat_interleave(2, dim=0)
        is_text = torch.rand(num_words, generator=generator) < 0.8
        top_p, temperature = (0.3, 0.5, 0.95, 1.0)[case % 4], (0.5, 1.0)[case % 2]
        text = draw(num_words, 8)
        expected, probabilities = written_out(local, text, is_text, top_p, temperature)
        total = torch.tensor(sorted(probabilities, reverse=True), dtype=torch.float64).cumsum(0)
        if (total - top_p).abs().min() < 1e-5:
            continue  # a sum that rounding decides
        kept, _ = route(local, text, is_text, top_p, temperature)
        assert kept.nonzero().flatten().tolist() == expected, case
        compared += 1
    assert compared > 700


def test_a_router_of_everything_drops_nothing():
    """Where a few tokens have most of the probability, rounded sums exceed 1 before the last token."""
    for seed in range(8):
        torch.manual_seed(seed)
        local, text = torch.randn(1008, 8), torch.randn(1, 8).repeat(20, 1)
        assert route(local, text, torch.ones(20, dtype=torch.bool), 1.0, 1.0)[0].all()


def test_router_computes_in_float32_whatever_the_dtype():
    """A cumulative sum in bfloat16 stalls below 0.95, and everything is kept."""
    torch.manual_seed(0)
    local, text = torch.randn(864, 64).bfloat16(), torch.randn(30, 64).bfloat16()
    is_text = torch.ones(30, dtype=torch.bool)
    kept, scores = route(local, text, is_text, 0.95, 1.0)
    expected, _ = route(local.float(), text.float(), is_text, 0.95, 1.0)
    assert torch.equal(kept, expected) and not kept.all()
    assert scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route(local, text, is_text, 0.95, 1.0)[0], expected)


@torch.no_grad()
def test_eight_prompts_with_0_to_3_images_equal_one_at_a_time(model):
    counts = [[2], [], [1, 3, 0], [4, 1], [], [0], [3, 3], [2, 2, 2]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for side in ("left", "right"):
        inputs = slime_inputs(counts, padding_side=side)
        logits = model(**inputs).logits
        answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :] if side == "left" else None
        for index in range(len(counts)):
            single = one_slime_prompt(inputs, counts, index)
            expected = model(**single)
            seen = single["input_ids"][0] != model.config.image_token_id
            if expected.get("kept_tokens") is not None:
                seen[~seen] = expected.kept_tokens
            own = logits[index][inputs["attention_mask"][index].bool()]
            torch.testing.assert_close(own[seen], expected.logits[0][seen])
            if answers is not None:
                alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
                assert torch.equal(answers[index], alone), index


@torch.no_grad()
def test_features_are_free_of_text_and_kept_tokens_are_not(model):
    inputs = slime_inputs([[4]])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -2:] = torch.tensor([[11, 71]])
    first, second = model(**inputs), model(**other)
    assert torch.equal(first.image_hidden_states, second.image_hidden_states)
    assert not torch.equal(first.kept_tokens, second.kept_tokens)
    assert not first.kept_tokens.all() and not second.kept_tokens.all()


@torch.no_grad()
def test_tokens_that_are_not_kept_do_not_matter(model):
    """Neither their embeddings nor the length of the prompt with them changes an answer."""
    inputs = slime_inputs([[4]])
    kept = model(**inputs).kept_tokens
    arguments, _, _ = model.model.embed(
        {name: inputs[name] for name in model.image_arguments}, input_ids=inputs["input_ids"]
    )
    seen = inputs["input_ids"][0] != model.config.image_token_id
    seen[~seen] = kept
    shortened = model(inputs_embeds=arguments["inputs_embeds"][:, seen]).logits
    torch.testing.assert_close(model(**inputs).logits[:, seen], shortened)


@torch.no_grad()
def test_what_follows_an_image_follows_its_last_token_that_is_kept():
    """Wherever generation starts from: with placeholders that are cut out, masked ones, or embeddings."""
    model = tiny_slime(router_top_p=0.2).double()
    inputs = slime_inputs([[3], [2, 3]])
    inputs = {**inputs, "input_ids": inputs["input_ids"][:, :-3], "attention_mask": inputs["attention_mask"][:, :-3]}
    assert not model(**inputs).kept_tokens[-1]
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, max_new_tokens=4, **options)[:, length:]
    assert torch.equal(model.generate(**inputs, max_length=length + 4, **options)[:, length:], expected)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=4, **options), expected)


@torch.no_grad()
def test_text_behind_the_padding_does_not_reach_the_router(model):
    inputs = slime_inputs([[4], []])
    before = model(**inputs).kept_tokens
    inputs["input_ids"][inputs["attention_mask"] == 0] = 17
    assert torch.equal(model(**inputs).kept_tokens, before)


def test_the_router_may_be_kept_from_answers():
    inputs = slime_inputs([[4]])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    blind = tiny_slime(router_sees_answers=False).double()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -2:] = torch.tensor([[11, 71]])
    with torch.no_grad():
        first, second = blind(**inputs, labels=labels), blind(**changed, labels=labels)
        assert torch.equal(first.kept_tokens, second.kept_tokens)
        # Without labels there is no answer to hide.
        assert not torch.equal(blind(**inputs).kept_tokens, blind(**changed).kept_tokens)


WRONG = [
    ({"image_grids": None}, "`image_grids` must be given with `pixel_values`"),
    ({"image_grids": torch.tensor([[1, 5]])}, "must describe the 4 views of `pixel_values`"),
    ({"image_grids": torch.tensor([[-1, -3]])}, "must describe the 4 views"),
    ({"image_grids": torch.tensor([[1.0, 3.0]])}, "must be int64 or int32 of shape"),
    ({"image_grids": torch.tensor([1, 3])}, "must be int64 or int32 of shape"),
    ({"pixel_values": torch.zeros(4, 3, 48, 48)}, r"must have shape \(num_views, 3, 42, 42\)"),
    ({"pixel_values": torch.zeros(0, 3, 42, 42), "image_grids": torch.zeros(0, 2).long()}, "with at least one view"),
    ({"pixel_values": None}, "`pixel_values` and `mm_encoder_outputs` are missing"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_inputs_are_named(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(**{**slime_inputs([[3]]), **wrong})


def test_arrays_and_lists_are_refused(model):
    inputs = slime_inputs([[3]])
    for name, value in (("pixel_values", inputs["pixel_values"].numpy()), ("image_grids", [[1, 3]])):
        with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got"):
            model(**{**inputs, name: value})


def test_features_without_their_grids_are_refused(model):
    inputs = slime_inputs([[3]])
    features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grids"))
    assert model(**inputs, mm_encoder_outputs={"image": features}).kept_tokens is not None
    features = BaseModelOutputWithPooling(pooler_output=features.pooler_output)
    with pytest.raises(ValueError, match="features without `image_grids`"):
        model(**inputs, mm_encoder_outputs={"image": features})


def test_an_image_spread_over_two_prompts_is_refused(model):
    inputs = slime_inputs([[1], [1]])
    ids = inputs["input_ids"].clone()
    places = (ids[0] == model.config.image_token_id).nonzero().flatten()
    ids[0, places[-1]] = 7
    ids[1, 0] = model.config.image_token_id
    with pytest.raises(ValueError, match="placeholders of an image must be in one prompt"):
        model(**{**inputs, "input_ids": ids})


def test_positions_that_a_file_lacks_are_computed(model, tmp_path):
    """As in a LoRA release, whose original leaves them uninitialized."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = [name for name in weights if name.endswith(".positions")]
    save_file({k: v for k, v in weights.items() if k not in names}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded, SlimeForConditionalGeneration) and len(names) == 2
    for name in names:
        assert torch.equal(loaded.state_dict()[name].double(), weights[name]), name
    with torch.no_grad():
        assert loaded(**slime_inputs([[3]])).logits.isfinite().all()


def test_number_of_tokens_of_the_branches():
    inputs = slime_inputs([[2]])
    for branch, kept in (("global", NUM_FUSED_TOKENS), ("local", 8), ("both", NUM_FUSED_TOKENS + 1 + 8)):
        model = tiny_slime(branch=branch, router_top_p=1.0)
        with torch.no_grad():
            assert model(**inputs).kept_tokens.sum() == kept


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_runs_no_token_that_is_dropped(side):
    """It costs what the language model sees, and is equal to masking the others, gradients included."""
    model = tiny_slime().double().train()
    inputs = slime_inputs(MIXED, padding_side=side)
    is_text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != model.config.image_token_id)
    labels = inputs["input_ids"].masked_fill(~is_text | (inputs["input_ids"] == 1), -100)
    lengths, found = [], []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, arguments: lengths.append(arguments["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for options in ({"use_cache": True}, {}):
        torch.manual_seed(0)
        output = model(**inputs, labels=labels, **options)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        found.append((output.loss, output.logits[labels != -100], [one for one in gradients if one is not None]))
    hook.remove()
    torch.testing.assert_close(found[1], found[0])
    seen = inputs["attention_mask"].clone()
    seen[inputs["input_ids"] == model.config.image_token_id] = output.kept_tokens.long()
    assert lengths == [inputs["input_ids"].shape[1], int(seen.sum(-1).max())]


def test_a_model_of_global_views_encodes_no_tile():
    model, inputs = tiny_slime(branch="global"), slime_inputs([[4], [1]])
    views = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, given: views.append(len(given[0])))
    with torch.no_grad():
        output = model(**inputs)
        inputs["pixel_values"][1:5] = 7.0  # all tiles of the first image
        torch.testing.assert_close(model(**inputs).logits, output.logits)
    hook.remove()
    assert views == [2, 2]


@torch.no_grad()
def test_padding_with_the_embedding_of_the_placeholder_is_padding():
    """Such as zeros, where the row of the placeholder is zero because it was never trained."""
    model = tiny_slime().double()
    model.get_input_embeddings().weight[model.config.image_token_id] = 0
    inputs = slime_inputs(MIXED)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    logits, is_text = model(**inputs).logits, inputs["attention_mask"].bool()
    answers = [model.generate(**inputs, **options, num_beams=beams) for beams in (1, 2)]
    length = inputs["input_ids"].shape[1]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).masked_fill(~is_text.unsqueeze(-1), 0)
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits[is_text], logits[is_text])
    for beams, expected in zip((1, 2), answers, strict=True):
        found = model.generate(inputs_embeds=embeds, **inputs, **options, num_beams=beams)
        assert torch.equal(found, expected[:, length:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("llm", "values"),
    [
        ("mistral", {"sliding_window": 8}),
        pytest.param(
            "mamba",
            {},
            marks=pytest.mark.skipif(CACHE_NAME != "cache", reason="Mamba has a cache of its own before 5.24"),
        ),
    ],
)
def test_windows_and_states_do_not_count_dropped_tokens(llm, values, caplog):
    """A masked token takes a place in a sliding window, and changes the state of a recurrent layer."""
    model = tiny_slime(llm, text_config=values).double()
    inputs = slime_inputs([[4]])
    output = model(**inputs)
    seen = inputs["input_ids"][0] != model.config.image_token_id
    seen[~seen] = output.kept_tokens
    arguments = model.model.embed(
        {name: inputs[name] for name in model.image_arguments}, input_ids=inputs["input_ids"]
    )
    shortened = model(inputs_embeds=arguments[0]["inputs_embeds"][:, seen], use_cache=False)
    torch.testing.assert_close(output.logits[:, seen], shortened.logits)
    answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert shortened.logits[0, -1, : model.config.unpadded_vocab_size].argmax() == answer
    assert "no cache is returned" in caplog.text
    model(**inputs, use_cache=True)
    assert "the result differs from that of `generate`" in caplog.text


def _windowed_model():
    model, inputs = tiny_slime("mistral", text_config={"sliding_window": 8}).double(), slime_inputs([[4]])
    torch.compiler.reset()
    return model, inputs


@torch.no_grad()
def test_compiled_windows_leave_dropped_tokens_out_too(monkeypatch):
    """Without windows, a compiled `forward` masks them, and its shapes depend on no image."""
    model, inputs = _windowed_model()
    found, leaves_out = [], torch.compile(model.model._leaves_out, backend="eager")
    monkeypatch.setattr(model.model, "_leaves_out", lambda *given: found.append(leaves_out(*given)) or found[-1])
    for window in (8, None):
        model.config.text_config.sliding_window = window
        model(**inputs, use_cache=False)
        model(**inputs)
    assert found == [True, True, False, False]


@torch.no_grad()
@pytest.mark.slow
def test_compiled_windows_give_the_logits_of_eager_ones(caplog):
    model, inputs = _windowed_model()
    compiled = torch.compile(model, backend="eager")(**inputs)
    assert compiled.past_key_values is None
    assert "no cache is returned" in caplog.text
    torch.testing.assert_close(compiled.logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("llm", "values"), [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_a_compiled_forward_generates_the_same_tokens(llm, values):
    model, inputs = tiny_slime(llm, text_config=values).double(), slime_inputs(MIXED)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    for cache in (None, "static"):
        assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), expected)


def test_values_of_the_configuration():
    assert SlimeConfig().separator_token_id == 1919  # as in the published models with Vicuna
    for name in ("router_top_p", "router_temperature"):  # whole numbers, as people write them
        assert getattr(SlimeConfig(**{name: 1}), name) == 1
    wrong = {
        "router_temperature": [0, float("nan"), float("inf")],
        "router_top_p": [0, 1.5, float("nan")],
        "num_local_queries": [0, 143],
        "separator_token_id": [-1],
        "vision_config": [
            {"hidden_size": 130, "num_attention_heads": 2},
            {"hidden_size": 400, "num_attention_heads": 4},
        ],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(StrictDataclassError, match=f"`{name}"):
                SlimeConfig(**{name: value})
