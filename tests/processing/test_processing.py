"""The processor: placeholders, chunks, batches, errors, saving."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer, ByT5Tokenizer

import mgllava
from mgllava.processing import (
    CHAT_TEMPLATES,
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    MGLlavaProcessor,
    processing_mgllava,
)

from .detectors import WholePicture

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"] if case["kind"] == "image"]
SMALL = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
RED, BLUE = (PIL.Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
ONE, TWO = [[0, 0, 9, 9]], [[0, 0, 9, 9], [3, 3, 9, 9]]


def golden_tokenizer(**kwargs):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llm", **kwargs)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def small(tokenizer=None, **kwargs):
    options = {"image_seq_length": 4, "chat_template": CHAT_TEMPLATES["vicuna"], **kwargs}
    return MGLlavaProcessor(MGLlavaImageProcessor(**SMALL), tokenizer or golden_tokenizer(), **options)


@pytest.fixture(scope="module")
def processor():
    return small()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_inputs_equal_the_original(case):
    processor = MGLlavaProcessor(MGLlavaImageProcessor(), golden_tokenizer())
    features = processor(
        GOLDEN / case["image"],
        case["prompt"],
        boxes=[{"boxes": case["raw_boxes"], "labels": case["raw_labels"], "scores": case["raw_scores"]}],
        do_pad=case["pad_image_to_square"],
        iou_threshold=case["iou_threshold"],
        box_limit_mode=case["limit_mode"],
        box_limit=case["limit_num"],
        return_tensors="pt",
    )
    assert features["input_ids"].shape == features["attention_mask"].shape == (1, case["seq_len"])
    start = case["input_ids"].index(-200)
    run = [processor.image_token_id] * (576 + case["n_boxes"])
    assert features["input_ids"][0].tolist() == case["input_ids"][:start] + run + case["input_ids"][start + 1 :]
    assert features["boxes"][0].tolist() == case["boxes"]


def test_several_texts_images_and_numbers_of_boxes(processor):
    text = ["plain", "a <image> b <image>", "<image>"]
    flat = processor(
        [RED, BLUE, RED], text, boxes=[ONE, TWO, []], padding=True, padding_side="left", return_tensors="pt"
    )
    nested = processor(
        [[], [RED, BLUE], [RED]],
        text,
        boxes=[[], [ONE, TWO], [[]]],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    torch.testing.assert_close(dict(nested), dict(flat))
    assert flat["num_boxes"].tolist() == [1, 2, 1]
    runs = (flat["input_ids"] == processor.image_token_id).sum(dim=1)
    assert runs.tolist() == [0, (4 + 1) + (4 + 2), 4 + 1]
    for index, arguments in enumerate([(None, None), ([RED, BLUE], [ONE, TWO]), (RED, [[]])]):
        single = processor(arguments[0], text[index], boxes=arguments[1])["input_ids"][0]
        assert flat["input_ids"][index][flat["attention_mask"][index].bool()].tolist() == single


def test_chunks_are_encoded_alone_after_bos(processor):
    encode = processor.tokenizer.backend_tokenizer.encode
    image = processor.image_token_id
    before, after = (encode(text, add_special_tokens=False).ids for text in ("USER: ", "\nhi there"))
    ids = processor(RED, "USER: <image>\nhi there", boxes=[TWO])["input_ids"][0]
    assert ids == [1, *before, *[image] * 6, *after]
    assert processor(RED, "<s>USER: <image>\nhi there", boxes=[TWO])["input_ids"][0] == ids
    assert processor(RED, "USER: <image>\nhi there", boxes=[TWO], add_special_tokens=False)["input_ids"][0] == ids[1:]
    assert processor(text="hi")["input_ids"] == [processor.tokenizer("hi")["input_ids"]]
    assert processor(text="")["input_ids"] == [[1]]


def test_bos_is_put_in_front_even_if_the_tokenizer_would_not():
    """Some tokenizers leave BOS out; the original adds the id by hand."""
    tokenizer = golden_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tokenizer("hi")["input_ids"][0] != 1
    assert small(tokenizer)(text="hi")["input_ids"][0][0] == 1


def test_a_slow_tokenizer_without_bos(processor):
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    slow = small(tokenizer)
    ids = slow(RED, "a<image>bc", boxes=[ONE])["input_ids"][0]
    assert ids == [ord("a") + 3, *[slow.image_token_id] * 5, ord("b") + 3, ord("c") + 3]


def test_no_tokens_per_box(processor):
    ids = small(num_tokens_per_box=0)(RED, "<image>", boxes=[TWO])["input_ids"][0]
    assert ids.count(processor.image_token_id) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "a <image>"}, "1 placeholders and 0 images"),
        ({"images": RED, "text": "a"}, "0 placeholders and 1 images"),
        ({"images": [RED, BLUE], "text": ["<image>", "a"]}, "1 placeholders and 2 images"),
        (
            {"images": [[RED, BLUE], [RED]], "text": ["<image>", "<image><image>"]},
            r"text\[0\].*1 placeholders and 2 images",
        ),
        ({"images": [RED, BLUE], "text": "<image><image>", "boxes": [ONE]}, "got 1 entries for 2 images"),
        ({"images": RED, "text": "<image>", "boxes": [ONE, TWO]}, "got 2 entries for 1 images"),
        ({"text": "a", "boxes": [ONE]}, "`boxes` must come with images"),
        ({}, "`images` or `text` must be given"),
        ({"text": [1]}, "`text` must be a string or a list of strings, got .*int"),
        (
            {"text": "a", "videos": [1]},
            "takes no videos yet: its tokenizer has no '<video>'. Call `mgllava.add_videos",
        ),
        ({"text": "a", "audio": [1]}, "`audio` must be None or empty"),
        ({"text": "a", "text_pair": "b"}, r"\['text_pair'\] must not be set"),
    ],
)
def test_wrong_inputs_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_a_tokenizer_without_the_placeholder_is_refused():
    with pytest.raises(ValueError, match=r"'<image>' in its vocabulary, got one of 420 tokens"):
        MGLlavaProcessor(MGLlavaImageProcessor(), AutoTokenizer.from_pretrained(GOLDEN / "llm"))


def test_truncation_cuts_text_and_never_images(processor):
    full = processor(RED, "a <image> b c d e f", boxes=[ONE])["input_ids"][0]
    end = max(i for i, token in enumerate(full) if token == processor.image_token_id) + 1
    cut = processor(RED, "a <image> b c d e f", boxes=[ONE], truncation=True, max_length=end + 2)
    assert cut["input_ids"][0] == full[: end + 2] and len(cut["attention_mask"][0]) == end + 2
    assert processor(RED, "a <image> b", boxes=[ONE], truncation=True)["input_ids"][0] == full[: end + 2]
    with pytest.raises(ValueError, match=r"`max_length` must leave room.* would keep 4 of 5 image tokens"):
        processor(RED, "a <image> b c d e f", boxes=[ONE], truncation=True, max_length=end - 1)
    tokenizer = golden_tokenizer(truncation_side="left")
    with pytest.raises(ValueError, match="would keep 0 of 5 image tokens"):
        small(tokenizer)(RED, "a <image> b c d e f", boxes=[ONE], truncation=True, max_length=3)


def test_padding_to_a_multiple_or_a_length(processor):
    assert len(processor(text="hi", padding=True, pad_to_multiple_of=8)["input_ids"][0]) == 8
    features = processor(text="hi", padding="max_length", max_length=12, padding_side="left")
    assert len(features["input_ids"][0]) == 12 and features["attention_mask"][0][0] == 0


def test_type_ids_replacements_and_offsets(processor):
    text = ["say <image> red", "x"]
    features = processor(
        RED,
        text,
        boxes=[ONE],
        padding=True,
        padding_side="left",
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    is_image = features["input_ids"] == processor.image_token_id
    assert torch.equal(features["mm_token_type_ids"], is_image.long())
    (replacement,), () = features["text_replacement_offsets"]
    assert replacement["span"] == (4, 11) and replacement["new_span"] == (4, 4 + 5 * 7)
    expanded = ["say " + "<image>" * 5 + " red", "x"]
    for row, ids, spans in zip(expanded, features["input_ids"], features["offset_mapping"], strict=True):
        for token, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True):
            if token == processor.image_token_id:
                assert row[start:end] == "<image>"
            elif end > start and (piece := processor.tokenizer.convert_ids_to_tokens(token).replace("▁", " ")).strip():
                assert row[start:end] == piece.strip() or row[start:end] == piece
    assert features["offset_mapping"][1][0].tolist() == [0, 0]
    assert features["offset_mapping"][0][-1].tolist()[1] == len(expanded[0])


def test_images_alone_and_labels_on_request(processor):
    raw = {"boxes": TWO, "labels": ["a", "b"], "scores": [0.5, 0.9]}
    features = processor([RED, BLUE], boxes=[raw, ONE], return_box_labels=True, return_tensors="pt")
    assert set(features) == {"pixel_values", "boxes", "num_boxes", "box_labels"}
    assert features["box_labels"] == [["b", "a"], []]
    assert features["pixel_values"].shape == (2, 3, 16, 16)
    assert {"pixel_values", "boxes", "num_boxes", "input_ids"} <= set(processor.model_input_names)


@pytest.mark.parametrize(
    "two",
    [np.array(TWO), [np.array(box) for box in TWO], tuple(map(torch.tensor, TWO))],
    ids=["array", "arrays", "tensors"],
)
def test_boxes_in_content_blocks_equal_boxes_given_as_an_argument(processor, tmp_path, two):
    RED.save(tmp_path / "red.png")

    def conversation(first, second):
        return [
            {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "red.png"), **first}]},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image", "image": BLUE, **second}]},
        ]

    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    blocks = conversation({"boxes": two}, {"boxes": ONE})
    inside = processor.apply_chat_template(blocks, **options)
    aside = processor.apply_chat_template(conversation({}, {}), **options, processor_kwargs={"boxes": [TWO, ONE]})
    torch.testing.assert_close(dict(inside), dict(aside))
    assert inside["num_boxes"].tolist() == [2, 1]
    rendered = processor.apply_chat_template(blocks, add_generation_prompt=True)
    torch.testing.assert_close(dict(processor([RED, BLUE], rendered, return_tensors="pt")), dict(inside))
    assert "boxes" in blocks[0]["content"][0]  # the caller's conversation is left alone
    partly = processor.apply_chat_template(
        [conversation({}, {}), conversation({}, {"boxes": TWO})], **options, processor_kwargs={"padding": True}
    )
    assert partly["num_boxes"].tolist() == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="got both"):
        processor.apply_chat_template(blocks, **options, processor_kwargs={"boxes": [TWO, ONE]})


@pytest.mark.parametrize("empty", [[], [[], [], []], [[[]], [[], []]], [[], [[], []]], [[], []], [[[]], []]])
def test_empty_lists_at_any_level_mean_no_boxes(processor, empty):
    expected = processor([[RED], [BLUE, RED]], ["<image>", "<image><image>"], boxes=[[[]], [[], []]], padding=True)
    features = processor([[RED], [BLUE, RED]], ["<image>", "<image><image>"], boxes=empty, padding=True)
    assert features["input_ids"] == expected["input_ids"]
    assert features["num_boxes"] == [1, 1, 1] and not np.any(features["boxes"])
    for alone in ([], [[]], [[[]]], np.zeros((0, 4)), [np.zeros((0, 4))]):
        assert processor(RED, "<image>", boxes=alone)["num_boxes"] == [1]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0.1, 0.2, 0.5, 0.6]]], r"`boxes\[0\]` .*\(30 x 20, width x height\).*at index 0, which looks relative"),
        ([[[0, 0, 9, 9], [31, 0, 40, 9]]], r"`boxes\[0\]` must lie in .*at index 1, which is outside"),
        ([0, 0, 9, 9], "Wrap them"),
    ],
)
def test_boxes_in_a_wrong_frame_or_nesting_are_refused(processor, boxes, message):
    with pytest.raises(ValueError, match=message):
        processor(RED, "<image>", boxes=boxes)
    in_block = boxes if boxes[0] == 0 else boxes[0]
    conversation = [{"role": "user", "content": [{"type": "image", "image": RED, "boxes": in_block}]}]
    with pytest.raises(ValueError, match=message.replace("Wrap them", "Wrap it")):
        processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def test_image_blocks_of_datasets_have_keys_without_values(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = None
    for block in (
        {"image": RED},
        {"image": None, "url": None, "path": str(tmp_path / "red.png")},
        {"bytes": data, "path": "elsewhere.png"},
        {"image": {"bytes": data, "path": None}},
        {"image": None, "bytes": bytearray(data)},
    ):
        conversation = [{"role": "user", "content": [{"type": "image", "boxes": ONE, **block}]}]
        features = processor.apply_chat_template(conversation, **options)
        expected = expected or features
        torch.testing.assert_close(dict(features), dict(expected))
    with pytest.raises(ValueError, match="An image block must have one image, got 'image', 'path'"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": RED, "path": "red.png"}]}], **options
        )


class NotCopied(WholePicture):
    def __deepcopy__(self, memo):
        raise AssertionError("weights must not be copied")


def test_a_detector_finds_the_boxes_that_are_not_given():
    processor = small(box_detector_config={"threshold": 0.2})
    processor.box_detector = NotCopied()
    features = processor([[RED], [BLUE]], ["<image>", "<image>"], return_box_labels=True, return_tensors="pt")
    assert features["box_labels"] == [["all"], ["all"]] and processor.box_detector.seen == [RED, BLUE]
    features = processor([RED, BLUE], ["<image>", "<image>"], boxes=[None, []], return_box_labels=True)
    assert features["box_labels"] == [["all"], []] and len(processor.box_detector.seen) == 3
    saved = processor.to_dict()
    assert saved["box_detector_config"] is None and "_box_detector" not in saved  # it describes another detector
    assert processor.box_detector is not None
    json.loads(processor.to_json_string())


def test_without_boxes_there_is_a_warning_once_and_the_zero_box(processor, monkeypatch):
    messages = []
    monkeypatch.setattr(processing_mgllava.logger, "warning_once", messages.append)
    features = processor(RED, "<image>", return_tensors="pt")
    assert features["boxes"].tolist() == [[[0, 0, 0, 0]]] and features["num_boxes"].tolist() == [1]
    assert len(messages) == 1 and "`boxes` is not given" in messages[0]
    processor(RED, "<image>", boxes=[[]])
    assert len(messages) == 1


def test_save_and_load(processor, tmp_path):
    original = small(num_tokens_per_box=0, box_detector_config={"a": 1})
    original.image_processor.box_limit = None
    original.save_pretrained(tmp_path)
    values = original.to_dict()
    values.pop("auto_map")  # written on saving, and not kept on loading
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATES["vicuna"]
    for load in (
        MGLlavaProcessor.from_pretrained,
        AutoProcessor.from_pretrained,
        mgllava.MGLlavaProcessor.from_pretrained,
    ):
        loaded = load(tmp_path)
        assert type(loaded).__name__ == "MGLlavaProcessor"
        assert isinstance(loaded.image_processor, MGLlavaImageProcessor)
        assert loaded.to_dict() == values
        assert loaded.image_processor.box_limit is None
        text = [{"role": "user", "content": [{"type": "image", "image": RED, "boxes": TWO}]}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        torch.testing.assert_close(
            dict(loaded.apply_chat_template(text, **options)), dict(original.apply_chat_template(text, **options))
        )
    assert isinstance(
        MGLlavaProcessor.from_pretrained(tmp_path, backend="pil").image_processor, MGLlavaImageProcessorPil
    )


def test_options_of_from_pretrained_reach_the_parts(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = MGLlavaProcessor.from_pretrained(
        tmp_path, padding_side="left", do_normalize=False, box_limit=7, image_seq_length=9
    )
    assert loaded.tokenizer.padding_side == "left" and loaded.image_seq_length == 9
    assert loaded.image_processor.do_normalize is False and loaded.image_processor.box_limit == 7


def test_options_of_a_call_may_be_grouped(processor):
    flat = processor(
        RED, "<image>", boxes=[TWO], do_normalize=False, padding="max_length", max_length=40, return_tensors="pt"
    )
    grouped = processor(
        RED,
        "<image>",
        common_kwargs={"return_tensors": "pt"},
        images_kwargs={"boxes": [TWO], "do_normalize": False},
        text_kwargs={"padding": "max_length", "max_length": 40},
    )
    torch.testing.assert_close(dict(grouped), dict(flat))
    assert flat["input_ids"].shape == (1, 40) and flat["num_boxes"].tolist() == [2]


def test_planned_placeholders_are_the_most_that_the_limit_allows(processor):
    planned = processor._get_num_multimodal_tokens(image_sizes=[(20, 30), (5, 5)])
    assert planned.num_image_tokens == [4 + 100] * 2 and planned.num_image_patches == [1, 1]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


@pytest.mark.parametrize("place", ["message", "text"])
def test_boxes_outside_of_image_blocks_are_refused(processor, place):
    text = {"type": "text", "text": "q"}
    message = {"role": "user", "content": [{"type": "image", "image": PIL.Image.new("RGB", (60, 40))}, text]}
    (message if place == "message" else text)["boxes"] = [[1, 2, 20, 30]]
    with pytest.raises(ValueError, match="`boxes` must be in image or video blocks, got them in a"):
        processor.apply_chat_template([message], tokenize=True, return_dict=True)


def test_rendered_boxes_that_were_changed_are_refused(processor):
    block = {"type": "image", "image": RED, "boxes": [[1, 2, 20, 15]]}
    text = processor.apply_chat_template([{"role": "user", "content": [block]}])
    with pytest.raises(ValueError, match="must hold boxes as `apply_chat_template` writes them after an image, got"):
        processor(RED, text.replace("[[1,", "[[one,"))


def test_boxes_may_come_from_a_generator(processor):
    image = PIL.Image.new("RGB", (60, 40))
    expected = processor(image, "<image>", boxes=[[[1, 2, 20, 30]]])
    assert (
        processor(image, "<image>", boxes=(of for of in [[[1, 2, 20, 30]]]))["boxes"][0] == expected["boxes"][0]
    ).all()
