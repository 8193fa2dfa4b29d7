"""Every stage against the original with the golden checkpoint; the limits are those of the golden README."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from mgllava import RamPlusConfig, RamPlusForImageTagging
from tests.ram_plus.golden import NUM_DESCRIPTIONS, NUM_TAGS, arrays, expected, image_path

PIXELS, TOKENS, WEIGHTS, DECODER = 1e-6, 1e-4, 1e-5, 2e-4


def assert_near(actual, golden, limit):
    torch.testing.assert_close(actual, golden, rtol=0, atol=limit)


def run(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values, output_hidden_states=True)


@pytest.mark.parametrize("index", range(5))
def test_every_stage(tagger, repository, index):
    golden, answer = arrays(f"ram_img{index}"), expected()["single"][index]
    image_processor = AutoImageProcessor.from_pretrained(repository, backend="pil")
    pixel_values = image_processor(image_path(index), return_tensors="pt")["pixel_values"]
    assert_near(pixel_values[0], golden["pixel_values"], PIXELS)

    outputs = run(tagger, pixel_values)
    assert_near(outputs.vision_tokens[0], golden["swin_tokens"], TOKENS)
    assert_near(outputs.image_embeds[0], golden["image_embeds"], TOKENS)
    assert_near(outputs.description_weights[0], golden["reweight_weights"], WEIGHTS)
    assert_near(outputs.tag_embeds[0], golden["label_embed_reweighted"], WEIGHTS)
    assert_near(outputs.hidden_states[0][0], golden["label_embed_projected"].relu(), DECODER)
    assert_near(outputs.hidden_states[1][0], golden["decoder_layer0"], DECODER)
    assert_near(outputs.hidden_states[2][0], golden["decoder_layer1"], DECODER)
    assert_near(outputs.logits[0], golden["logits"], DECODER)

    (found,) = tagger.post_process_image_tagging(outputs)
    assert found["indices"] == answer["tag_indices"]
    assert " | ".join(found["labels"]) == answer["tag_string"]
    assert_near(torch.tensor(found["scores"]), golden["probs"][found["indices"]], DECODER)


def test_every_stage_of_the_backbone(tagger):
    golden, merged = arrays("ram_img0"), []
    for layer in tagger.vision_tower.layers[1:]:
        # Patch merging belongs to the stage before it in the original, and to the stage after it in timm.
        layer.downsample.register_forward_hook(lambda module, inputs, output: merged.append(output))
    stages = run(tagger, golden["pixel_values"][None]).vision_hidden_states
    names = ("swin_patch_embed", "swin_stage0", "swin_stage1", "swin_stage2", "swin_stage3")
    for name, states in zip(names, [stages[0], *merged, stages[-1]], strict=True):
        assert_near(states[0].flatten(0, 1), golden[name], TOKENS)


def test_batch(tagger):
    golden = arrays("ram_batch3")
    pixel_values = torch.stack([arrays(f"ram_img{index}")["pixel_values"] for index in range(3)])
    outputs = run(tagger, pixel_values)
    assert_near(outputs.vision_tokens, golden["swin_tokens"], TOKENS)
    assert_near(outputs.image_embeds, golden["image_embeds"], TOKENS)
    assert_near(outputs.description_weights, golden["reweight_weights"], WEIGHTS)
    assert_near(outputs.logits, golden["logits"], DECODER)
    found = tagger.post_process_image_tagging(outputs)
    assert [" | ".join(image["labels"]) for image in found] == expected()["batch3"]["tag_strings"]


def test_suppressed_tags_are_off_and_stay_off(load, tmp_path):
    golden = expected()["delete_tag_index"]
    pixel_values = arrays(f"ram_img{golden['image']}")["pixel_values"][None]
    load(suppressed_tags=golden["index"]).save_pretrained(tmp_path)
    tagger = RamPlusForImageTagging.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = tagger(pixel_values)
    assert outputs.logits.shape == (1, NUM_TAGS)
    assert " | ".join(tagger.post_process_image_tagging(outputs)[0]["labels"]) == golden["tag_string"]
    # They are not reported with an explicit threshold either.
    assert set(golden["index"]).isdisjoint(tagger.post_process_image_tagging(outputs, threshold=0)[0]["indices"])


def test_no_tag_gives_empty_lists(load):
    pixel_values = arrays("ram_img0")["pixel_values"][None]
    nothing = [{"labels": [], "scores": [], "indices": []}]
    tagger = load()
    with torch.no_grad():
        outputs = tagger(pixel_values)
    assert tagger.post_process_image_tagging(outputs, threshold=1) == nothing
    assert load(thresholds=[1] * NUM_TAGS).post_process_image_tagging(outputs) == nothing


def test_a_probability_equal_to_its_threshold_is_not_above_it(tagger):
    outputs = type(run(tagger, arrays("ram_img0")["pixel_values"][None]))(logits=torch.zeros(1, NUM_TAGS))
    assert tagger.post_process_image_tagging(outputs, threshold=0.5)[0]["indices"] == []
    assert len(tagger.post_process_image_tagging(outputs, threshold=0.4999)[0]["indices"]) == NUM_TAGS


def test_configuration_of_the_repository(repository):
    config = AutoConfig.from_pretrained(repository)
    assert type(config) is RamPlusConfig
    assert config.num_labels == NUM_TAGS and config.num_descriptions == NUM_DESCRIPTIONS
    assert config.id2label[4] == "Esk Ferry" and config.label2id["Esk Ferry"] == 4
    assert config.thresholds[2:5] == [0.7, 1.0, 0.76]
    assert json.loads((repository / "config.json").read_text())["architectures"] == ["RamPlusForImageTagging"]


def test_image_classification_pipeline_gives_probabilities(repository):
    model = AutoModelForImageClassification.from_pretrained(repository)
    image_processor = AutoImageProcessor.from_pretrained(repository, backend="pil")
    tag = pipeline("image-classification", model=model, image_processor=image_processor)
    best = tag(str(image_path(2)), top_k=3)
    order = arrays("ram_img2")["probs"].sort(descending=True)
    assert [entry["label"] for entry in best] == [model.config.id2label[index] for index in order.indices[:3].tolist()]
    assert_near(torch.tensor([entry["score"] for entry in best]), order.values[:3], DECODER)
