"""`generate` without the tokens that the router drops gives what a user sees with them."""

import pytest
import torch
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList

from mgllava.modeling.pretrained_common import CACHE_NAME
from tests.tiny import one_slime_prompt, slime_inputs, tiny_slime

COUNTS = [[2], [], [1, 3, 0]]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_slime().double()


def answers(model, inputs, **kwargs):
    return model.generate(**inputs, **{**OPTIONS, **kwargs})[:, inputs["input_ids"].shape[1] :]


def by_position(model, inputs, *args):
    """Generate, with the ids and these arguments by position."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return model.generate(inputs["input_ids"], *args, **rest, **OPTIONS)[:, inputs["input_ids"].shape[1] :]


def test_padding_without_a_mask_is_padding(model):
    inputs = slime_inputs(COUNTS)
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(answers(model, unmasked), answers(model, inputs))
    # As with text alone, padding that also ends answers may be text.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"pad_token_id": 0, "eos_token_id": 0}
    assert torch.equal(answers(model, unmasked, **options), answers(model, inputs, **options))


@pytest.mark.parametrize("options", [{"num_hidden_layers": 1}, {"hidden_size": 16}, {}])
def test_a_slime_assists_a_slime(model, options):
    inputs = slime_inputs([[4]])
    assistant = tiny_slime(text_config=options, seed=1).double() if options else model
    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, assistant_model=assistant), expected)
    limit = {"max_new_tokens": None, "max_length": inputs["input_ids"].shape[1] + 6}
    assert torch.equal(answers(model, inputs, assistant_model=assistant, **limit), expected)


def test_rules_see_whole_prompts_however_they_are_passed(model):
    inputs = slime_inputs([[4]])
    seen = []

    def never(ids, scores, **_):
        seen.append(ids[:, : inputs["input_ids"].shape[1]])
        return torch.zeros(len(ids), dtype=torch.bool)

    def seven(_, ids):
        seen.append(ids[None, : inputs["input_ids"].shape[1]])
        return [7]

    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, stopping_criteria=[never]), expected)
    assert torch.equal(by_position(model, inputs, None, None, StoppingCriteriaList([never])), expected)
    assert by_position(model, inputs, None, None, None, seven).tolist() == [[7] * 6]
    assert len(seen) == 18 and all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


def test_rules_of_transformers_replace_those_that_it_makes(model):
    inputs = slime_inputs([[4]])
    limit = MaxLengthCriteria(inputs["input_ids"].shape[1] + 30)
    output = model.generate(**inputs, do_sample=False, eos_token_id=None, stopping_criteria=[limit])
    assert output.shape[1] == limit.max_length  # instead of the 20 tokens that `generate` allows by default


def test_a_streamer_gets_the_whole_prompt(model):
    class Collector:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    inputs, collector = slime_inputs([[4]]), Collector()
    output = model.generate(**inputs, **OPTIONS, streamer=collector)
    assert collector.ids == [*output[0].tolist(), "end"]


@pytest.mark.parametrize("length", ["cut", "masked"])
def test_positions_are_checked_and_counted_again(model, length):
    inputs = slime_inputs([[4]])
    width = inputs["input_ids"].shape[1]
    options = {"cut": {}, "masked": {"max_new_tokens": None, "max_length": width + 6}}[length]
    plain = torch.arange(width)[None]
    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, position_ids=plain, **options), expected)
    with pytest.raises(ValueError, match="`position_ids` must count the tokens of one prompt per row"):
        answers(model, inputs, position_ids=plain.flip(-1), **options)


def test_ids_given_twice_are_refused_as_without_images(model):
    inputs = slime_inputs([[4]])
    with pytest.raises(ValueError, match="passed alongside"):
        model.generate(inputs["input_ids"].clone(), **inputs, **OPTIONS)


def test_grids_without_pixels_are_refused(model):
    inputs = {**slime_inputs([[]]), "image_grids": torch.tensor([[1, 4]])}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="`pixel_values` must be given with `image_grids`"):
            call(**inputs)


@torch.no_grad()
def test_a_loop_with_the_cache_of_forward_does_not_see_dropped_tokens(model):
    inputs = slime_inputs(COUNTS)
    for given, has_mask in ((inputs, True), (one_slime_prompt(inputs, COUNTS, 2), False)):
        output, mask, found = model(**given, use_cache=True), given["attention_mask"], []
        for _ in range(6):
            scores = output.logits[:, -1].index_fill(-1, torch.tensor(model.config.unused_token_ids), -torch.inf)
            found.append(scores.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(found[-1])], dim=1)
            options = {"attention_mask": mask} if has_mask else {}
            output = model(found[-1], **options, **{CACHE_NAME: output[CACHE_NAME]})
        assert torch.equal(torch.cat(found, dim=1), answers(model, given))
        with pytest.raises(ValueError, match="`attention_mask` must have shape"):
            model(found[-1], attention_mask=torch.ones(1, 3), **{CACHE_NAME: output[CACHE_NAME]})


def test_a_cache_of_another_prompt_is_refused(model):
    inputs = slime_inputs([[4]])
    output = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    cache = output[CACHE_NAME]
    ids = torch.cat([output.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for images in ({}, {name: inputs[name] for name in model.image_arguments}):
        with pytest.raises(ValueError, match="must be empty for images, or in `generate` hold nothing but"):
            model.generate(**longer, **images, **OPTIONS, **{CACHE_NAME: cache})
    later = {**longer, "input_ids": ids[:, -4:]}
    with pytest.raises(ValueError, match="must have one column for each of the"):
        model.generate(**later, **OPTIONS, **{CACHE_NAME: cache})
    # An empty cache of the caller holds no earlier prompt.
    assert torch.equal(answers(model, inputs, **{CACHE_NAME: DynamicCache()}), answers(model, inputs))


def test_labels_that_are_shifted_already_give_the_same_loss(model):
    """As trainers pass them that split sequences; here a caption comes right behind its image."""
    inputs = slime_inputs([[4], [1]])
    is_text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != model.config.image_token_id)
    labels = inputs["input_ids"].masked_fill(~is_text, -100)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)
