import copy
import logging

import pytest
import torch
from PIL import Image

from mgllava.training import MGLlavaDataCollator, SampleError
from mgllava.training.samples import to_conversation
from tests.golden_cases import GOLDEN, IMAGE_ID, case, cases, load_tensors
from tests.tiny import NUM_FUSED_TOKENS

IMAGE = Image.new("RGB", (90, 60), "red")
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup."}]

# The conversations behind the ids of the golden batch cases.
GOLDEN_TURNS = {
    "landscape.png": [
        ("<image>\nWhat is shown in this picture? Answer the question.", "A red circle and a blue square.")
    ],
    "portrait.png": [
        ("Where is the <image> clock?", "It is on the wall above the window."),
        ("How many dogs are there?", "There are two dogs and one cat in the image."),
    ],
    "": [("What color is the umbrella?", "The umbrella is yellow and white.")],
}


def sample(**changes):
    return {"id": "7", "image": IMAGE, "conversations": TURNS, "boxes": [[5, 10, 40, 30]], **changes}


def golden_sample(number, golden):
    turns = [
        {"from": role, "value": text}
        for pair in GOLDEN_TURNS[golden["image"]]
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    if not golden["image"]:
        return {"id": str(number), "conversations": turns}
    of_image = [other for other in cases("image") if other["image"].endswith("/" + golden["image"])]
    record = next(other for other in of_image if other["boxes"] == golden["boxes"])
    boxes = {"boxes": record["raw_boxes"], "labels": record["raw_labels"], "scores": record["raw_scores"]}
    image = str(GOLDEN / "images" / golden["image"])
    return {"id": str(number), "image": image, "conversations": turns, "boxes": boxes}


@pytest.mark.parametrize("name", ["batch_two_masked", "batch_two_asis", "batch_with_text_only"])
def test_batches_equal_golden(model, processor, name):
    """Boxes, labels, masks, positions and loss of whole batches, from images and raw boxes on."""
    golden, tensors = case(name), load_tensors(f"cases/{name}")
    batch = MGLlavaDataCollator(processor)([golden_sample(*entry) for entry in enumerate(golden["samples"])])
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(golden["loss"], abs=1e-4)

    rows, length = batch["labels"].shape
    mask = batch["attention_mask"].bool()
    # The original adds an empty row for a text-only sample, and (two cases) takes padding for text.
    assert torch.equal(batch["labels"], tensors["merged_labels"][:rows, :length])
    assert torch.equal(batch["position_ids"][mask], tensors["merged_position_ids"][:rows, :length][mask])
    if name == "batch_two_masked":
        assert torch.equal(mask, tensors["merged_attention_mask"].bool())
        assert torch.equal(batch["position_ids"], tensors["merged_position_ids"])
    for row, row_mask, golden_row in zip(batch["input_ids"], mask, golden["samples"], strict=True):
        text = [token for token in row[row_mask].tolist() if token != IMAGE_ID]
        assert text == [token for token in golden_row["input_ids"] if token != -200]
    kept = [
        row.tolist()
        for of_image, count in zip(batch["boxes"], batch["num_boxes"], strict=True)
        for row in of_image[:count]
    ]
    assert kept == [box for golden_row in golden["samples"] if golden_row["image"] for box in golden_row["boxes"]]


def test_text_is_cut_where_the_image_counts_as_one_token(small_processor):
    answer = " ".join(["A red circle and a blue square."] * 20)
    turns = [TURNS[0], {"from": "gpt", "value": answer}]
    whole = MGLlavaDataCollator(small_processor)([sample(conversations=turns)])
    cut = MGLlavaDataCollator(small_processor, max_text_length=60)([sample(conversations=turns)])
    image_tokens = NUM_FUSED_TOKENS + 1
    assert cut["input_ids"].shape[1] == 60 - 1 + image_tokens
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, : 59 + image_tokens])
    assert torch.equal(cut["labels"], whole["labels"][:, : 59 + image_tokens])
    # Of several boxes with a label, one is left.
    boxes = {"boxes": [[x, 0, x + 8, 8] for x in range(0, 60, 10)], "labels": ["a", "b"] * 3, "scores": [0.5] * 6}
    cut = MGLlavaDataCollator(small_processor, max_text_length=60)([sample(conversations=turns, boxes=boxes)])
    assert cut["input_ids"].shape[1] == 60 - 1 + NUM_FUSED_TOKENS + 2


