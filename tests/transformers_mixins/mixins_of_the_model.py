"""`VLMModelTest` of transformers (`ModelTesterMixin`, `GenerationTesterMixin`) on our models."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, MGLlavaModel
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN_ID, NUM_FUSED_TOKENS, VOCAB_SIZE, random_boxes, tiny_config
from tests.transformers_mixins.source import mixins, skip

NUM_BOXES = 2


class MGLlavaModelTester:
    """Provide a small configuration and inputs, with one image with two boxes per prompt."""

    config_class = MGLlavaConfig
    base_model_class = MGLlavaModel
    conditional_generation_class = MGLlavaForConditionalGeneration
    all_model_classes = (MGLlavaModel, MGLlavaForConditionalGeneration)
    pipeline_model_mapping = {"image-text-to-text": MGLlavaForConditionalGeneration}
    is_training = True
    batch_size = 3
    seq_length = NUM_FUSED_TOKENS + NUM_BOXES + 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = VOCAB_SIZE
    image_token_id = IMAGE_TOKEN_ID

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        # The mixins expect initial weights of the usual size.
        return tiny_config(text_config={"initializer_range": 0.02})

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, 90, (self.batch_size, self.seq_length))
        input_ids[:, 1 : 1 + NUM_FUSED_TOKENS + NUM_BOXES] = IMAGE_TOKEN_ID
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
            "boxes": random_boxes(self.batch_size, NUM_BOXES),
            "num_boxes": torch.full((self.batch_size,), NUM_BOXES),
        }


# From these tables, the mixins know which classes have a loss and take labels.
modeling_auto.MODEL_MAPPING_NAMES["mgllava"] = "MGLlavaModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mgllava"] = "MGLlavaForConditionalGeneration"


@skip(
    {
        "test_mismatching_num_image_tokens": "it removes images without their boxes; test_modeling.py checks the same",
        "test_can_init_all_missing_weights": "transformers skips CLIP's rules inside models of other packages",
        "test_pipeline*": "it needs small models from the Hub",
    }
)
class MGLlavaModelTest(mixins("vlm_tester").VLMModelTest, unittest.TestCase):
    model_tester_class = MGLlavaModelTester

    def _logits_scored_by_loss(self, model, logits):
        # The rows after them are not vocabulary.
        return logits[..., : model.config.unpadded_vocab_size]
