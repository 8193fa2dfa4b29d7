"""A family that inherits the common base classes and hides every second placeholder from the language model."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from mgllava.modeling.language_model_common import (
    ImageTextCausalLMOutputWithPast,
    ImageTextForConditionalGeneration,
    ImageTextModel,
    ImageTextModelOutputWithPast,
)
from mgllava.modeling.pretrained_common import CACHE_NAME, ImageTextConfig, either_cache
from tests.tiny import IMAGE_TOKEN_ID, tiny_config


@dataclass
class DroppingOutput(ImageTextModelOutputWithPast):
    kept_tokens: torch.BoolTensor | None = None


@dataclass
class DroppingCausalLMOutput(ImageTextCausalLMOutputWithPast):
    kept_tokens: torch.BoolTensor | None = None


class DroppingConfig(ImageTextConfig):
    model_type = "dropping"


class DroppingModel(ImageTextModel):
    config_class = DroppingConfig
    output_class = DroppingOutput

    def __init__(self, config, language_model=None):
        super().__init__(config)
        self.projector = torch.nn.Linear(3, config.text_config.hidden_size)
        self.seen_labels = []
        self.add_language_model(language_model)

    def vision_modules(self):
        return [self.projector]

    def get_image_features(self, pixel_values, return_dict=True):
        return BaseModelOutputWithPooling(pooler_output=list(self.projector(pixel_values)))

    def placeholders_to_drop(self, image_outputs, inputs_embeds, is_placeholder, attention_mask, labels):
        self.seen_labels.append(labels)
        return is_placeholder & (is_placeholder.cumsum(-1) % 2 == 0)

    @can_return_tuple
    def forward(self, input_ids=None, pixel_values=None, mm_encoder_outputs=None, labels=None, **kwargs):
        given = {name: kwargs.pop(name, None) for name in ("inputs_embeds", "attention_mask", "position_ids")}
        given["cache"] = either_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        arguments = {"input_ids": input_ids, "mm_encoder_outputs": mm_encoder_outputs, "labels": labels, **given}
        return self.embed_and_run({"pixel_values": pixel_values}, arguments, **kwargs)


class DroppingForConditionalGeneration(ImageTextForConditionalGeneration):
    config_class = DroppingConfig
    body_class = DroppingModel
    output_class = DroppingCausalLMOutput

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        pixel_values=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        names = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        cache = either_cache(past_key_values, cache)
        arguments = {**names, "inputs_embeds": inputs_embeds, "labels": labels, CACHE_NAME: cache}
        images = {"pixel_values": pixel_values, "mm_encoder_outputs": mm_encoder_outputs, "labels": labels}
        return self._score(images, arguments, logits_to_keep, **kwargs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = tiny_config()
    config = DroppingConfig(
        text_config=base.text_config, vision_config=base.vision_config, image_token_id=IMAGE_TOKEN_ID
    )
    return DroppingForConditionalGeneration(config).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4, 7, 8, 9], [0, 0, 1, *[IMAGE_TOKEN_ID] * 4, 5]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 4, 3)}


def without_dropped(model, inputs, row):
    """Embeddings of a prompt from which padding and dropped placeholders are cut out."""
    ids = inputs["input_ids"][row]
    embeds = model.get_input_embeddings()(ids)
    is_image = ids == IMAGE_TOKEN_ID
    embeds = embeds.masked_scatter(is_image[:, None], model.model.projector(inputs["pixel_values"][row]))
    keep = (ids != 0) & ~(is_image & (is_image.cumsum(0) % 2 == 0))
    return embeds[keep].unsqueeze(0)


@torch.no_grad()
def test_dropped_placeholders_are_as_if_they_were_not_there(model, inputs):
    logits = model(**inputs).logits
    for row in range(2):
        hidden = model.model.language_model(inputs_embeds=without_dropped(model, inputs, row)).last_hidden_state
        torch.testing.assert_close(logits[row, -1], model.lm_head(hidden[0, -1]), atol=1e-4, rtol=1e-4)


def test_labels_reach_the_choice_of_placeholders(model, inputs):
    labels = inputs["input_ids"].clone()
    model.model.seen_labels.clear()
    assert model(**inputs, labels=labels).loss.isfinite()
    assert model.model.seen_labels[0] is labels


@torch.no_grad()
def test_every_step_of_generation_goes_without_dropped_placeholders(model, inputs):
    model.model.seen_labels.clear()
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    assert len(model.model.seen_labels) == 1, "chosen once"
    for row in range(2):
        embeds = without_dropped(model, inputs, row)
        for token in answers[row]:
            hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
            scores = model.lm_head(hidden[0, -1])
            scores[model.config.unused_token_ids] = -torch.inf
            assert token == scores.argmax()
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5},
        {"max_length": 13},
        {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2},
        {"max_new_tokens": 5, "cache_implementation": "static"},
        {"max_new_tokens": 5, "prefill_chunk_size": 3},
    ],
)
def test_whole_prompts_come_back_whatever_the_options(model, inputs, options):
    if "prefill_chunk_size" in options and CACHE_NAME != "cache":
        pytest.skip("chunked prefill of images works from transformers 5.24 on")
    options = {"do_sample": False, "eos_token_id": None, **options}
    output = model.generate(**inputs, **options, return_dict_in_generate=True).sequences
    expected = inputs["input_ids"].repeat_interleave(len(output) // 2, dim=0)
    assert torch.equal(output[:, :8], expected) and output.shape[1] == 13
    for row in range(2):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        rows = slice(row * len(output) // 2, (row + 1) * len(output) // 2)
        assert torch.equal(model.generate(**alone, **options), output[rows])


@torch.no_grad()
def test_rules_of_the_caller_see_whole_prompts(model, inputs):
    seen = []

    class Rule(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[:, :8])
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    output = model.generate(**inputs, logits_processor=[Rule()], stopping_criteria=[Stop()], max_new_tokens=5)
    assert output.shape[1] == 10
    assert all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


@torch.no_grad()
def test_packed_prompts_and_a_cache_of_the_beginning_are_refused(model, inputs):
    one = {"input_ids": inputs["input_ids"][:1], "pixel_values": inputs["pixel_values"][:1]}
    with pytest.raises(ValueError, match="packed prompts"):
        model(**one, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="without a cache"):
        model(**one, attention_mask=torch.ones(1, 12, dtype=torch.long))


@torch.no_grad()
def test_images_of_which_nothing_was_dropped_yet_are_kept_as_they_were(model, inputs):
    features = model.model.get_image_features(inputs.pop("pixel_values"))
    before = [tokens.clone() for tokens in features.pooler_output]
    model.generate(**inputs, mm_encoder_outputs={"image": features}, num_beams=2, max_new_tokens=2)
    assert all(map(torch.equal, features.pooler_output, before))
