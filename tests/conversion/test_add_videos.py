"""Model folders that were saved before videos: they load, say what to do, and can be given videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava
from mgllava.processing import CHAT_TEMPLATES
from tests.tiny import tiny_slime

FOLDER = Path(__file__).parents[2] / "small_world/model"
VIDEO = np.random.default_rng(0).integers(0, 255, (4, 24, 32, 3), dtype=np.uint8)
CONVERSATION = [
    {"role": "user", "content": [{"type": "video", "video": VIDEO}, {"type": "text", "text": "What moves?"}]}
]
OPTIONS = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "processor_kwargs": {"num_frames": 2},
    "add_generation_prompt": True,
}


def test_a_folder_without_videos_is_given_videos(tmp_path):
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert processor.video_token is None and not processor.takes_videos
    assert "<video>" in processor.tokenizer.decode(processor(text="Is <video> a tag?")["input_ids"][0])
    for call in (
        lambda: processor(text="<video>", videos=VIDEO),
        lambda: processor.apply_chat_template(CONVERSATION, **OPTIONS),
    ):
        with pytest.raises(ValueError, match=r"Call `mgllava.add_videos\(model, processor\)`"):
            call()

    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    rows, weights = model.config.text_config.vocab_size, model.get_input_embeddings().weight.clone()
    mgllava.add_videos(model, processor)
    assert model.config.video_token_id == processor.video_token_id == model.config.image_token_id + 1
    assert model.config.video_token_id in model.generation_config.suppress_tokens
    assert model.config.text_config.vocab_size == rows
    assert torch.equal(model.get_input_embeddings().weight, weights)
    assert processor.chat_template in CHAT_TEMPLATES.values()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    processor, model = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = processor.apply_chat_template(CONVERSATION, **OPTIONS)
    assert inputs["num_video_frames"].tolist() == [2]
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("unpadded", [None, 300])
def test_a_full_table_grows_by_the_placeholder(unpadded):
    """Its old rows stay words, if the model does not say that they are none."""
    processor, model = AutoProcessor.from_pretrained(FOLDER), AutoModelForImageTextToText.from_pretrained(FOLDER)
    rows = len(processor.tokenizer)
    assert rows % 64
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.unpadded_vocab_size = unpadded
    model.generation_config.suppress_tokens = [1]
    mgllava.add_videos(model, processor)
    assert processor.video_token_id == model.config.video_token_id == rows
    padded = (rows // 64 + 1) * 64
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == padded
    assert model.config.unpadded_vocab_size == (unpadded or rows)
    assert model.generation_config.suppress_tokens == sorted({1, *model.config.unused_token_ids})
    assert processor.video_processor.low_res_size == model.config.vision_config.image_size


def test_chat_templates_of_the_user_are_kept():
    processor, model = AutoProcessor.from_pretrained(FOLDER), AutoModelForImageTextToText.from_pretrained(FOLDER)
    own = processor.chat_template
    processor.chat_template = {"default": own, "mine": "{{ messages }}"}
    mgllava.add_videos(model, processor)
    assert processor.chat_template["mine"] == "{{ messages }}"
    assert processor.chat_template["default"] in CHAT_TEMPLATES.values()
    for template in (None, "{{ messages }}"):
        processor.chat_template = template
        mgllava.add_videos(model, processor)
        assert processor.chat_template == template


def test_other_families_are_refused():
    processor, model = AutoProcessor.from_pretrained(FOLDER), AutoModelForImageTextToText.from_pretrained(FOLDER)
    for pair in ((tiny_slime(), processor), (model, object())):
        with pytest.raises(TypeError, match="must be of a family that takes videos"):
            mgllava.add_videos(*pair)
