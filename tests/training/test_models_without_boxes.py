"""The data of a family whose images have several views and no boxes, known by nothing else than its processor."""

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from mgllava.model_files.vocabulary import load_tokenizer
from mgllava.processing import CHAT_TEMPLATES
from mgllava.processing.image_text_processor_common import ImageTextProcessor
from mgllava.training import ConversationDataset, MGLlavaDataCollator, SampleError, TrainingError, open_source
from tests.golden_cases import GOLDEN, IMAGE_ID
from tests.training.conftest import write_samples

_TOKENS = 3  # of a view


class ViewsImageProcessor(CLIPImageProcessor):
    """One view of the whole image, and one for each 30 pixels of its width."""

    def __call__(self, images, **kwargs):
        widths = [image.shape[-1] if isinstance(image, torch.Tensor) else image.width for image in images]
        grids = [[1, width // 30] for width in widths]
        views = [image for image, (_, columns) in zip(images, grids, strict=True) for _ in range(1 + columns)]
        return {"pixel_values": super().__call__(views)["pixel_values"], "image_grids": grids}


class ViewsProcessor(ImageTextProcessor):
    image_inputs = ("pixel_values", "image_grids")
    chat_templates = CHAT_TEMPLATES

    def num_image_tokens(self, inputs):
        return [_TOKENS * (1 + int(rows) * int(columns)) for rows, columns in inputs.get("image_grids", [])]

    def count_images(self, inputs):
        return len(inputs.get("image_grids", []))

    def take_images(self, inputs, first, last=None):
        grids = torch.as_tensor(inputs.get("image_grids", []))[first:last]
        if not len(grids):
            return {}
        ends = [0, *torch.tensor(self.num_image_tokens(inputs)).div(_TOKENS).long().cumsum(0).tolist()]
        views = inputs["pixel_values"][ends[first] : ends[first + len(grids)]]
        return {"pixel_values": torch.stack([torch.as_tensor(view) for view in views]), "image_grids": grids}


@pytest.fixture(scope="module")
def views_processor():
    image_processor = ViewsImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return ViewsProcessor(image_processor, load_tokenizer(GOLDEN / "llm"), CHAT_TEMPLATES["vicuna"])


def sample(*widths, answer="A cup.", **changes):
    question = {"from": "human", "value": "<image>" * len(widths) + "What is it?"}
    images = [Image.new("RGB", (width, 20), "red") for width in widths]
    return {"id": "7", "image": images, "conversations": [question, {"from": "gpt", "value": answer}], **changes}


def test_images_of_several_views_share_a_batch(views_processor):
    collator = MGLlavaDataCollator(views_processor, max_text_length=100)
    batch = collator([sample(60, 20), sample(), sample(30)])
    assert batch["image_grids"].tolist() == [[1, 2], [1, 0], [1, 1]]
    assert batch["pixel_values"].shape == (3 + 1 + 2, 3, 8, 8)
    placeholders = batch["input_ids"] == IMAGE_ID
    assert placeholders.sum(1).tolist() == [4 * _TOKENS, 0, 2 * _TOKENS]
    assert (batch["labels"][placeholders] == -100).all()
    assert batch.keys() == collator([sample(), sample(60)]).keys()
    assert not {"pixel_values", "image_grids"} & collator([sample()]).keys()


@pytest.mark.parametrize("over", [0, 200])
def test_a_text_near_its_limit_is_cut_like_any_other(views_processor, over):
    """There are no boxes to keep fewer of."""
    later = [
        *sample(answer="It is red.")["conversations"],
        {"from": "human", "value": "<image>And this?"},
        {"from": "gpt", "value": "A cup. " * 20},
    ]
    images = [Image.new("RGB", (60, 20), "red")]
    whole = MGLlavaDataCollator(views_processor, max_text_length=500)([sample(image=images, conversations=later)])
    length = whole["input_ids"].shape[1] - 3 * _TOKENS + 1
    limit = length - 3 + over
    cut = MGLlavaDataCollator(views_processor, max_text_length=limit)([sample(image=images, conversations=later)])
    assert cut["input_ids"].shape[1] == min(limit, length) - 1 + 3 * _TOKENS
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    before = MGLlavaDataCollator(views_processor, max_text_length=25)([sample(image=images, conversations=later)])
    assert "pixel_values" not in before and "image_grids" not in before


def test_boxes_are_refused(views_processor, tmp_path):
    collator = MGLlavaDataCollator(views_processor, max_text_length=100)
    with pytest.raises(SampleError, match="Sample 7 has boxes, but this model takes none"):
        collator([sample(60, boxes=[[[5, 5, 9, 9]]])])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 20)), "boxes": []}]},
        {"role": "assistant", "content": "A cup."},
    ]
    with pytest.raises(SampleError, match="takes none"):
        collator([{"id": "7", "messages": messages}])

    write_samples(tmp_path, count=4)
    source = open_source(tmp_path / "samples.json", tmp_path / "images", tmp_path / "boxes.json")
    with pytest.raises(TrainingError, match=r"`boxes` must not be given .*boxes\.json"):
        ConversationDataset([source], views_processor, max_text_length=100)
    samples = json.loads((tmp_path / "samples.json").read_text())
    samples[1]["boxes"] = [[5, 5, 9, 9]]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    source = open_source(tmp_path / "samples.json", tmp_path / "images", None)
    with pytest.raises(TrainingError, match=r"1 of 4 samples.*sample-1 has boxes"):
        ConversationDataset([source], views_processor, max_text_length=100)


def test_lengths_are_those_of_the_texts(views_processor, tmp_path):
    write_samples(tmp_path, count=4)
    source = open_source(tmp_path / "samples.json", tmp_path / "images", None)
    dataset = ConversationDataset([source], views_processor, max_text_length=100)
    collator = MGLlavaDataCollator(views_processor, max_text_length=100)
    for length, index in zip(dataset.lengths, range(4), strict=True):
        batch = collator([dataset[index]])
        images = int((batch["input_ids"] == IMAGE_ID).sum())
        assert abs(length) == batch["input_ids"].shape[1] - images + bool(images)
        assert (length > 0) == bool(images)


def test_the_limit_of_an_unknown_family_must_be_given(views_processor):
    with pytest.raises(ValueError, match="`max_text_length` must be given for a processor of type ViewsProcessor"):
        MGLlavaDataCollator(views_processor)
