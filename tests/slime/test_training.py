"""Losses, kept tokens and gradients of training, and the weights that it starts from."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgllava import SlimeForConditionalGeneration
from mgllava.modeling.adapters_slime import sincos_positions
from mgllava.training import check_trained, freeze_all_but, load_recipe
from tests.slime.golden import (
    NUM_GLOBAL,
    REFERENCE_IMAGE_ID,
    VOCAB_SIZE,
    cases,
    expand,
    load_json,
    normalized_views,
    num_placeholders,
    tensors,
)
from tests.tiny import slime_inputs, tiny_slime

# The original's names of what it trains, and ours; it keeps queries, keys and values of an adapter in one tensor.
RENAMED = {
    "model.mm_projector.projection.0": "model.multi_modal_projector.linear_1",
    "model.mm_projector.projection.2": "model.multi_modal_projector.linear_2",
    "model.mm_projector.w_gate": "model.multi_modal_projector.gate",
    "model.mm_projector.attn": "model.multi_modal_projector.query_adapter",
    "model.sampler.post_qformer": "model.local_compressor",
    "model.embed_tokens": "model.language_model.embed_tokens",
    "model.layers": "model.language_model.layers",
    "model.norm": "model.language_model.norm",
}
IN_ADAPTERS = {
    "attn.out_proj": "out_proj",
    "ln_q": "query_norm",
    "ln_kv": "context_norm",
    "ln_post": "output_norm",
    "query": "queries",
}


def our_names(theirs):
    """Return the names of the parameters that hold one of the original's."""
    prefix = next((name for name in RENAMED if theirs == name or theirs.startswith(f"{name}.")), "")
    name = RENAMED.get(prefix, "") + theirs.removeprefix(prefix)
    if prefix in ("model.mm_projector.attn", "model.sampler.post_qformer"):
        head, short = RENAMED[prefix], theirs.removeprefix(f"{prefix}.")
        if short.startswith("attn.in_proj_"):
            return [f"{head}.{letter}_proj.{short.removeprefix('attn.in_proj_')}" for letter in "qkv"]
        old = next(old for old in IN_ADAPTERS if short.startswith(old))
        name = f"{head}.{IN_ADAPTERS[old]}{short.removeprefix(old)}"
    return [name]


def check_gradients(model, norms):
    """Compare the norms of gradients with the original's."""
    parameters = dict(model.named_parameters())
    for theirs, norm in norms.items():
        found = [parameters[name].grad for name in our_names(theirs)]
        assert math.hypot(*(float(gradient.norm()) for gradient in found)) == pytest.approx(norm, rel=1e-3), theirs


