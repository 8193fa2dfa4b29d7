"""Box pooling against the computation that it replaces: upsampling, RoI-align of torchvision, mean."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import roi_align

from mgllava.modeling.vision_mgllava import pool_boxes

IMAGE_SIZE = 768


def reference(maps, boxes, pooled_size):
    side = maps[0].shape[-1]
    upsampled = torch.cat(
        [F.interpolate(level, size=side, mode="bilinear", align_corners=False) for level in maps], dim=1
    )
    chunks = [
        roi_align(upsampled, [chunk], pooled_size, side / IMAGE_SIZE, sampling_ratio=-1, aligned=False).mean((2, 3))
        for chunk in boxes.split(200)
    ]
    return torch.cat(chunks)


def make_boxes(kind, count=600):
    generator = torch.Generator().manual_seed(7)
    boxes = torch.randint(-200, 1000, (count, 4), generator=generator).float()
    ordered = torch.cat([boxes.view(-1, 2, 2).amin(1), boxes.view(-1, 2, 2).amax(1)], dim=-1)
    if kind == "outside":
        return ordered
    if kind == "inside":
        return ordered.clamp(0, IMAGE_SIZE)
    if kind == "degenerate":
        return ordered[:, [0, 1, 0, 1]]
    if kind == "on_border":
        border = torch.tensor([0.0, IMAGE_SIZE])[torch.randint(0, 2, (count, 2), generator=generator)]
        return torch.cat([torch.minimum(ordered[:, :2], border), torch.maximum(ordered[:, :2], border)], dim=-1)
    if kind == "swapped_and_fractional":
        return torch.rand(count, 4, generator=generator) * IMAGE_SIZE
    small = torch.randint(0, 740, (count, 2), generator=generator)
    return torch.cat([small, small + torch.randint(0, 40, (count, 2), generator=generator)], dim=-1).float()


@pytest.fixture(scope="module")
def maps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, side, side, generator=generator) for side in (192, 96, 48, 24)]


@pytest.mark.parametrize("kind", ["outside", "inside", "degenerate", "on_border", "swapped_and_fractional", "small"])
def test_pool_boxes_equals_roi_align_of_upsampled_maps(maps, kind):
    boxes = make_boxes(kind)
    pooled = torch.cat(pool_boxes(maps, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0]
    # float32 RoI-align itself is up to 1e-5 away from its float64 value.
    torch.testing.assert_close(pooled, reference(maps, boxes, 56), rtol=0, atol=3e-5)


def test_pool_boxes_is_closer_to_float64_than_the_float32_reference(maps):
    boxes = make_boxes("small")
    exact = reference([level.double() for level in maps], boxes.double(), 56)
    ours = (torch.cat(pool_boxes(maps, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0] - exact).abs().max()
    theirs = (reference(maps, boxes, 56) - exact).abs().max()
    assert ours < 1e-6 < theirs


@pytest.mark.parametrize(("size", "pooled_size"), [(24, 7), (13, 7), (16, 56), (50, 5)])
def test_pool_boxes_on_one_map_of_any_size(size, pooled_size):
    level = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    boxes = make_boxes("outside", 500)
    pooled = pool_boxes([level], boxes.unsqueeze(0), IMAGE_SIZE, pooled_size)[0][0]
    torch.testing.assert_close(pooled, reference([level], boxes, pooled_size), rtol=0, atol=3e-5)


def test_pool_boxes_gradient_equals_that_of_roi_align(maps):
    boxes = torch.cat([make_boxes(kind, 50) for kind in ("outside", "inside", "degenerate", "small")])
    upstream = torch.randn(len(boxes), 12, generator=torch.Generator().manual_seed(2))
    ours = [level.clone().requires_grad_() for level in maps]
    theirs = [level.clone().requires_grad_() for level in maps]
    (torch.cat(pool_boxes(ours, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0] * upstream).sum().backward()
    (reference(theirs, boxes, 56) * upstream).sum().backward()
    for level, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(level.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_pool_boxes_keeps_the_images_of_a_batch_apart(maps):
    other = [level.flip(-1) for level in maps]
    boxes = make_boxes("inside", 20).view(2, 10, 4)
    batch = [torch.cat(pair) for pair in zip(maps, other, strict=True)]
    pooled = torch.cat(pool_boxes(batch, boxes, IMAGE_SIZE, 56), dim=-1)
    for index, levels in enumerate((maps, other)):
        torch.testing.assert_close(pooled[index], reference(levels, boxes[index], 56), rtol=0, atol=3e-5)


def test_pool_boxes_runs_in_bfloat16_and_under_autocast_with_float32_sums(maps):
    boxes = make_boxes("inside", 30)
    rounded = [level.bfloat16() for level in maps]
    expected = reference([level.float() for level in rounded], boxes, 56)
    pooled = torch.cat(pool_boxes(rounded, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=3e-5)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = torch.cat(pool_boxes(rounded, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=3e-5)


def test_pool_boxes_keeps_float64(maps):
    boxes, exact = make_boxes("inside", 100), [level.double() for level in maps]
    pooled = torch.cat(pool_boxes(exact, boxes.unsqueeze(0), IMAGE_SIZE, 56), dim=-1)[0]
    torch.testing.assert_close(pooled, reference(exact, boxes.double(), 56), rtol=0, atol=1e-12)


def test_pool_boxes_compiles_without_a_graph_break(maps):
    compiled = torch.compile(pool_boxes, fullgraph=True, backend="aot_eager")
    boxes = make_boxes("inside", 12).unsqueeze(0)
    for ours, expected in zip(
        compiled(maps, boxes, IMAGE_SIZE, 56), pool_boxes(maps, boxes, IMAGE_SIZE, 56), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
