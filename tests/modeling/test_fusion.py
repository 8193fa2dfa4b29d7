"""Fusion variants: the original's numbers if they exist, else the properties that define a variant."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mgllava import MGLlavaForConditionalGeneration
from mgllava.modeling.vision_mgllava import FUSIONS
from tests.golden_cases import load_tensors
from tests.tiny import tiny_config, tiny_model

RENAMED = {"slow": "high_res", "fast": "low_res"}
GOLDEN_VARIANTS = {"conv_gate": 0, "conv_gate_concat": 1, "channel_concat": 2, "plain_channel_concat": 3}


# Configuration of the golden fusion modules: 64 low and 48 high channels on an 8x8 grid.
GOLDEN_SIZES = {
    "vision_config": SimpleNamespace(hidden_size=64),
    "high_res_vision_config": SimpleNamespace(hidden_sizes=(48,)),
    "token_grid_size": 8,
}


@pytest.mark.parametrize("fusion_type", GOLDEN_VARIANTS)
def test_fusion_equals_golden(fusion_type):
    tensors = load_tensors("ablations/fuse_variants")
    name = f"fuse{GOLDEN_VARIANTS[fusion_type]}"
    state = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}.state."):
            key = key.removeprefix(f"{name}.state.")
            for old, new in RENAMED.items():
                key = key.replace(old, new)
            state[key] = value
    fusion = FUSIONS[fusion_type](SimpleNamespace(fusion_type=fusion_type, **GOLDEN_SIZES))
    fusion.load_state_dict(state, strict=True)
    with torch.no_grad():
        output = fusion(tensors["low"], (tensors["high"],))
    assert output.shape[-1] == fusion.output_size
    torch.testing.assert_close(output, tensors[f"{name}.out"], rtol=0, atol=5e-5)


def fusion_and_inputs(model):
    """Return the fusion of a model, low-resolution tokens, and maps of the high-resolution tower."""
    generator, config = torch.Generator().manual_seed(0), model.config
    widths, side = config.high_res_vision_config.hidden_sizes, config.high_res_vision_config.image_size
    maps = tuple(
        torch.randn(2, width, side // stride, side // stride, generator=generator)
        for width, stride in zip(widths, (4, 8, 16, 32), strict=True)
    )
    tokens = torch.randn(2, config.image_seq_length, config.vision_config.hidden_size, generator=generator)
    return model.model.fusion, tokens, maps


@pytest.mark.parametrize("fusion_type", ["conv_gate", "resampler", "none"])
def test_fusion_starts_as_the_identity(fusion_type):
    fusion, tokens, maps = fusion_and_inputs(MGLlavaForConditionalGeneration(tiny_config(fusion_type=fusion_type)))
    assert torch.equal(fusion(tokens, maps), tokens)


def test_patch_info_mining_equals_attention_cell_by_cell():
    fusion, tokens, maps = fusion_and_inputs(tiny_model(fusion_type="patch_info_mining"))
    pyramid = torch.cat([F.interpolate(m, size=24, mode="bilinear", align_corners=False) for m in maps], dim=1)
    output = fusion(tokens, maps)
    for row in range(3):
        for column in range(3):
            cell = pyramid[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].flatten(1).T
            token = tokens[0, row * 3 + column]
            scores = fusion.key(cell) @ fusion.query(token) / math.sqrt(len(token))
            expected = token + scores.softmax(0) @ fusion.value(cell)
            torch.testing.assert_close(output[0, row * 3 + column], expected, rtol=0, atol=1e-4)


def test_patch_info_mining_never_mixes_cells():
    fusion, tokens, maps = fusion_and_inputs(tiny_model(fusion_type="patch_info_mining"))
    changed = (maps[0].clone(), *maps[1:])
    changed[0][:, :, 8:16, 16:24] += 1.0  # row 1, column 2
    difference = (fusion(tokens, changed) - fusion(tokens, maps)).abs().amax((0, 2))
    assert difference[5] > 1e-3
    assert difference[[0, 1, 2, 3, 4, 6, 7, 8]].max() == 0


def test_resampler_depends_on_positions():
    fusion, tokens, maps = fusion_and_inputs(tiny_model(fusion_type="resampler"))
    output = fusion(tokens, maps)
    assert output.shape == tokens.shape
    moved = (*maps[:-1], maps[-1].flip(-1))
    assert (fusion(tokens, moved) - output).abs().max() > 1e-3


def test_low_resolution_baseline_has_no_second_tower():
    model = tiny_model(fusion_type="none", object_merging="none")
    assert model.model.high_res_vision_tower is None
    assert not any("high_res" in key or "box" in key for key in model.state_dict())
