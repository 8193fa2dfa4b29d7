"""A tiny family without boxes: an image has one or two views, and its embeddings depend on all text of the prompt."""

import numpy as np
import torch
from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM
from transformers.image_processing_utils import BaseImageProcessor

from mgllava.families import Family
from mgllava.processing.image_text_processor_common import ImageTextProcessor
from mgllava.processing.images_common import fetch_upright

TOKENS_PER_VIEW, SIDE = 3, 4

FAMILY = Family(
    title="Stand-in",
    config="tests.stand_in_family:StandInConfig",
    model="tests.stand_in_family:StandInModel",
    auto_classes=("AutoModel", "AutoModelForImageTextToText"),
    image_processors={"torchvision": "tests.stand_in_family:StandInImageProcessor"},
    processor="tests.stand_in_family:StandInProcessor",
    images_depend_on_text=True,
)


class StandInConfig(LlamaConfig):
    model_type = "stand_in"
    image_token_id = 0


class StandInModel(LlamaForCausalLM):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.projector = torch.nn.Linear(3 * SIDE * SIDE, config.hidden_size)
        self.num_views = []  # number of views of each prompt

    def generate(self, input_ids, pixel_values=None, image_grids=None, **kwargs):
        """Encode images before the prefill, since their embeddings depend on text that may be in the cache."""
        if pixel_values is not None:
            self.num_views.append(len(pixel_values))
            assert int(image_grids.prod(1).sum()) == len(pixel_values)
            text = input_ids[input_ids != self.config.image_token_id].float().std() / 100
            views = self.projector(pixel_values.flatten(1)) * text
            kwargs["image_embeds"] = views.repeat_interleave(TOKENS_PER_VIEW, 0)
        return super().generate(input_ids, **kwargs)

    def forward(self, input_ids=None, image_embeds=None, **kwargs):
        embeds = self.model.embed_tokens(input_ids)
        is_image = input_ids == self.config.image_token_id
        if is_image.any():
            embeds = embeds.masked_scatter(is_image[..., None], image_embeds)
        return super().forward(inputs_embeds=embeds, **kwargs)


class StandInImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values", "image_grids"]

    def fetch_images(self, images):
        return fetch_upright(images)

    def __call__(self, images, return_tensors=None, **kwargs):
        """Make one view of an image, or two of a wide image."""
        views, grids = [], []
        for image in fetch_upright(images):
            columns = 1 + (image.width > image.height)
            pixels = np.asarray(image.resize((columns * SIDE, SIDE)), dtype=np.float32).transpose(2, 0, 1) / 255
            views += np.split(pixels, columns, axis=2)
            grids.append([1, columns])
        return BatchFeature({"pixel_values": views, "image_grids": grids}, return_tensors)


class StandInProcessor(ImageTextProcessor):
    image_inputs = ("pixel_values", "image_grids")

    def _num_views(self, inputs):
        return [rows * columns for rows, columns in torch.as_tensor(np.asarray(inputs["image_grids"])).tolist()]

    def num_image_tokens(self, inputs):
        return [TOKENS_PER_VIEW * number for number in self._num_views(inputs)] if "image_grids" in inputs else []

    def count_images(self, inputs):
        return len(inputs.get("image_grids", ()))

    def take_images(self, inputs, first, last=None):
        if not self.count_images(inputs):
            return {}
        numbers = self._num_views(inputs)
        views = slice(sum(numbers[:first]), None if last is None else sum(numbers[:last]))
        taken = {"pixel_values": inputs["pixel_values"][views], "image_grids": inputs["image_grids"][first:last]}
        return taken if len(taken["image_grids"]) else {}


def make_model(tokenizer, image_token_id):
    torch.manual_seed(0)
    config = StandInConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.image_token_id = image_token_id
    model = StandInModel(config).eval()
    model.generation_config.update(
        do_sample=False, repetition_penalty=1.5, max_new_tokens=10, suppress_tokens=[image_token_id]
    )
    return model