def batch_inputs(golden, images, padding_side="right"):
    """Make a batch with all placeholders of the original's ids and labels; `images` has a case with one, or None."""
    rows, grids, views = [], [], []
    masks = golden.get("attention_mask", torch.ones_like(golden["labels"]))
    for ids, labels, mask, image in zip(golden["input_ids"], golden["labels"], masks, images, strict=True):
        lengths = []
        if image is not None:
            columns, lines = image["grid_wh"]
            grids.append([lines, columns])
            views.append(normalized_views(image["folder"] / image["views"]))
            lengths = [num_placeholders(lines, columns)]
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        place = ids.index(REFERENCE_IMAGE_ID) if lengths else 0
        whole = expand(ids, lengths, VOCAB_SIZE)
        labels = labels[:place] + [-100] * sum(lengths) + labels[place + len(lengths) :]
        rows.append((torch.tensor(whole), torch.tensor(labels), torch.ones(len(whole), dtype=torch.long)))

    def padded(index, value):
        values = [row[index] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=value, padding_side=padding_side
        )

    return {
        "input_ids": padded(0, 0),
        "labels": padded(1, -100),
        "attention_mask": padded(2, 0),
        "pixel_values": torch.cat(views),
        "image_grids": torch.tensor(grids),
    }


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batch_of_training(slime, padding_side):
    case = cases()["batch_train_format"]
    golden = tensors(case)
    inputs = batch_inputs(golden, [name and cases()[name] for name in case["image_cases"]], padding_side)
    outputs = slime(**inputs)
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=1e-4)
    first = num_placeholders(*inputs["image_grids"][0].tolist())
    for index, kept in enumerate(outputs.kept_tokens.split([first, len(outputs.kept_tokens) - first])):
        assert kept[: NUM_GLOBAL + 1].all()
        assert kept[NUM_GLOBAL + 1 :].nonzero().flatten().tolist() == golden[f"selected_indices_{index}"].tolist()

    arguments, _, _ = slime.model.embed(
        {name: inputs[name] for name in slime.image_arguments},
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["labels"],
    )
    prefix = "merged" if padding_side == "right" else "left"
    sums = golden["inputs_embeds_row_sum" if padding_side == "right" else "left_inputs_embeds_row_sum"]
    for row in range(3):
        seen, theirs = arguments["attention_mask"][row].bool(), golden[f"{prefix}_attention_mask"][row].bool()
        assert seen.sum() == theirs.sum() == case["merged_lengths"][row]
        positions = arguments["position_ids"][row][seen]
        assert torch.equal(positions, golden[f"{prefix}_position_ids"][row][theirs])
        assert torch.equal(inputs["labels"][row][seen], golden[f"{prefix}_labels"][row][theirs])
        embeds = arguments["inputs_embeds"][row][seen]
        torch.testing.assert_close(embeds.sum(-1), sums[row][theirs], atol=5e-4, rtol=0)
    logits = [outputs.logits[row][inputs["labels"][row] != -100, :VOCAB_SIZE] for row in range(3)]
    torch.testing.assert_close(torch.cat(logits), golden["logits_at_labels"], atol=5e-4, rtol=0)


def test_training_with_the_noise_of_the_original(golden_model, monkeypatch):
    case = cases()["train_mode_noise"]
    golden, model = tensors(case), golden_model().train()
    noise = {(1, NUM_GLOBAL, 2): golden["gate_noise"][None], (64,): golden["select_noise"]}
    monkeypatch.setattr(torch, "randn_like", lambda values: noise.pop(tuple(values.shape)))
    outputs = model(**batch_inputs(golden, [cases()[case["image_case"]]]))
    assert not noise
    assert outputs.kept_tokens[NUM_GLOBAL + 1 :].nonzero().flatten().tolist() == golden["selected_indices"].tolist()
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=1e-4)
    outputs.loss.backward()
    # Weights of the gate's noise, which it does not use and we do not have.
    assert [name for name, norm in case["grad_norms"].items() if norm is None] == ["model.mm_projector.w_noise"]
    check_gradients(model, {name: norm for name, norm in case["grad_norms"].items() if norm is not None})
    parts = model.model
    for name, gradient in {
        "grad_projection_0_bias": parts.multi_modal_projector.linear_1.bias.grad,
        "grad_sampler_query": parts.local_compressor.queries.grad,
        "grad_w_gate": parts.multi_modal_projector.gate.grad,
    }.items():
        torch.testing.assert_close(gradient, golden[name], atol=1e-6, rtol=1e-3)


STAGES = {"I-a": "slime_stage_1a.yaml", "I-b": "slime_stage_1b.yaml", "II": "slime_stage_2.yaml"}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_what_the_original_trains(golden_model, stage):
    """By the configuration and the names of their recipes."""
    recipe, golden = load_recipe(STAGES[stage]), load_json("more/stages")
    model = golden_model(**recipe.model.config).train()
    freeze_all_but(model, recipe.train)
    check_trained(model, recipe.train)
    expected = golden[stage]
    # The original's positions are constants here; its gate gets no gradient, so it is frozen; its noise has no use.
    idle = {"model.mm_projector.w_gate", "model.mm_projector.w_noise", *expected["no_gradient"]}
    trained = {name for theirs in set(expected["requires_grad"]) - idle for name in our_names(theirs)}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    ids = {name: torch.tensor(golden[name]) for name in ("input_ids", "labels")}
    loss = model(**batch_inputs(ids, [cases()["case0_landscape_640x360"]])).loss
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4)
    loss.backward()
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    check_gradients(model, expected["grad_norm"])


