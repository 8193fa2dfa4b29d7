"""What chat, serving and training ask of a processor, with MG-LLaVA's and with that of another family."""

import numpy as np
import PIL.Image
import pytest
import torch

from mgllava.processing.text_chunks_common import build_chat_template
from tests.stand_in_family import StandInImageProcessor, StandInProcessor

PICTURES = [PIL.Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
# Boxes of two images that overlap, lie outside or repeat, and those of a user.
FOUND = {
    "boxes": [[0, 0, 9, 9], [0, 0, 9, 8], [12, 2, 20, 9], [40, 2, 50, 9], [1, 9, 8, 19]],
    "labels": ["cup", "cup", "spoon", "spoon", "cup"],
    "scores": [0.5, 0.9, 0.8, 0.7, 0.6],
}
BOXES = [FOUND, [[3, 3, 9, 9]], []]
# The boxes that are kept, by descending score: they lie in the image and do not overlap with a better one.
CHOSEN = [1, 2, 4]


@pytest.fixture(scope="module", params=["lists", "tensors", "packed"])
def inputs(request, sentencepiece_like):
    processor = sentencepiece_like
    processor.packs_boxes = request.param == "packed"
    options = {} if request.param == "lists" else {"return_tensors": "pt"}
    try:
        return processor(PICTURES, "a <image> b <image> c <image>", boxes=BOXES, **options)
    finally:
        processor.packs_boxes = False


def test_images_are_counted_and_taken(sentencepiece_like, inputs):
    processor = sentencepiece_like
    assert processor.count_images(inputs) == 3
    assert processor.num_image_tokens(inputs) == [4 + 3, 4 + 1, 4 + 1]
    (ids,) = inputs["input_ids"]
    assert sum(processor.num_image_tokens(inputs)) == list(map(int, ids)).count(processor.image_token_id)
    taken = processor.take_images(inputs, 1)
    assert tuple(taken) == processor.image_inputs == ("pixel_values", "boxes", "num_boxes")
    assert taken["pixel_values"].shape == (2, 3, 16, 16) and taken["num_boxes"].tolist() == [1, 1]
    assert processor.take_images(inputs, 0, 1)["num_boxes"].tolist() == [3]
    for first, last in ((3, None), (1, 1)):
        assert processor.take_images(inputs, first, last) == {}


def test_joined_images_are_those_of_one_call(sentencepiece_like, inputs):
    processor = sentencepiece_like
    whole = processor.take_images(inputs, 0)
    one_by_one = [
        processor(picture, boxes=[entry], return_tensors="pt") for picture, entry in zip(PICTURES, BOXES, strict=True)
    ]
    for rows in (one_by_one, [processor.take_images(inputs, i, i + 1) for i in range(3)]):
        joined = processor.join_images([rows[0], {}, *rows[1:]])
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[name], whole[name]) for name in whole)
    assert processor.join_images([{}]) == processor.join_images([]) == {}


def test_text_alone_has_no_images(sentencepiece_like):
    inputs = sentencepiece_like(text="a")
    assert sentencepiece_like.count_images(inputs) == 0 and sentencepiece_like.num_image_tokens(inputs) == []
    assert sentencepiece_like.take_images(inputs, 0) == {}


def test_processed_images_replace_images(sentencepiece_like):
    """A server processes images one by one, and encodes the text when all are processed."""
    processor = sentencepiece_like
    blocks = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is red?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "chat_template": "vicuna"}
    rows = [
        processor(picture, boxes=[entry], return_tensors="pt")
        for picture, entry in zip(PICTURES[:2], BOXES[:2], strict=True)
    ]
    got = processor.apply_chat_template(
        [{"role": "user", "content": blocks}],
        processor_kwargs={"processed_images": processor.join_images(rows)},
        **options,
    )
    for block, picture, entry in zip(blocks[:2], PICTURES[:2], BOXES[:2], strict=True):
        block.update(image=picture, boxes=entry)
    expected = processor.apply_chat_template([{"role": "user", "content": blocks}], **options)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("images", "text", "error"),
    [
        (PICTURES[:1], "<image>", "`processed_images` must be None where `images` are given"),
        (None, "<image> <image>", "got 2 placeholders and 1 images"),
        (None, "a", "got 0 placeholders and 1 images"),
    ],
)
def test_processed_images_must_fit_the_text(sentencepiece_like, images, text, error):
    processed = sentencepiece_like(PICTURES[:1], boxes=[[]], return_tensors="pt")
    with pytest.raises(ValueError, match=error):
        sentencepiece_like(images, text, processed_images=processed)


