"""RAM++ as a model of transformers: sizes, dtypes, devices, quantization, new tags, errors."""

import re

import pytest
import timm
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from huggingface_hub.errors import StrictDataclassError
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from mgllava import RamPlusConfig, RamPlusForImageTagging
from mgllava.modeling.modeling_ram_plus import RamPlusLayerNorm
from tests.ram_plus.golden import NUM_DESCRIPTIONS, NUM_TAGS, arrays, original_state

TINY = {
    "image_size": 64,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 4, 8],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_descriptions": 3,
    "projection_dim": 24,
    "num_labels": 5,
}


def pixels():
    return torch.stack([arrays(f"ram_img{index}")["pixel_values"] for index in range(3)])


def logits(model):
    with torch.no_grad():
        return model(pixels()).logits


def test_released_model_has_the_parameters_of_the_original():
    with torch.device("meta"):
        model = RamPlusForImageTagging(RamPlusConfig())
        backbone = timm.create_model("swin_large_patch4_window12_384", num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 329_493_046
    assert model.decoder.label_embed.shape == (4585, 51, 512)
    shapes = {name: value.shape for name, value in model.vision_tower.state_dict().items()}
    assert shapes == {name: value.shape for name, value in backbone.state_dict().items()}


def test_backbone_equals_timm_with_the_original_weights(tagger):
    prefix = "visual_encoder."
    state = {name.removeprefix(prefix): v for name, v in original_state().items() if name.startswith(prefix)}
    backbone = SwinTransformer(
        img_size=128, num_classes=0, embed_dim=12, depths=(2,) * 4, num_heads=(2, 4, 8, 16), window_size=4
    )
    backbone.load_state_dict(checkpoint_filter_fn(state, backbone), strict=True)
    with torch.no_grad():
        features = backbone.eval().forward_features(pixels()).flatten(1, 2)
        tokens = tagger(pixels(), output_hidden_states=True).vision_tokens
    assert torch.equal(tokens[:, 1:], features)
    assert torch.equal(tokens[:, 0], features.mean(1))


def test_eager_attention_equals_sdpa(load):
    eager = load(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(load()), rtol=0, atol=5e-5)


@pytest.mark.parametrize("tag_chunk_size", [1, 7])
def test_chunks_change_nothing(load, tag_chunk_size):
    whole, chunked = load(), load(tag_chunk_size=tag_chunk_size)
    with torch.no_grad():
        expected, actual = (model(pixels(), output_hidden_states=True) for model in (whole, chunked))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(actual.tag_embeds, expected.tag_embeds, rtol=0, atol=1e-6)
    assert [state.shape for state in actual.hidden_states] == [state.shape for state in expected.hidden_states]


def test_optional_outputs_are_left_out_by_default(tagger):
    with torch.no_grad():
        outputs = tagger(pixels())
        as_tuple = tagger(pixels(), return_dict=False)
    assert list(outputs) == ["logits", "image_embeds"]
    assert torch.equal(as_tuple[0], outputs.logits)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.08), (torch.float16, 0.012)])
def test_half_precision_is_close_and_gives_float32_logits(load, dtype, limit):
    model = load(dtype=dtype)
    assert model.decoder.label_embed.dtype == dtype
    with torch.no_grad():
        outputs = model(pixels(), output_hidden_states=True)
    assert outputs.logits.dtype == outputs.description_weights.dtype == torch.float32
    assert outputs.image_embeds.dtype == dtype
    assert (outputs.logits - logits(load())).abs().mean() < limit  # logits are about 1


def test_weights_and_logits_are_float32_under_autocast(tagger):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = tagger(pixels(), output_hidden_states=True)
    assert outputs.logits.dtype == outputs.tag_embeds.dtype == torch.float32
    torch.testing.assert_close(outputs.description_weights.sum(-1), torch.ones(3, NUM_TAGS), rtol=0, atol=1e-6)


def test_layer_norm_keeps_its_epsilon_in_float16():
    norm = RamPlusLayerNorm(8, eps=1e-12).half()
    flat = torch.full((1, 8), 3.0, dtype=torch.half)
    assert torch.equal(norm(flat), torch.zeros_like(flat))


def reads_narrow_layers():
    """Tell whether 4-bit layers with 48 inputs work: bitsandbytes 0.50 mixes up their scales with AVX-512."""
    weight = torch.linspace(-1, 1, 64 * 48).reshape(64, 48)
    return (dequantize_4bit(*quantize_4bit(weight)) - weight).abs().max() < 0.3


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(load, bits, monkeypatch):
    # Layers as small as these cannot be packed for processors with AVX512-BF16, unlike those of the released model.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    model = load(quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert not plain
    assert model.decoder.label_embed.is_floating_point() and model.classifier.weight.is_floating_point()
    if bits == 4 and not reads_narrow_layers():
        pytest.skip("bitsandbytes mixes up the scales of layers as narrow as these on this processor")
    difference = (logits(model).float() - logits(load())).abs().mean()
    assert difference < (1.5 if bits == 4 else 0.3)


def test_offloading_changes_nothing(load, tmp_path):
    device_map = {"vision_tower": "cpu", "image_projection": "disk", "decoder": "disk", "classifier": "cpu"}
    model = load(device_map=device_map, offload_folder=tmp_path)
    assert model.decoder.label_embed.device.type == "meta"
    assert torch.equal(logits(model), logits(load()))