def test_new_weights_are_drawn_as_in_the_original(golden_model, tmp_path):
    """In a new model, and where a file has none: both read the same functions."""
    width, hidden = 128, 64
    torch.manual_seed(0)
    new = SlimeForConditionalGeneration(golden_model().config)
    new.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    drawn = ("multi_modal_projector", "local_compressor")
    save_file(
        {name: value for name, value in weights.items() if not any(part in name for part in drawn)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    for model in (new, SlimeForConditionalGeneration.from_pretrained(tmp_path)):
        projector = model.model.multi_modal_projector
        assert not projector.gate.any()
        for layer, inputs in ((projector.linear_1, width), (projector.linear_2, hidden)):
            check_uniform(layer.weight, inputs**-0.5)
            assert layer.bias.abs().max() <= inputs**-0.5 and layer.bias.any()
        for adapter, side in ((projector.query_adapter, 24), (model.model.local_compressor, 4)):
            assert adapter.queries.std().item() == pytest.approx(0.02, rel=0.1)
            assert torch.equal(adapter.positions, sincos_positions(side, width))
            # Of a matrix of queries, keys and values, with 3 x 128 rows.
            for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj):
                check_uniform(layer.weight, (6 / (width + 3 * width)) ** 0.5)
            check_uniform(adapter.out_proj.weight, width**-0.5)
            for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj, adapter.out_proj):
                assert not layer.bias.any()
            for norm in (adapter.query_norm, adapter.context_norm, adapter.output_norm):
                assert (norm.weight == 1).all() and not norm.bias.any()


def check_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert abs(weight.mean().item()) < 0.05 * bound


def test_the_router_sees_answers_only_if_it_is_told_to():
    inputs = slime_inputs([[6]], padding_side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    answers = inputs["attention_mask"].clone()
    answers[:, -3:] = 0
    kept = {}
    for sees_answers in (True, False):
        model = tiny_slime(router_sees_answers=sees_answers)
        with torch.no_grad():
            kept[sees_answers] = model(**inputs, labels=labels).kept_tokens
            # Without labels, all text is a prompt.
            whole = model(**inputs).kept_tokens
            without = model(**{**inputs, "attention_mask": answers}).kept_tokens
    assert torch.equal(kept[True], whole) and torch.equal(kept[False], without)
    assert not torch.equal(whole, without)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_is_that_of_the_sequence_without_what_is_dropped(padding_side):
    """Also where an answer follows an image at once: its first token is predicted by the last token that is kept."""
    model = tiny_slime(router_top_p=0.3)
    inputs = slime_inputs([[6], [], [2]], padding_side)
    # Nothing predicts BOS, the 1.
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == 1), -100)
    outputs = model(**inputs, labels=labels)
    arguments, _, _ = model.model.embed(
        {name: inputs[name] for name in model.image_arguments},
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )
    assert not outputs.kept_tokens.all()
    losses = []
    for embeds, mask, row in zip(arguments["inputs_embeds"], arguments["attention_mask"], labels, strict=True):
        seen = mask.bool()
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds[seen][None]).last_hidden_state)[0]
        targets = row[seen].masked_fill(row[seen] == model.config.image_token_id, -100)[1:]
        scores = logits[:-1, : model.config.unpadded_vocab_size].log_softmax(-1)
        losses += (-scores[targets != -100].gather(1, targets[targets != -100][:, None])).flatten().tolist()
    assert outputs.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("tile_counts", [[[2], []], [[], []], [[0], []]])
@pytest.mark.parametrize("values", [{"forced_expert": 0}, {"forced_expert": 1}, {"branch": "global"}])
def test_one_of_two_processes_has_a_gradient_for_every_parameter(monkeypatch, values, tile_counts):
    """Whatever the configuration and its images use; the other process would wait for them."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    model, inputs = tiny_slime(**values).train(), slime_inputs(tile_counts, padding_side="right")
    model.model.vision_tower.requires_grad_(False)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name, parameter in trained if parameter.grad is None]
