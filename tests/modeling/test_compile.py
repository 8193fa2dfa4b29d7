"""`torch.compile`: how many graphs the vision flow and decoding take, and that answers stay the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from tests.tiny import IMAGE_SIZE, random_boxes, tiny_inputs, tiny_model

VARIANTS = {
    "published": {},
    "boxes_in_fused_tokens": {"object_merging": "fused_to_box", "fusion_type": "resampler"},
    "boxes_that_attend": {
        "object_merging": "box_to_fused",
        "fusion_type": "patch_info_mining",
        "box_feature_type": "multi_level",
    },
    "low_resolution": {"object_merging": "none", "fusion_type": "none"},
}
BUCKET = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def image_inputs(num_boxes, rows=BUCKET, num_images=1):
    """Images with `num_boxes` boxes each, in a tensor of `rows`."""
    boxes = torch.zeros(num_images, rows, 4, dtype=torch.int64)
    boxes[:, :num_boxes] = random_boxes(num_images, num_boxes, seed=num_boxes)
    generator = torch.Generator().manual_seed(num_boxes)
    pixels = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return pixels, boxes, torch.full((num_images,), num_boxes)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_vision_flow_is_one_graph_for_all_box_counts_of_a_bucket(variant):
    model = tiny_model(**VARIANTS[variant]).model
    counter = CompileCounter()
    compiled = torch.compile(model.encode_images, backend=counter, fullgraph=True)
    for num_boxes in range(1, BUCKET + 1):
        inputs = image_inputs(num_boxes)
        for tokens, expected in zip(compiled(*inputs)[:2], model.encode_images(*inputs)[:2], strict=True):
            assert (tokens is None) == (expected is None)
            if tokens is not None:
                torch.testing.assert_close(tokens, expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_vision_flow_takes_two_graphs_for_any_number_of_boxes():
    """One for the first count, one for all others: what a user gets who pads to no bucket."""
    model = tiny_model().model
    counter = CompileCounter()
    compiled = torch.compile(model.encode_images, backend=counter, fullgraph=True)
    for num_boxes in (3, 7, 20, 5, 64, 2):
        compiled(*image_inputs(num_boxes, rows=num_boxes))
    assert counter.frame_count == 2


@pytest.mark.slow
@torch.no_grad()
def test_inductor_computes_the_vision_flow():
    """The code that it writes, not only the graph: float64 weights, pooling and gates included."""
    model = tiny_model().model
    compiled = torch.compile(model.encode_images, fullgraph=True)
    inputs = image_inputs(3)
    for tokens, expected in zip(compiled(*inputs)[:2], model.encode_images(*inputs)[:2], strict=True):
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("llm", ["llama", "phi3"])
def test_generate_compiles_vision_once_and_decoding_once(llm):
    """The recipe of the docs, with a backend that counts; prompts differ in length, images in boxes."""
    model = tiny_model(llm)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    prompts = [tiny_inputs([[count]], seed=count) for count in (1, 4)]
    expected = [model.generate(**inputs, **options) for inputs in prompts]

    vision, graphs = CompileCounter(), []

    def decoding(graph, example_inputs):  # a function: `generate` copies its configuration, a counter with it
        graphs.append(graph)
        return graph.forward

    model.model.encode_images = torch.compile(model.model.encode_images, backend=vision, fullgraph=True)
    compile_config = CompileConfig(backend=decoding, fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # by itself, `generate` compiles on accelerators only
    for inputs, answer in zip(prompts, expected, strict=True):
        padding = torch.zeros(1, BUCKET - inputs["boxes"].shape[1], 4, dtype=torch.int64)
        inputs["boxes"] = torch.cat([inputs["boxes"], padding], dim=1)
        output = model.generate(
            **inputs, **options, cache_implementation="static", max_cache_len=64, compile_config=compile_config
        )
        assert output.tolist() == answer.tolist()
    assert (vision.frame_count, len(graphs)) == (1, 1)


def test_compiling_vision_changes_neither_names_nor_weights(tmp_path):
    model = tiny_model()
    names = list(model.state_dict())
    model.model.encode_images = torch.compile(model.model.encode_images, fullgraph=True)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
