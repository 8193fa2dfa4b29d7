"""Checkpoints of SliME: the original's numbers after a conversion, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mgllava.conversion import convert_checkpoint
from tests.slime.golden import GOLDEN, cases, image_path, tensors

CHECKPOINT = GOLDEN / "checkpoint"
TOWER = CHECKPOINT / "vision_tower"


def _report(folder):
    return json.loads((folder / "conversion_report.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden release in float32, as the numbers were computed."""
    return convert_checkpoint(CHECKPOINT, output=tmp_path_factory.mktemp("slime") / "model", dtype="float32")


def test_release_gives_the_numbers_of_the_original(converted):
    model, info = AutoModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(converted, backend="pil")
    case = cases()["case0_landscape_640x360"]
    expected = tensors(case)
    inputs = processor(image_path(case), case["prompt"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -64:, :300]
    torch.testing.assert_close(logits[-1], expected["logits"][-1], atol=5e-4, rtol=0)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == expected["generated_ids"][0].tolist()
