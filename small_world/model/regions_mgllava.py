"""Object features: boxes pooled from the feature pyramid (MG-LLaVA, arXiv 2406.17770, section 3.3).

The reference upsamples all stages to the grid of the first, concatenates them, cuts a 56x56 RoI-align grid out of the
result for every box and takes the mean over the grid. All of this is linear in the features and separable in x and y:
per channel, the mean is `w_y^T F w_x` with one weight vector per axis, and the upsampling folds into the vectors.
So neither the upsampled map (425 MB per image) nor the grids (36 MB per box) exist here, and the value is the same.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.utils.generic import maybe_autocast

from .configuration_mgllava import MGLlavaConfig
from .projector_mgllava import MGLlavaProjector

# Bins per side of the RoI-align grid. The count matters although the mean is taken: it decides how densely the box is
# sampled.
POOLED_SIZE = {"pyramid": 56, "multi_level": 56, "last_stage": 7}
# Types that hold every whole coordinate of an image. In bfloat16 259 is 260.
_BOX_DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)


def check_box_dtype(boxes: torch.Tensor) -> None:
    """Refuse boxes whose coordinates may have been rounded before they came here.

    Args:
        boxes (`torch.Tensor`): Boxes of any shape.

    Raises:
        ValueError: If they are not int64, int32, float64 or float32.
    """
    if boxes.dtype not in _BOX_DTYPES:
        raise ValueError(
            f"`boxes` must be int64, int32, float64 or float32, got {boxes.dtype}, in which coordinates lose digits. "
            "Trainers and mixed-precision policies cast floating point inputs: pass boxes as whole numbers (int64, as "
            "this model's processor makes them), which none of them casts."
        )


def roi_axis_weights(start: torch.Tensor, end: torch.Tensor, size: int, pooled_size: int) -> torch.Tensor:
    """Weights that RoI-align, averaged over its bins, gives to the cells along one axis.

    Equivalent of `roi_align(aligned=False, sampling_ratio=-1)`: regions are at least one cell long; each bin has
    `ceil(length / pooled_size)` samples, so all samples are evenly spaced; a sample interpolates between its two
    cells, is clamped onto the map if it lies up to one cell outside and counts as zero beyond that.

    Instead of visiting samples, this counts those between each pair of neighbouring cells: `count` samples whose mean
    distance to the left cell is `offset` give it `count * (1 - offset)` and the right cell `count * offset`. The
    shapes do not depend on the boxes, and the cost does not depend on their size.

    Args:
        start (`torch.Tensor` of shape `(...)`): Lower ends of the regions, in cells of the map.
        end (`torch.Tensor` of shape `(...)`): Upper ends, likewise.
        size (`int`): Number of cells along the axis.
        pooled_size (`int`): Number of bins along the axis.

    Returns:
        `torch.Tensor` of shape `(..., size)`, in the dtype of `start`.
    """
    start, end = start.unsqueeze(-1), end.unsqueeze(-1)
    length = (end - start).clamp(min=1)
    samples_per_bin = torch.ceil(length / pooled_size)
    num_samples = samples_per_bin * pooled_size
    step = length / num_samples
    cells = torch.arange(size, dtype=start.dtype, device=start.device)

    # Sample k lies at start + (k + 1/2) * step; `below[..., j]` samples lie before cell j.
    below = torch.minimum(torch.ceil((cells - start) / step - 0.5).clamp(min=0), num_samples)
    first, last = below[..., :-1], below[..., 1:]
    count = last - first
    offset = start + step * (first + last) / 2 - cells[:-1]
    right = count * offset
    weights = F.pad(count - right, (0, 1)) + F.pad(right, (1, 0))

    # Up to one cell outside, samples count for the border cell, then not at all. That is a jump: a sample that falls
    # on it in exact arithmetic is decided by how the reference rounds, so its own float32 formula decides here too.
    bin_size = length.float() / pooled_size
    for border, cell in ((-1, 0), (size, size - 1)):
        nearest = torch.minimum(((border - start) / step - 0.5).round().clamp(min=0), num_samples - 1)
        bin_index = torch.floor(nearest / samples_per_bin)
        in_bin = (nearest - bin_index * samples_per_bin).float()
        position = start.float() + bin_index.float() * bin_size + (in_bin + 0.5) * bin_size / samples_per_bin.float()
        if cell == 0:
            outside = nearest + (position < border)
            on_border = below[..., :1] - outside
        else:
            outside = nearest + (position <= border)
            on_border = outside - below[..., -1:]
        weights = weights + F.pad(on_border, (cell, size - 1 - cell))
    return weights / num_samples


def pool_boxes(
    feature_maps: list[torch.Tensor] | tuple[torch.Tensor, ...],
    boxes: torch.Tensor,
    image_size: int,
    pooled_size: int,
) -> list[torch.Tensor]:
    """Mean of RoI-align over each box, on maps that count as upsampled bilinearly to the size of the first.

    Args:
        feature_maps (`list` of `torch.Tensor` of shape `(num_images, channels, height, width)`):
            Feature maps of the same images, the finest first.
        boxes (`torch.Tensor` of shape `(num_images, num_boxes, 4)`):
            Boxes as x1, y1, x2, y2 in pixels of the `image_size` x `image_size` input; int64, int32, float64 or
            float32. No gradient flows into them.
        image_size (`int`):
            Side of the input that the maps were computed from, in pixels.
        pooled_size (`int`):
            Number of RoI-align bins along each axis.

    Returns:
        `list` of `torch.Tensor` of shape `(num_images, num_boxes, channels)`, one per map; float32 (float64 for maps
        in float64).

    Raises:
        ValueError: If boxes are in a dtype that rounds them, such as bfloat16.
    """
    check_box_dtype(boxes)
    height, width = feature_maps[0].shape[-2:]
    # Positions are sums of many steps: float64 costs nothing at this size and keeps all digits (MPS does not have it).
    boxes = boxes.to(torch.float32 if boxes.device.type == "mps" else torch.float64)
    x1, y1, x2, y2 = boxes.unbind(-1)
    with torch.no_grad(), maybe_autocast(boxes.device.type, enabled=False):
        weights_x = roi_axis_weights(x1 * width / image_size, x2 * width / image_size, width, pooled_size)
        weights_y = roi_axis_weights(y1 * height / image_size, y2 * height / image_size, height, pooled_size)

    pooled = []
    with maybe_autocast(boxes.device.type, enabled=False):
        for feature_map in feature_maps:
            dtype = torch.promote_types(feature_map.dtype, torch.float32)
            level_y = _fold_upsampling(weights_y, feature_map.shape[-2]).to(dtype)
            level_x = _fold_upsampling(weights_x, feature_map.shape[-1]).to(dtype)
            weights = (level_y.unsqueeze(-1) * level_x.unsqueeze(-2)).flatten(2)
            pooled.append(torch.bmm(weights, feature_map.flatten(2).transpose(1, 2).to(dtype)))
    return pooled


def _fold_upsampling(weights: torch.Tensor, size: int) -> torch.Tensor:
    """Turn weights of upsampled cells `(..., upsampled)` into weights of the `size` cells they came from."""
    if weights.shape[-1] == size:
        return weights
    identity = torch.eye(size, dtype=weights.dtype, device=weights.device).unsqueeze(0)
    upsampling = F.interpolate(identity, size=weights.shape[-1], mode="linear", align_corners=False)[0]
    return weights @ upsampling.T


class MGLlavaBoxProjector(MGLlavaProjector):
    """Pools the boxes from what `config.box_feature_type` names, and projects the features to box tokens."""

    def __init__(self, config: MGLlavaConfig):
        widths = config.high_res_vision_config.hidden_sizes
        feature_size = {
            "pyramid": sum(widths),
            "multi_level": config.box_multi_level_size,
            "last_stage": widths[-1],
        }[config.box_feature_type]
        super().__init__(feature_size, config)
        self.feature_type = config.box_feature_type
        self.image_size = config.high_res_vision_config.image_size
        if self.feature_type == "multi_level":
            self.level_projections = nn.ModuleList(nn.Linear(width, feature_size) for width in widths)

    def forward(self, feature_maps: tuple[torch.Tensor, ...], boxes: torch.Tensor) -> torch.Tensor:
        """Make one token per box.

        Args:
            feature_maps (`tuple` of four `torch.Tensor` of shape `(num_images, hidden_sizes[i], height_i, width_i)`):
                Maps of the high-resolution tower.
            boxes (`torch.Tensor` of shape `(num_images, num_boxes, 4)`):
                Boxes as x1, y1, x2, y2 in pixels of the high-resolution input; int64, int32, float64 or float32.

        Returns:
            `torch.Tensor` of shape `(num_images, num_boxes, hidden_size)`.

        Raises:
            ValueError: If boxes are in a dtype that rounds them, such as bfloat16.
        """
        if self.feature_type == "last_stage":
            feature_maps = feature_maps[-1:]
        dtype = feature_maps[0].dtype
        levels = pool_boxes(feature_maps, boxes, self.image_size, POOLED_SIZE[self.feature_type])
        levels = [level.to(dtype) for level in levels]
        if self.feature_type == "multi_level":
            # The projections are linear, so projecting the mean equals the mean of the projected map.
            features = sum(project(level) for project, level in zip(self.level_projections, levels, strict=True))
        else:
            features = torch.cat(levels, dim=-1)
        return super().forward(features)


__all__ = ["MGLlavaBoxProjector", "check_box_dtype", "pool_boxes", "roi_axis_weights"]