def test_initial_weights():
    model = RamPlusForImageTagging(RamPlusConfig(**TINY))
    torch.testing.assert_close(model.decoder.reweight_scale.item(), 2.6593, rtol=0, atol=1e-4)
    assert 0.5 < model.decoder.label_embed.norm(dim=-1).mean() < 1.5
    table = model.vision_tower.layers[0].blocks[0].attn.relative_position_bias_table
    assert 0.01 < table.std() < 0.04


def test_missing_weights_are_initialized_and_buffers_restored():
    config = RamPlusConfig(**TINY)
    model = RamPlusForImageTagging.from_pretrained(None, config=config, state_dict={})
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in model.parameters())
    fresh = dict(RamPlusForImageTagging(config).named_buffers())
    assert fresh
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, fresh[name]), name


def test_gradients_reach_all_but_the_descriptions(load):
    model = load().train()
    model(pixels()).logits.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"decoder.label_embed"}
    untrained = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert untrained == without


def test_tags_of_the_width_of_the_descriptions_are_not_projected():
    model = RamPlusForImageTagging(RamPlusConfig(**{**TINY, "projection_dim": 16})).eval()
    assert not any("word_projection" in name for name in model.state_dict())
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 5)


@pytest.mark.parametrize("as_rows", [False, True])
def test_set_tags_to_some_of_the_old_tags(load, tmp_path, as_rows):
    chosen = [17, 2, 11]
    reference = load()
    names = [reference.config.id2label[index] for index in chosen]
    embeds = original_state()["label_embed"].unflatten(0, (NUM_TAGS, NUM_DESCRIPTIONS))[chosen]
    model = load()
    model.config.suppressed_tags = [19]
    model.set_tags(names, embeds.flatten(0, 1) if as_rows else embeds, thresholds=[0.7, 0.7, 0.66])
    expected = logits(reference)[:, chosen]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=5e-5)

    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=5e-5)
    assert reloaded.config.id2label == dict(enumerate(names)) and reloaded.config.label2id[names[2]] == 2
    assert reloaded.config.thresholds == [0.7, 0.7, 0.66]
    with torch.no_grad():
        found = reloaded.post_process_image_tagging(reloaded(pixels()))
    above = expected.sigmoid() > torch.tensor([0.7, 0.7, 0.66])
    assert [image["indices"] for image in found] == [row.nonzero().flatten().tolist() for row in above]


def test_new_tags_with_another_number_of_descriptions(tagger):
    tagger.set_tags(["cat", "dog"], torch.randn(2, 1, 512))
    assert tagger.config.thresholds == [0.68, 0.68] and tagger.config.num_descriptions == 1
    assert logits(tagger).shape == (3, 2)
    tagger.set_tags(["cat", "dog"], torch.randn(10, 512), thresholds=0.4)
    assert tagger.config.thresholds == [0.4, 0.4] and tagger.config.num_descriptions == 5


@pytest.mark.parametrize(
    ("tags", "shape", "thresholds", "said"),
    [
        (["a", "b"], (3, 512), None, r"for the 2 tags, got \(3, 512\)"),
        (["a", "b"], (2, 2, 511), None, r"got \(2, 2, 511\)"),
        (["a", "b"], (4, 1, 512), None, r"got \(4, 1, 512\)"),
        (["a", "b"], (512,), None, r"got \(512,\)"),
        ([], (2, 512), None, "for the 0 tags"),
        (["a", "b"], (2, 512), [0.1], "each of the 2 tags, got 1"),
    ],
)
def test_tags_that_do_not_match_are_refused(tagger, tags, shape, thresholds, said):
    with pytest.raises(ValueError, match=said):
        tagger.set_tags(tags, torch.zeros(shape), thresholds)
    assert tagger.config.num_labels == NUM_TAGS


def test_images_of_another_size_are_refused(tagger):
    with pytest.raises(ValueError, match=r"\(batch_size, 3, 128, 128\), got \(1, 3, 96, 128\)"):
        tagger(torch.zeros(1, 3, 96, 128))


def test_outputs_for_other_tags_are_refused(tagger):
    with torch.no_grad():
        outputs = tagger(pixels())
    tagger.set_tags(["cat"], torch.randn(1, 512))
    with pytest.raises(ValueError, match=r"must have shape \(batch_size, 1\), got \(3, 20\)"):
        tagger.post_process_image_tagging(outputs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"thresholds": [0.5]}, "each of the 5 tags, got 1"),
        ({"suppressed_tags": [5]}, r"0 to 4, got \[5\]"),
        ({"id2label": {0: "a", 2: "b"}}, "without gaps"),
        ({"image_size": 100}, "multiple of 32"),
        ({"num_heads": [3, 2, 4, 8]}, "3 heads for the 8 channels of stage 0"),
        ({"depths": [2, 2]}, "4 Swin stages"),
        ({"num_attention_heads": 3}, "3 heads for 16 channels"),
        ({"tag_chunk_size": 0}, "at least 1"),
    ],
)
def test_wrong_configurations_are_refused(changes, said):
    settings = {**TINY, **changes}
    if "id2label" in changes:
        del settings["num_labels"]
    with pytest.raises((ValueError, StrictDataclassError)) as raised:
        RamPlusConfig(**settings)
    assert re.search(said, str(raised.value.__cause__ or raised.value))
