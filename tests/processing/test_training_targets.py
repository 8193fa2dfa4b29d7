"""Boxes in rendered conversations, and corrections of labels that a collator sets in the processor's output."""

import numpy as np
import pytest
import torch
from PIL import Image

from mgllava.processing import CHAT_TEMPLATES
from tests.tiny import tiny_model
from tests.training.conftest import tiny_processor, words_model

BOXES = [[5, 10, 40, 30], [0, 0, 90, 60]]
DETECTED = {"boxes": [[5, 10, 40, 30]], "labels": ["a <image> of"], "scores": [0.9]}
PICTURE = Image.new("RGB", (90, 60), "red")
TENSORS = {"padding": True, "return_tensors": "pt"}


@pytest.fixture(scope="module", params=CHAT_TEMPLATES)
def processor(request):
    return tiny_processor(request.param)


def conversation(*entries, answer="A red circle.", text="What is in the image?"):
    blocks = [{"type": "image", "image": PICTURE, "boxes": boxes} for boxes in entries]
    question = {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}
    return [question, *([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])]


def tokenized(processor, conversations, **options):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, processor_kwargs=TENSORS, **options
    )


@pytest.mark.parametrize("entries", [[BOXES], [BOXES, []], [DETECTED, np.array(BOXES)], [torch.tensor(BOXES[:1])]])
def test_boxes_survive_in_a_rendered_conversation(processor, entries):
    """Alone and in a batch with a conversation of another number of images."""
    messages = conversation(*entries, answer=None)
    options = {"add_generation_prompt": True}
    for given in (messages, [messages, conversation(BOXES[:1], answer=None), conversation(answer=None)]):
        text = processor.apply_chat_template(given, tokenize=False, **options)
        images = [PICTURE] * (len(entries) + (0 if given is messages else 1))
        inputs, wanted = processor(images, text, **TENSORS), tokenized(processor, given, **options)
        for name in ("boxes", "num_boxes", "input_ids"):
            assert torch.equal(inputs[name], wanted[name]), name


def test_boxes_of_image_blocks_may_be_repeated_as_an_argument_but_not_changed(processor):
    text = processor.apply_chat_template(conversation(BOXES, answer=None), tokenize=False)
    assert processor(PICTURE, text, boxes=[BOXES], **TENSORS)["num_boxes"].tolist() == [2]
    with pytest.raises(ValueError, match="those of the image blocks"):
        processor(PICTURE, text, boxes=[BOXES[:1]], **TENSORS)


def test_boxes_in_image_blocks_need_a_block_for_each_image(processor):
    with pytest.raises(ValueError, match="got 1 image blocks and 2 placeholders"):
        processor.apply_chat_template(conversation(BOXES, text="<image> What?"), tokenize=False)


def test_users_cannot_write_boxes_into_text(processor):
    honest = processor.apply_chat_template(conversation(BOXES, text="What?"), tokenize=False)
    written = honest[honest.index("<image>") + len("<image>") :].split("\n")[0]
    assert written
    text = processor.apply_chat_template(conversation(text=f"<image>{written}\nWhat?"), tokenize=False)
    assert processor(PICTURE, text, boxes=[[]], **TENSORS)["num_boxes"].tolist() == [1]


def test_copied_labels_become_those_of_the_answers(processor):
    conversations = [conversation(BOXES), conversation(answer="Red. " * 5)]
    wanted = tokenized(processor, conversations, return_assistant_tokens_mask=True)
    batch = tokenized(processor, conversations)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(batch["labels"] != -100, wanted["assistant_masks"].bool())
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_a_copy_learns_the_completion_without_the_prompt(processor):
    """As TRL's collator joins them with `completion_only_loss=False`."""
    whole = processor.apply_chat_template(conversation(BOXES), tokenize=False)
    prompt = processor.apply_chat_template(
        conversation(BOXES, answer=None), tokenize=False, add_generation_prompt=True
    )
    batch = processor([PICTURE], [prompt], add_special_tokens=False, **TENSORS)
    completion = processor(text=[whole[len(prompt) :]], add_special_tokens=False, **TENSORS)
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.cat([batch[name], completion[name]], dim=1)
    batch["labels"] = batch["input_ids"].clone()
    wanted = tokenized(processor, [conversation(BOXES)], return_assistant_tokens_mask=True)
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["labels"] != -100, wanted["assistant_masks"].bool())


def test_chosen_labels_stay(processor):
    batch = tokenized(processor, [conversation(BOXES)])
    chosen = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    chosen[:, 0] = -100
    batch["labels"] = chosen
    assert torch.equal(batch["labels"], chosen)


def test_placeholders_of_any_text_are_not_learned(processor):
    batch = processor(PICTURE, "<image>\nOnce upon a time", boxes=[BOXES], **TENSORS)
    batch["labels"] = batch["input_ids"].clone()
    is_image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(batch["labels"] == -100, is_image)


def test_training_needs_boxes(processor):
    for boxes in (None, [None]):
        batch = processor(PICTURE, "<image>\nWhat is it?", boxes=boxes, **TENSORS)
        with pytest.raises(ValueError, match=r"none for the image\(s\) \[0\]"):
            batch["labels"] = batch["input_ids"].clone()
    batch = processor(PICTURE, "<image>\nWhat is it?", boxes=[[]], **TENSORS)
    batch["labels"] = batch["input_ids"].clone()


def test_packed_boxes_are_boxes():
    processor, model = tiny_processor(), words_model()
    conversations = [conversation(BOXES, BOXES[:1], answer=None), conversation([], answer=None)]
    given = tokenized(processor, conversations, add_generation_prompt=True)
    processor.packs_boxes = True
    packed = tokenized(processor, conversations, add_generation_prompt=True)
    assert packed.keys() == {"input_ids", "attention_mask", "pixel_values", "image_position_ids"}
    model = model.train()
    assert torch.equal(model(**packed).logits, model(**given).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.eval().generate(**packed, **options), model.generate(**given, **options))
    for name in ("boxes", "num_boxes"):
        with pytest.raises(ValueError, match="either `boxes` and `num_boxes`, or `image_position_ids`"):
            model(**packed, **{name: given[name]})
    for wrong in (packed["image_position_ids"][0], packed["image_position_ids"][..., :3]):
        with pytest.raises(ValueError, match=r"`image_position_ids` must have shape \(num_images, max_boxes, 4\)"):
            model(**{**packed, "image_position_ids": wrong})


def test_images_without_boxes_are_refused():
    model = tiny_model().train()
    inputs = {"input_ids": torch.full((1, 10), model.config.image_token_id)}
    inputs["pixel_values"] = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ValueError, match="packs_boxes"):
        model(**inputs)