@pytest.mark.parametrize(
    ("given", "said", "advice"),
    [
        (sample(), rf"\({NUM_FUSED_TOKENS + 1} of them of images\)", "Use fewer images"),
        (
            {"id": "7", "conversations": [{"from": "human", "value": "Hm?"}, TURNS[1]]},
            ", but",
            "Use a shorter text",
        ),
    ],
)
def test_a_sample_longer_than_the_model_is_refused_with_advice(small_processor, given, said, advice):
    with pytest.raises(SampleError, match=rf"Sample 7 has \d+ tokens.*{said}.*the model has 5 positions.*{advice}"):
        MGLlavaDataCollator(small_processor, max_length=5)([given])


@pytest.mark.parametrize(
    ("key", "content"), [("conversations", TURNS), ("messages", [{"role": "user", "content": "a"}])]
)
def test_a_sample_without_an_id_is_named_by_its_first_turn(small_processor, key, content):
    bare = {"id": None, "image": IMAGE, key: content[:1]}
    with pytest.raises(SampleError) as caught:
        MGLlavaDataCollator(small_processor)([bare])
    assert str(caught.value).startswith(f"Sample without an id ({content[0]}) ")


SOURCES = ("url", "path", "base64", "bytes")


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in ("image", "video") for key in (kind, f"{kind}_url", *SOURCES)]
    + [("image_url", "image_url"), ("video_url", "video_url")],
)
def test_a_block_with_its_own_source_needs_none_of_the_sample(kind, key):
    """These are the keys of transformers' chat templates."""
    block = {"type": kind, key: "a"}
    answer = {"role": "assistant", "content": "A cup."}
    messages = [{"role": "user", "content": [block, {"type": "text", "text": "What?"}]}, answer]
    (question, _) = to_conversation({"id": "7", "messages": messages}, "empty", "<video>")
    assert question["content"][0] == {**block, "boxes": []}
    if kind in ("image", "video"):
        del block[key]
        with pytest.raises(SampleError, match=rf"got 1 <{kind}> and 0 {kind}s"):
            to_conversation({"id": "7", "messages": messages}, "empty", "<video>")


@pytest.mark.parametrize(("limit_over_text", "boxes_left"), [(51, 6), (50, 2), (0, 2)])
def test_a_text_near_its_limit_keeps_one_box_for_each_label(small_processor, limit_over_text, boxes_left):
    """From `max_text_length - 50` tokens on, as the original."""
    far_apart = [[x, 0, x + 8, 8] for x in range(0, 60, 10)]
    boxes = {"boxes": far_apart, "labels": ["a", "b"] * 3, "scores": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]}
    text_length = MGLlavaDataCollator(small_processor)([sample()])["input_ids"].shape[1] - NUM_FUSED_TOKENS
    collator = MGLlavaDataCollator(small_processor, max_text_length=text_length + limit_over_text)
    batch = collator([sample(boxes=boxes)])
    assert batch["num_boxes"].tolist() == [boxes_left]
    assert (batch["input_ids"] == IMAGE_ID).sum() == NUM_FUSED_TOKENS + boxes_left


def test_an_image_after_the_cut_is_left_out(small_processor):
    later = [
        {"from": "human", "value": "Say red."},
        {"from": "gpt", "value": "It is red. " * 20},
        {"from": "human", "value": "<image> What is it?"},
        {"from": "gpt", "value": "A cup."},
    ]
    collator = MGLlavaDataCollator(small_processor, max_text_length=40)
    assert "pixel_values" not in collator([sample(conversations=later)])
    both = collator([sample(conversations=later), sample()])
    assert len(both["pixel_values"]) == len(both["boxes"]) == len(both["num_boxes"]) == 1


def test_turns_are_read_as_the_original_reads_them(small_processor):
    """An answer in front and a question at the end are dropped, questions in a row are one."""
    untidy = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "What "},
        {"from": "human", "value": "is it? <image>"},
        {"from": "gpt", "value": "A cup."},
        {"from": "human", "value": "And this?"},
    ]
    collator = MGLlavaDataCollator(small_processor)
    a, b = collator([sample(conversations=untidy)]), collator([sample()])
    assert torch.equal(a["input_ids"], b["input_ids"])
    assert torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("nothing", [None, "", []])