def test_processed_images_must_be_complete_and_only_image_inputs_are_used(sentencepiece_like):
    processed = sentencepiece_like(PICTURES[:1], "another <image>", boxes=[[]], return_tensors="pt")
    got = sentencepiece_like(text="<image> a", processed_images=processed, return_tensors="pt")
    expected = sentencepiece_like(PICTURES[:1], "<image> a", boxes=[[]], return_tensors="pt")
    assert all(torch.equal(got[name], expected[name]) for name in {*got, *expected})
    del processed["num_boxes"]
    with pytest.raises(ValueError, match="must have pixel_values, boxes, num_boxes, got none of num_boxes"):
        sentencepiece_like(text="<image> a", processed_images=processed)


@pytest.mark.parametrize(
    "options", [{}, {"do_pad": False}, {"box_limit_mode": "per_image", "box_limit": 2}, {"iou_threshold": 0.95}]
)
def test_objects_are_those_that_the_model_gets(sentencepiece_like, options, monkeypatch):
    for name, value in options.items():
        monkeypatch.setattr(sentencepiece_like.image_processor, name, value)
    objects = sentencepiece_like.objects(FOUND, (20, 30))
    given = sentencepiece_like.image_processor(PICTURES[0], boxes=[FOUND], return_box_labels=True)
    assert given["box_labels"] == [objects["labels"]] and given["num_boxes"] == [len(objects["boxes"])]
    rows = [FOUND["boxes"].index(box) for box in objects["boxes"].tolist()]
    if not options:
        assert rows == CHOSEN
    assert objects["labels"] == [FOUND["labels"][row] for row in rows]
    assert objects["scores"].tolist() == pytest.approx([FOUND["scores"][row] for row in rows])
    again = sentencepiece_like.image_processor(PICTURES[0], boxes=[objects["boxes"]])
    assert np.array_equal(again["boxes"][0], given["boxes"][0])


def test_objects_of_a_user_stay_in_their_order(sentencepiece_like):
    objects = sentencepiece_like.objects([[3, 3, 9, 9], [3, 3, 9, 9], [0, 0, 33, 5]], (20, 30))
    assert objects.keys() == {"boxes"} and objects["boxes"].tolist() == [[3, 3, 9, 9], [3, 3, 9, 9], [0, 0, 30, 5]]
    assert len(sentencepiece_like.objects([], (20, 30))["boxes"]) == 0


@pytest.fixture
def stand_in(sentencepiece_like):
    template = build_chat_template(
        system=("", " "),
        user=("USER: ", ""),
        generation_prompt=" ASSISTANT:",
        closed_by_eos=True,
        default_system="Be brief. ",
        image_end="",
    )
    return StandInProcessor(StandInImageProcessor(), sentencepiece_like.tokenizer, chat_template=template)


def test_a_family_without_boxes_has_the_same_interface(stand_in):
    """A wide image has two views of three placeholders each."""
    blocks = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": " What?"}]
    conversation = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "A cup."}]
    assert stand_in.apply_chat_template(conversation) == "<s>Be brief. USER: <image>What? ASSISTANT:A cup.</s>"
    with_system = [{"role": "system", "content": "Hm."}, *conversation[:1]]
    prompt = stand_in.apply_chat_template(with_system, add_generation_prompt=True)
    assert prompt == "<s>Hm. USER: <image>What? ASSISTANT:"
    inputs = stand_in.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    assert inputs["image_grids"].tolist() == [[1, 2]] and inputs["pixel_values"].shape == (2, 3, 4, 4)
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
    assert (ids == stand_in.image_token_id).sum() == 2 * 3
    assert stand_in.decode(ids[mask.bool()]) == "A cup.</s>"
    measured, learned = stand_in.encode_text(conversation)
    assert len(measured) == len(ids) - 5 and sum(learned) == mask.sum()
    assert not hasattr(stand_in, "box_detector")


def test_labels_of_another_family_leave_out_its_placeholders(stand_in):
    inputs = stand_in([PICTURES[0]], ["<s>Be brief. USER: <image>What? ASSISTANT:A cup.</s>"], return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].clone()
    assert stand_in.decode(inputs["labels"][inputs["labels"] >= 0]) == "A cup.</s>"
