"""Vision towers against the libraries that they come from."""

import json

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mgllava.modeling import MGLlavaHighResVisionConfig, MGLlavaHighResVisionModel
from tests.golden_cases import GOLDEN
from tests.tiny import tiny_model


def test_high_res_tower_equals_open_clip_trunk():
    folder = GOLDEN / "convnext"
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    kwargs = config["vision_cfg"]["timm_model_kwargs"]
    trunk = open_clip.timm_model.TimmModel("convnext_large", embed_dim=0, proj="", pool="").trunk
    trunk = type(trunk)(depths=kwargs["depths"], dims=kwargs["dims"], num_classes=0)
    prefix = "visual.trunk."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    trunk.load_state_dict(weights, strict=False)  # ours has no head

    tower = MGLlavaHighResVisionModel(
        MGLlavaHighResVisionConfig(depths=kwargs["depths"], hidden_sizes=kwargs["dims"], image_size=256)
    )
    tower.load_state_dict({k: v for k, v in weights.items() if k.startswith(("stem.", "stages."))}, strict=True)
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trunk.eval().forward_intermediates(pixels, intermediates_only=True)
        feature_maps = tower.eval()(pixels).feature_maps
    for level, reference in zip(feature_maps, expected, strict=True):
        assert torch.equal(level, reference)


@pytest.mark.parametrize("name", ["convnext_base_w_320", "convnext_large_d_320", "convnext_xxlarge_320"])
def test_high_res_tower_has_the_parameters_of_the_published_trunks(name):
    vision = open_clip.get_model_config(name)["vision_cfg"]
    with torch.device("meta"):
        trunk = open_clip.timm_model.TimmModel(vision["timm_model_name"], embed_dim=8, proj="", pool="avg").trunk
        depths = [len(stage.blocks) for stage in trunk.stages]
        widths = [info["num_chs"] for info in trunk.feature_info]
        tower = MGLlavaHighResVisionModel(
            MGLlavaHighResVisionConfig(
                architecture=vision["timm_model_name"], depths=depths, hidden_sizes=widths, image_size=768
            )
        )
    expected = {k: v.shape for k, v in trunk.state_dict().items() if k.startswith(("stem.", "stages."))}
    assert {k: v.shape for k, v in tower.state_dict().items()} == expected
    norms = [module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [
        module.eps for module in [*trunk.stem.modules(), *trunk.stages.modules()] if isinstance(module, nn.LayerNorm)
    ]


def test_vision_tower_is_the_layer_before_the_last_of_transformers_clip():
    model = tiny_model()
    shortened = model.config.vision_config
    full = CLIPVisionModel(CLIPVisionConfig(**{**shortened.to_dict(), "num_hidden_layers": 3})).eval()
    missing, unexpected = full.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("encoder.layers.2.", "post_layernorm.")) for key in missing)

    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = full(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, expected)


def test_unused_clip_parameters_are_not_stored():
    keys = tiny_model().state_dict().keys()
    assert not any("post_layernorm" in key for key in keys)
    assert not any("vision_tower.encoder.layers.2." in key for key in keys)
