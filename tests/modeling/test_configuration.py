"""Configuration: derived values, wrong values, saving and loading."""

import pytest
from transformers import AutoConfig

from mgllava import MGLlavaConfig
from tests.tiny import tiny_config


def test_default_is_the_published_model_with_vicuna_7b():
    config = MGLlavaConfig()
    assert config.image_seq_length == 576
    assert config.vision_config.num_hidden_layers == 23
    assert sum(config.high_res_vision_config.hidden_sizes) == 2880
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("llama", 4096)


@pytest.mark.parametrize("llm", ["llama", "phi3", "qwen2", "qwen3", "mistral"])
def test_save_and_load_keep_every_value(tmp_path, llm):
    config = tiny_config(llm, fusion_type="resampler", box_feature_type="multi_level", object_merging="fused_to_box")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MGLlavaConfig
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded.to_dict().get("_name_or_path")}


def test_dictionaries_of_the_caller_are_not_changed():
    text, vision = {"hidden_size": 32, "vocab_size": 32064}, {"image_size": 336, "patch_size": 14}
    MGLlavaConfig(text_config=text, vision_config=vision)
    assert text == {"hidden_size": 32, "vocab_size": 32064}
    assert vision == {"image_size": 336, "patch_size": 14}


def test_unused_token_ids_are_placeholder_and_padding():
    assert tiny_config().unused_token_ids == list(range(100, 128))
    # A placeholder inside the original vocabulary (Phi-3 has spare rows) is unused, its neighbors are not.
    assert tiny_config(image_token_id=90, unpadded_vocab_size=128).unused_token_ids == [90]
    assert tiny_config(image_token_id=90, unpadded_vocab_size=None).unused_token_ids == [90]


@pytest.mark.parametrize(
    ("object_merging", "tokens"), [("concat", 1), ("box_to_fused", 1), ("fused_to_box", 0), ("none", 0)]
)
def test_tokens_per_box_follow_the_merging(object_merging, tokens):
    assert tiny_config(object_merging=object_merging).num_tokens_per_box == tokens


def test_tied_text_config_ties_the_model():
    assert tiny_config(text_config={"tie_word_embeddings": True}).tie_word_embeddings


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"fusion_type": "average"}, "fusion_type"),
        (None, {"image_token_id": 128}, "`image_token_id` must be a row of the embedding table, 0 to 127"),
        (None, {"unpadded_vocab_size": 129}, "`unpadded_vocab_size` must be between 1 and"),
        (
            "high_res_vision_config",
            {"architecture": "local-dir:/etc"},
            "`architecture` must be the name of a ConvNeXt",
        ),
        ("high_res_vision_config", {"depths": [1, 1, 1]}, "one entry for each of the 4 ConvNeXt stages"),
        ("high_res_vision_config", {"hidden_sizes": [8] * 5}, "one entry for each of the 4 ConvNeXt stages"),
        ("high_res_vision_config", {"image_size": 80}, "`image_size` must be a multiple of 32"),
        ("high_res_vision_config", {"image_size": 128}, "3x3 tokens, `high_res_vision_config` a last stage of 4x4"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "must be a CLIP vision configuration"),
    ],
)
def test_wrong_values_are_refused(part, changes, message):
    config = tiny_config().to_dict()
    (config[part] if part else config).update(changes)
    with pytest.raises(Exception, match=message):
        MGLlavaConfig(**config)