def test_samples_may_have_keys_without_images_and_videos(small_processor, nothing):
    text = {"id": "1", "conversations": [{"from": "human", "value": "Say red."}, TURNS[1]]}
    collator = MGLlavaDataCollator(small_processor)
    expected = collator([text])
    for key in ("image", "images", "video", "videos"):
        found = collator([{**text, key: nothing}])
        assert found.keys() == expected.keys() and torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(collator([sample(images=None)])["input_ids"], collator([sample()])["input_ids"])


def test_two_answers_in_a_row_get_an_empty_question(small_processor):
    first, second = ({"from": "gpt", "value": text} for text in ("A cup.", "It is red."))
    collator = MGLlavaDataCollator(small_processor)
    a = collator([sample(conversations=[TURNS[0], first, second])])
    b = collator([sample(conversations=[TURNS[0], first, {"from": "human", "value": ""}, second])])
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])


def test_the_system_text_comes_first_and_is_not_learned(small_processor):
    system = {"from": "system", "value": "Answer with one word."}
    collator = MGLlavaDataCollator(small_processor)
    a = collator([sample(conversations=[system, *TURNS])])
    messages = [{"role": "system", "content": "Answer with one word."}]
    messages += [
        {"role": role, "content": turn["value"]} for role, turn in zip(("user", "assistant"), TURNS, strict=True)
    ]
    b = collator([sample(conversations=None, messages=messages)])
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
    plain = collator([sample()])
    assert a["labels"].ge(0).sum() == plain["labels"].ge(0).sum() and a["labels"].shape[1] > plain["labels"].shape[1]
    # A question is needed for an answer, whatever the system says.
    with pytest.raises(SampleError, match="no answer to learn"):
        collator([sample(conversations=[system, TURNS[1]])])


