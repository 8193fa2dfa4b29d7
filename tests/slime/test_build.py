"""A new SliME from parts, as a training starts from it."""

import pytest
import torch

from mgllava.conversion.build import build_slime
from mgllava.modeling.adapters_slime import sincos_positions
from mgllava.processing import SLIME_CHAT_TEMPLATES
from tests.slime.golden import GOLDEN

PARTS = {"llm": GOLDEN / "more" / "lora" / "base", "vision_tower": GOLDEN / "checkpoint" / "vision_tower"}


def test_new_modules_start_as_in_the_original():
    """Gate at zero, queries of deviation 0.02, packed Xavier bounds, torch's own linear layers."""
    torch.manual_seed(0)
    model, processor = build_slime(**PARTS, prompt_template="v1", dtype=torch.float32, num_local_queries=16)
    assert model.config.separator_token_id == 15 and processor.num_local_tokens == 16
    body = model.model
    assert not body.multi_modal_projector.gate.any()
    for adapter, size in ((body.multi_modal_projector.query_adapter, 24), (body.local_compressor, 4)):
        assert torch.equal(adapter.positions, sincos_positions(size, 128))
        assert adapter.queries.std().item() == pytest.approx(0.02, rel=0.1)
        packed = torch.nn.MultiheadAttention(128, 1).in_proj_weight
        bound = packed.abs().max().item()
        for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj):
            assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01) and not layer.bias.any()
        assert not adapter.out_proj.bias.any() and adapter.query_norm.weight.eq(1).all()
    for layer in (body.multi_modal_projector.linear_1, body.multi_modal_projector.linear_2):
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert bound / 2 < layer.bias.abs().max().item() <= bound


def test_unknown_argument_is_named():
    with pytest.raises(TypeError, match="is not built with 'fusion_type'"):
        build_slime(**PARTS, prompt_template="v1", dtype="auto", fusion_type="none")


def test_values_of_the_configuration_are_taken():
    values = {"separator_token_id": 7, "num_local_queries": 4, "local_order": "flat", "router_top_p": 0.5}
    values |= {"router_temperature": 0.25, "router_sees_answers": False, "branch": "local", "forced_expert": 1}
    options = {**PARTS, "prompt_template": "llama3", "dtype": torch.bfloat16}
    model, processor = build_slime(**options, **values, attn_implementation="eager")
    assert {name: getattr(model.config, name) for name in values} == values
    assert model.config.text_config._attn_implementation == "eager" and not model.training
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert processor.chat_template == SLIME_CHAT_TEMPLATES["llama3"] and processor.num_separators == 1
    assert model.generation_config.suppress_tokens == model.config.unused_token_ids
