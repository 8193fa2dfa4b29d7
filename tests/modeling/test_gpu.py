"""Models on a CUDA device: equal numbers, half precision, quantization, compilation, device maps."""

import pytest
import torch

import mgllava
from mgllava import MGLlavaForConditionalGeneration
from mgllava.modeling.vision_mgllava import pool_boxes
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


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_answers_on_the_gpu_stay_close(tmp_path, bits):
    model = tiny_model(text_config={"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05})
    model.save_pretrained(tmp_path)
    quantized = MGLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=mgllava.quantization_config(bits), dtype=torch.bfloat16, device_map="cuda"
    )
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    layers = [name for name, module in quantized.named_modules() if type(module).__name__ == kind]
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.") for name in layers)
    inputs = tiny_inputs(MIXED)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits, expected = quantized(**on_gpu).logits.float().cpu()[mask], model(**inputs).logits[mask]
    assert (logits - expected).norm() / expected.norm() < (0.3 if bits == 4 else 0.1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    answer = quantized.generate(**on_gpu, **options)
    quantized.save_pretrained(tmp_path / "again")
    again = MGLlavaForConditionalGeneration.from_pretrained(tmp_path / "again", device_map="cuda")
    assert again.generate(**on_gpu, **options).tolist() == answer.tolist()


def test_compiled_answers_on_the_gpu_equal_eager_ones():
    model = tiny_model().cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompts = [{name: value.cuda() for name, value in tiny_inputs([[count]]).items()} for count in (1, 2, 5)]
    expected = [model.generate(**inputs, **options).tolist() for inputs in prompts]
    model.model.encode_images = torch.compile(model.model.encode_images, fullgraph=True)
    static = {"cache_implementation": "static", "max_cache_len": 64}
    assert [model.generate(**inputs, **options, **static).tolist() for inputs in prompts] == expected


def test_automatic_device_map_uses_the_gpu_and_offloads_the_rest(tmp_path):
    model, inputs = tiny_model(), tiny_inputs(MIXED)
    model.save_pretrained(tmp_path)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[mask]
        for max_memory, devices in ((None, {0}), ({0: 200_000, "cpu": "1GB"}, {0, "cpu"})):
            spread = MGLlavaForConditionalGeneration.from_pretrained(
                tmp_path, device_map="auto", max_memory=max_memory
            )
            assert set(spread.hf_device_map.values()) <= {*devices, "cuda:0"}
            assert ("cpu" in spread.hf_device_map.values()) == ("cpu" in devices)
            logits = spread(**on_gpu).logits.cpu()[mask]
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
