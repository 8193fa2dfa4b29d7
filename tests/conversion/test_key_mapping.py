import pytest

from mgllava.conversion.parts import CLIP_DROPS, CLIP_TO_MODEL, drop_reason, model_drop_reason, rename
from mgllava.conversion.xtuner.key_mapping import XTUNER_TO_MODEL, XTUNER_TOWERS_TO_MODEL, to_xtuner
from mgllava.conversion.xtuner.open_clip import OPEN_CLIP_DROPS, OPEN_CLIP_TO_MODEL

PAIRS = {
    "llm.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "llm.model.layers.31.self_attn.q_proj.weight": "model.language_model.layers.31.self_attn.q_proj.weight",
    "llm.model.norm.weight": "model.language_model.norm.weight",
    "llm.lm_head.weight": "lm_head.weight",
    "projector.model.0.weight": "model.multi_modal_projector.linear_1.weight",
    "projector.model.2.bias": "model.multi_modal_projector.linear_2.bias",
    "bbox_projector.model.0.bias": "model.box_projector.linear_1.bias",
    "bbox_projector.model.2.weight": "model.box_projector.linear_2.weight",
    "multi_level_linear.3.weight": "model.box_projector.level_projections.3.weight",
    "fuse_module.slow_conv.weight": "model.fusion.high_res_conv.weight",
    "fuse_module.slow_proj.bias": "model.fusion.high_res_proj.bias",
    "fuse_module.fast_conv.weight": "model.fusion.low_res_conv.weight",
    "fuse_module.fast_proj.weight": "model.fusion.low_res_proj.weight",
    "fuse_module.gate.0.weight": "model.fusion.gate.0.weight",
    "fuse_module.gate.2.bias": "model.fusion.gate.2.bias",
}


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.items())
def test_xtuner_names_map_in_both_directions(theirs, ours):
    assert rename(theirs, XTUNER_TO_MODEL) == ours
    assert to_xtuner(ours) == theirs


@pytest.mark.parametrize("rules", [XTUNER_TO_MODEL, XTUNER_TOWERS_TO_MODEL, CLIP_TO_MODEL, OPEN_CLIP_TO_MODEL])
def test_no_name_matches_two_rules(rules):
    prefixes = [prefix for prefix, _ in rules]
    assert all(prefix.endswith(".") for prefix in prefixes)
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]


def test_inverse_rules_match_once():
    replacements = [replacement for _, replacement in XTUNER_TO_MODEL]
    assert not [(a, b) for a in replacements for b in replacements if a != b and a.startswith(b)]


@pytest.mark.parametrize("name", ["llm.visual.weight", "projector.model.1.weight", "projector_2.model.0.weight", "x"])
def test_unknown_names_have_no_rule(name):
    assert rename(name, XTUNER_TO_MODEL) is None


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_names_with_and_without_prefix(prefix):
    assert rename(f"{prefix}encoder.layers.3.mlp.fc1.bias", CLIP_TO_MODEL) == (
        "model.vision_tower.encoder.layers.3.mlp.fc1.bias"
    )
    assert rename(f"{prefix}pre_layrnorm.weight", CLIP_TO_MODEL) == "model.vision_tower.pre_layrnorm.weight"


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.bias", CLIP_DROPS),
        ("visual_projection.weight", CLIP_DROPS),
        ("logit_scale", CLIP_DROPS),
        ("visual.trunk.head.norm.weight", OPEN_CLIP_DROPS),
        ("visual.head.mlp.fc2.weight", OPEN_CLIP_DROPS),
        ("transformer.resblocks.0.attn.in_proj_bias", OPEN_CLIP_DROPS),
        ("positional_embedding", OPEN_CLIP_DROPS),
    ],
)
def test_unused_tensors_are_dropped_with_a_reason(name, rules):
    assert drop_reason(name, rules)


def test_only_the_last_clip_layer_is_dropped():
    assert model_drop_reason("model.vision_tower.encoder.layers.23.mlp.fc1.bias", 23)
    assert model_drop_reason("model.vision_tower.post_layernorm.weight", 23)
    assert model_drop_reason("model.vision_tower.embeddings.position_ids", 23)
    assert model_drop_reason("model.language_model.layers.0.self_attn.rotary_emb.inv_freq", 23)
    for kept in ("22.mlp.fc1.bias", "2.mlp.fc1.bias", "3.mlp.fc1.bias", "24.mlp.fc1.bias"):
        assert model_drop_reason(f"model.vision_tower.encoder.layers.{kept}", 23) is None