def test_messages_of_trl_are_read_like_conversations(small_processor):
    collator = MGLlavaDataCollator(small_processor)
    # Arrow fills in keys that only other blocks have.
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
    ]
    a = collator([{"messages": messages, "images": [IMAGE], "boxes": [[[5, 10, 40, 30]]]}])
    b = collator([sample()])
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_samples_of_all_kinds_share_a_batch(small_processor):
    two_images = sample(
        image=[IMAGE, IMAGE],
        boxes=[[[5, 10, 40, 30]], []],
        conversations=[{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "Both."}],
    )
    text_only = {
        "id": "1",
        "conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "Red."}],
    }
    batch = MGLlavaDataCollator(small_processor, pad_to_multiple_of=16)([two_images, text_only, sample()])
    assert batch["num_boxes"].tolist() == [1, 1, 1]  # one without objects has the empty box
    assert batch["boxes"][1, 0].tolist() == [0, 0, 0, 0]
    assert batch["input_ids"].shape[1] % 16 == 0
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [2 * NUM_FUSED_TOKENS + 2, 0, NUM_FUSED_TOKENS + 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    tokenizer = copy.deepcopy(small_processor.tokenizer)
    padded = copy.copy(small_processor)
    padded.tokenizer = tokenizer
    for pad, token in ((tokenizer.unk_token, tokenizer.unk_token_id), (None, tokenizer.eos_token_id)):
        tokenizer.pad_token = pad
        batch = MGLlavaDataCollator(padded)([text_only, sample()])
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {token}


TWO, THREE = ([{"from": "human", "value": "<image>" * number + "Which?"}, TURNS[1]] for number in (2, 3))
IMAGE_URL = [{"type": "image_url", "image_url": IMAGE}, {"type": "text", "text": "What is it?"}]
BAD = {
    "url_without_boxes": (
        {
            "image": None,
            "conversations": None,
            "boxes": None,
            "messages": [{"role": "user", "content": IMAGE_URL}, {"role": "assistant", "content": "A cup."}],
        },
        "an image without boxes",
    ),
    "no_file": ({"image": "/nowhere/cup.jpg"}, "/nowhere/cup.jpg"),
    "no_boxes": ({"boxes": None}, "without boxes"),
    "no_answer": ({"conversations": TURNS[:1]}, "no answer"),
    "no_placeholder": ({"conversations": [{"from": "human", "value": "Hm?"}, TURNS[1]]}, "got 0 <image> and 1 images"),
    "no_image": ({"image": None, "boxes": None}, "got 1 <image> and 0 images"),
    "boxes_without_image": (
        {"image": None, "conversations": [{"from": "human", "value": "Hm?"}, TURNS[1]]},
        "0 images",
    ),
    "too_few_images": ({"image": [IMAGE] * 2, "boxes": None, "conversations": THREE}, "got 3 <image> and 2 images"),
    "one_record_for_two": ({"image": [IMAGE] * 2, "conversations": TWO}, "got 1 entries for 2 images"),
    "wrong_turn": ({"conversations": [{"from": "robot", "value": "Hm?"}]}, "from"),
    "wrong_role": ({"conversations": None, "messages": [{"role": "robot", "content": "Hm?"}]}, "`role` and `content`"),
    "no_content": ({"conversations": None, "messages": [{"role": "user"}]}, "must have messages with `role`"),
    "no_value": ({"conversations": [{"from": "human"}]}, "must have turns with `from` (human or gpt) and `value`"),
    "no_turns": ({"conversations": None}, "must have `conversations` or `messages`, got id, image"),
    "boxes_twice": (
        {
            "conversations": None,
            "messages": [
                {"role": "user", "content": [{"type": "image", "boxes": [[5, 10, 40, 30]]}]},
                {"role": "assistant", "content": "A cup."},
            ],
            "boxes": [[5, 10, 40, 30]],
        },
        "boxes in `boxes` or in its image blocks, got both",
    ),
    "wrong_boxes": ({"boxes": [[40, 10, 5, 30]]}, "x1 <= x2"),
    "wrong_number_of_boxes": ({"boxes": [[[5, 10, 40, 30]], []]}, "for each image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named(small_processor, kind, caplog):
    changes, problem = BAD[kind]
    bad = sample(id="bad-13", **changes)
    with pytest.raises(SampleError, match="bad-13") as caught:
        MGLlavaDataCollator(small_processor)([sample(), bad])
    assert problem in str(caught.value)

    skipping = MGLlavaDataCollator(small_processor, on_bad_sample="skip", return_sample_ids=True)
    with caplog.at_level(logging.WARNING):
        batch = skipping([sample(), bad])
    assert "bad-13" in caplog.text
    assert batch["sample_ids"] == ["7"] and batch["skipped_samples"] == 1
    assert torch.equal(batch["input_ids"], MGLlavaDataCollator(small_processor)([sample()])["input_ids"])


def test_a_damaged_file_is_named(small_processor, tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(SampleError, match=r"Sample 7.*half\.png"):
        MGLlavaDataCollator(small_processor)([sample(image=str(tmp_path / "half.png"))])


def test_a_batch_of_bad_samples_weighs_nothing(small_processor):
    batch = MGLlavaDataCollator(small_processor, on_bad_sample="skip")([sample(boxes=None)])
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["labels"] == -100).all()


def test_missing_boxes_may_be_taken_for_none(small_processor):
    batch = MGLlavaDataCollator(small_processor, missing_boxes="empty")([sample(boxes=None)])
    assert batch["boxes"].tolist() == [[[0, 0, 0, 0]]]


def test_a_dataset_whose_boxes_may_have_been_dropped_is_a_warning(small_processor, caplog):
    bare = {name: value for name, value in sample().items() if name != "boxes"}
    text = {"id": "1", "conversations": [{"from": "human", "value": "Say red."}, TURNS[1]]}
    for samples, warnings in (([text], 0), ([sample(boxes=None), bare], 0), ([bare, bare], 1)):
        caplog.clear()
        collator = MGLlavaDataCollator(small_processor, missing_boxes="empty")
        for one in samples:
            collator([one])
        assert caplog.text.count("No sample so far has the key `boxes`") == warnings


def test_a_template_without_marks_is_refused(small_processor):
    class Plain:
        chat_template = "{{ messages }}"

    with pytest.raises(ValueError, match=r"generation .*got one without"):
        MGLlavaDataCollator(Plain())
    Plain.chat_template = None
    with pytest.raises(ValueError, match=r"generation .*got none"):
        MGLlavaDataCollator(Plain())
