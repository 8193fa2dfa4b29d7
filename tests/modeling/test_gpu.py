"""What needs a CUDA device: the same numbers there, half precision, flash attention."""

import pytest
import torch

from mgllava import MGLlavaForConditionalGeneration
from mgllava.modeling.regions_mgllava import pool_boxes
from tests.tiny import random_boxes, tiny_inputs, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIXED = [[3], [], [1, 5], [2]]


def test_pool_boxes_on_the_gpu_equals_the_cpu():
    maps = [torch.randn(2, 8, side, side) for side in (192, 96, 48, 24)]
    boxes = random_boxes(2, 50, size=768)
    on_gpu = pool_boxes([level.cuda() for level in maps], boxes.cuda(), 768, 56)
    for level, expected in zip(on_gpu, pool_boxes(maps, boxes, 768, 56), strict=True):
        torch.testing.assert_close(level.cpu(), expected, rtol=0, atol=1e-5)


def test_answers_on_the_gpu_equal_the_cpu():
    model, inputs = tiny_model().double(), tiny_inputs(MIXED)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    on_gpu = model.cuda().generate(**{name: value.cuda() for name, value in inputs.items()}, **options)
    assert on_gpu.cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_bfloat16_on_the_gpu_stays_close(tmp_path, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = MGLlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=implementation, device_map="cuda"
    )
    inputs = tiny_inputs(MIXED)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = half(**{name: value.cuda() for name, value in inputs.items()}).logits.float().cpu()[mask]
        expected = model(**inputs).logits[mask]
    assert (logits - expected).norm() / expected.norm() < 0.1
