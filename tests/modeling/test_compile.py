"""`torch.compile`: the number of graphs for vision and decoding, and equal answers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from tests.tiny import IMAGE_SIZE, VARIANTS, random_boxes, tiny_inputs, tiny_model

BUCKET = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def image_inputs(num_boxes, rows=BUCKET, num_images=1):
    """Make images with `num_boxes` boxes each, padded to `rows`."""
    boxes = torch.zeros(num_images, rows, 4, dtype=torch.int64)
    boxes[:, :num_boxes] = random_boxes(num_images, num_boxes, seed=num_boxes)
    generator = torch.Generator().manual_seed(num_boxes)
    pixels = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return pixels, boxes, torch.full((num_images,), num_boxes)


# The fast ones contain all kinds of modules whose graphs depend on boxes.
FAST = ("published", "box_to_fused")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in VARIANTS]
)
@torch.no_grad()
def test_vision_takes_one_graph_for_all_box_counts_of_a_bucket(variant):
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


@pytest.mark.slow
@torch.no_grad()
def test_vision_takes_two_graphs_for_any_number_of_boxes():
    """One for the first count and one for all others, if boxes are not padded to a bucket.

    test_regions.py compiles the pooling for any number of boxes alone, which is faster.
    """
    model = tiny_model().model
    counter = CompileCounter()
    compiled = torch.compile(model.encode_images, backend=counter, fullgraph=True)
    for num_boxes in (3, 7, 20, 5, 64, 2):
        compiled(*image_inputs(num_boxes, rows=num_boxes))
    assert counter.frame_count == 2


@pytest.mark.slow
@torch.no_grad()
def test_inductor_code_equals_eager_vision():
    """The tests above run the graph without generating code from it."""
    model = tiny_model().model
    compiled = torch.compile(model.encode_images, fullgraph=True)
    inputs = image_inputs(3)
    for tokens, expected in zip(compiled(*inputs)[:2], model.encode_images(*inputs)[:2], strict=True):
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("llm", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
def test_generate_compiles_vision_once_and_decoding_once(llm):
    """As in the docs, with backends that count. The prompts differ in length, the images in their number of boxes."""
    model = tiny_model(llm)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    prompts = [tiny_inputs([[count]], seed=count) for count in (1, 4)]
    expected = [model.generate(**inputs, **options) for inputs in prompts]

    vision, graphs = CompileCounter(), []

    def decoding(graph, example_inputs):  # not a `CompileCounter`, which `generate` would copy with its configuration
        graphs.append(graph)
        return graph.forward

    model.model.encode_images = torch.compile(model.model.encode_images, backend=vision, fullgraph=True)
    compile_config = CompileConfig(backend=decoding, fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # by default, `generate` compiles only on accelerators
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
