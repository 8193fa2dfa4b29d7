"""Small models of all families that read images and text, for what all of them must do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from mgllava import MGLlavaForConditionalGeneration, MGLlavaModel, SlimeForConditionalGeneration, SlimeModel
from tests.tiny import one_prompt, one_slime_prompt, slime_inputs, tiny_inputs, tiny_model, tiny_slime


class Tiny(NamedTuple):
    """How tests make a small model of a family and its inputs; images have boxes or tiles of the given numbers."""

    model: Callable[..., Any]
    inputs: Callable[..., dict]
    one_prompt: Callable[..., dict]
    model_class: type
    body_class: type


FAMILIES = {
    "mgllava": Tiny(tiny_model, tiny_inputs, one_prompt, MGLlavaForConditionalGeneration, MGLlavaModel),
    "slime": Tiny(tiny_slime, slime_inputs, one_slime_prompt, SlimeForConditionalGeneration, SlimeModel),
}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def any_model(family):
    """A model of each family."""
    return family.model()


def comparable_positions(model, inputs):
    """Positions whose logits differ by rounding alone: in another dtype a router may keep other tokens of images."""
    is_text = inputs["attention_mask"].bool()
    drops = model.model.placeholders_to_drop is not None
    return is_text & (inputs["input_ids"] != model.config.image_token_id) if drops else is_text
