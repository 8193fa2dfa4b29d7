"""High-resolution tower, projectors, fusion and box pooling of MG-LLaVA (arXiv 2406.17770, section 3)."""

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import maybe_autocast

from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResVisionConfig


class MGLlavaHighResVisionModel(PreTrainedModel):
    """Stem and four stages of a ConvNeXt, with the parameter names of timm."""

    config: MGLlavaHighResVisionConfig
    config_class = MGLlavaHighResVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ConvNeXtStage"]
    # Without attention, any implementation works. The whole model supports only what all of its parts support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MGLlavaHighResVisionConfig):
        super().__init__(config)
        trunk = timm.create_model(
            config.architecture,
            pretrained=False,
            num_classes=0,
            depths=tuple(config.depths),
            dims=tuple(config.hidden_sizes),
        )
        self.stem = trunk.stem
        self.stages = trunk.stages
        self.post_init()

    def _init_weights(self, module: torch.nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            init.constant_(module.gamma, 1e-6)

    def forward(self, pixel_values: torch.Tensor) -> BackboneOutput:
        """Compute the feature maps of all four stages.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`):
                Normalized high-resolution images.

        Returns:
            `BackboneOutput` whose `feature_maps` are four tensors of shape
            `(num_images, hidden_sizes[i], height / 2**(i + 2), width / 2**(i + 2))`.
        """
        hidden_states = self.stem(pixel_values.to(self.dtype))
        feature_maps = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            feature_maps.append(hidden_states)
        return BackboneOutput(feature_maps=tuple(feature_maps))


class MGLlavaCrossAttention(nn.Module):
    """Multi-head cross-attention with layer norms on both sides, without the residual.

    The output projection starts at zero, so that training starts from the model without this module.
    """

    def __init__(self, query_size: int, context_size: int, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(query_size)
        self.context_norm = nn.LayerNorm(context_size)
        self.q_proj = nn.Linear(query_size, hidden_size)
        self.k_proj = nn.Linear(context_size, hidden_size)
        self.v_proj = nn.Linear(context_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, query_size)
        self.o_proj.initialization = "zeros"

    def forward(
        self,
        query: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        context_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let `query`, `(batch_size, num_queries, query_size)`, attend to `context`; the output has its shape.

        `context` is `(batch_size, num_keys, context_size)`; `context_mask`, `(batch_size, num_keys)`, is true where a
        key may be attended to. Positions, `(num_queries or num_keys, hidden_size)`, are added to the projected
        queries and keys.
        """
        context = self.context_norm(context)
        queries = self.q_proj(self.query_norm(query))
        keys, values = self.k_proj(context), self.v_proj(context)
        if query_positions is not None:
            queries = queries + query_positions.to(queries)
        if context_positions is not None:
            keys = keys + context_positions.to(keys)

        queries, keys, values = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in (queries, keys, values)
        )
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MGLlavaProjector(nn.Module):
    """Projects features to embeddings of the language model, with two linear layers and an activation between them."""

    def __init__(self, input_size: int, config: MGLlavaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(input_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project `(..., input_size)` features to `(..., hidden_size)` embeddings."""
        return self.linear_2(self.act(self.linear_1(features)))


# Fusion (section 3.2, table 5). Each module takes the low-resolution tokens and the maps of the high-resolution tower,
# and returns as many tokens of width `output_size`.


class MGLlavaConvFusion(nn.Module):
    r"""Convolutions on both branches, then a gated sum (Conv-Gate, the paper's choice) or a concatenation.

    With `x` the low-resolution tokens and `y` the last high-resolution stage,

        y' = Conv1x1(GELU(Conv1x1(y)))
        x' = x + Conv1x1(GELU(DepthwiseConv7x7(x)))
        g  = Linear(GELU(Linear(mean over all positions of [x', y'])))      one scalar per image

    and the output is `x' + tanh(g) * y'` (`conv_gate`), `[x', tanh(g) * y']` (`conv_gate_concat`) or `[x', y']`
    (`channel_concat`, which has no gate). Output projections start at zero, so `conv_gate` starts as the identity on
    `x`.
    """

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        low_size = config.vision_config.hidden_size
        high_size = config.high_res_vision_config.hidden_sizes[-1]
        self.grid_size = config.token_grid_size
        self.concatenates = config.fusion_type != "conv_gate"
        self.output_size = 2 * low_size if self.concatenates else low_size
        self.high_res_conv = nn.Conv2d(high_size, high_size, kernel_size=1)
        self.high_res_proj = nn.Conv2d(high_size, low_size, kernel_size=1)
        self.low_res_conv = nn.Conv2d(low_size, low_size, kernel_size=7, padding=3, groups=low_size)
        self.low_res_proj = nn.Conv2d(low_size, low_size, kernel_size=1)
        self.high_res_conv.initialization = self.low_res_conv.initialization = "xavier_uniform"
        self.high_res_proj.initialization = self.low_res_proj.initialization = "zeros"
        self.gate = None
        if config.fusion_type != "channel_concat":
            self.gate = nn.Sequential(nn.Linear(2 * low_size, low_size // 2), nn.GELU(), nn.Linear(low_size // 2, 1))

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Fuse tokens `(num_images, num_tokens, low_size)` with the last of `feature_maps`."""
        high_res = self.high_res_proj(F.gelu(self.high_res_conv(feature_maps[-1]))).flatten(2).transpose(1, 2)
        low_res_map = low_res.transpose(1, 2).unflatten(-1, (self.grid_size, self.grid_size))
        low_res = low_res + self.low_res_proj(F.gelu(self.low_res_conv(low_res_map))).flatten(2).transpose(1, 2)

        if self.gate is not None:
            gate = torch.tanh(self.gate(torch.cat([low_res, high_res], dim=-1).mean(dim=1, keepdim=True)))
            high_res = gate * high_res
        return torch.cat([low_res, high_res], dim=-1) if self.concatenates else low_res + high_res


class MGLlavaPlainConcatFusion(nn.Module):
    """Concatenates the last high-resolution stage to the low-resolution channels, unchanged."""

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        self.output_size = config.vision_config.hidden_size + config.high_res_vision_config.hidden_sizes[-1]

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Concatenate tokens `(num_images, num_tokens, low_size)` with the last of `feature_maps`."""
        return torch.cat([low_res, feature_maps[-1].flatten(2).transpose(1, 2)], dim=-1)


class MGLlavaPatchInfoMining(nn.Module):
    """Lets every token attend to its own cell of the high-resolution map (Mini-Gemini, arXiv 2403.18814, section 3.2).

    The map is the concatenation of all stages at the resolution of the first. At the published sizes, a cell has 8x8
    positions.
    """

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        low_size = config.vision_config.hidden_size
        high_size = sum(config.high_res_vision_config.hidden_sizes)
        self.grid_size = config.token_grid_size
        self.output_size = low_size
        self.query = nn.Sequential(nn.LayerNorm(low_size), nn.Linear(low_size, low_size))
        self.key = nn.Sequential(nn.LayerNorm(high_size), nn.Linear(high_size, low_size))
        self.value = nn.Sequential(nn.LayerNorm(high_size), nn.Linear(high_size, low_size))

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Fuse tokens `(num_images, num_tokens, low_size)` with all `feature_maps`."""
        size = feature_maps[0].shape[-2:]
        pyramid = torch.cat(
            [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in feature_maps], dim=1
        )
        cell = size[0] // self.grid_size
        cells = pyramid.unflatten(3, (self.grid_size, cell)).unflatten(2, (self.grid_size, cell))
        # (images, channels, row, y, column, x) -> (images, row * column, y * x, channels)
        cells = cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        query = self.query(low_res).unsqueeze(2)
        mined = F.scaled_dot_product_attention(query, self.key(cells), self.value(cells)).squeeze(2)
        return low_res + mined


class MGLlavaResampler(nn.Module):
    """Lets learned queries attend to the last stage, and adds the result to the tokens (Qwen-VL, arXiv 2308.12966).

    There is one query per low-resolution token, and queries and keys have fixed 2-D sine positions (section 2.1). The
    sum is our choice: the paper of MG-LLaVA only says that the number of tokens does not change.
    """

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        low_size = config.vision_config.hidden_size
        high_size = config.high_res_vision_config.hidden_sizes[-1]
        self.output_size = low_size
        self.grid_size = config.token_grid_size
        self.queries = nn.Parameter(torch.randn(config.image_seq_length, low_size) * 0.02)
        self.attention = MGLlavaCrossAttention(low_size, high_size, low_size, config.vision_config.num_attention_heads)

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Fuse tokens `(num_images, num_tokens, low_size)` with the last of `feature_maps`."""
        height, width = feature_maps[-1].shape[-2:]
        keys = feature_maps[-1].flatten(2).transpose(1, 2)
        resampled = self.attention(
            self.queries.expand(len(low_res), -1, -1),
            keys,
            query_positions=_sine_positions(self.grid_size, self.grid_size, self.output_size, keys.device),
            context_positions=_sine_positions(height, width, self.output_size, keys.device),
        )
        return low_res + resampled


def _sine_positions(height: int, width: int, size: int, device: torch.device) -> torch.Tensor:
    """Compute sine and cosine positions on the unit square, `(height * width, size)`: first y, then x."""
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 6, size // 4, device=device)
    axes = []
    for length in (height, width):
        angles = ((torch.arange(length, device=device) + 0.5) / length).unsqueeze(1) * frequencies
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    y, x = axes
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, size - grid.shape[-1]))


class MGLlavaNoFusion(nn.Module):
    """Returns the low-resolution tokens unchanged (the baseline of table 4)."""

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        self.output_size = config.vision_config.hidden_size

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Return the tokens `(num_images, num_tokens, low_size)` unchanged."""
        return low_res


FUSIONS: dict[str, type[nn.Module]] = {
    "conv_gate": MGLlavaConvFusion,
    "conv_gate_concat": MGLlavaConvFusion,
    "channel_concat": MGLlavaConvFusion,
    "plain_channel_concat": MGLlavaPlainConcatFusion,
    "patch_info_mining": MGLlavaPatchInfoMining,
    "resampler": MGLlavaResampler,
    "none": MGLlavaNoFusion,
}


# Object features: boxes pooled from the feature pyramid (section 3.3). The reference upsamples all stages to the grid
# of the first, concatenates them, computes a 56x56 RoI-align grid for every box and takes the mean over the grid. All
# of this is linear in the features and separable in x and y: per channel, the mean is `w_y^T F w_x` with one weight
# vector per axis, and upsampling only changes these vectors. The result is the same, without the upsampled map (425 MB
# per image) and the grids (36 MB per box).

# Bins per side of the RoI-align grid. Their number changes the mean, since it decides how densely a box is sampled.
POOLED_SIZE = {"pyramid": 56, "multi_level": 56, "last_stage": 7}
# Types that represent every integer coordinate of an image exactly. bfloat16 rounds 259 to 260.
_BOX_DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)


def check_box_dtype(boxes: torch.Tensor) -> None:
    """Raise `ValueError` for boxes in a dtype in which their coordinates may have been rounded."""
    if boxes.dtype not in _BOX_DTYPES:
        raise ValueError(
            f"`boxes` must be int64, int32, float64 or float32, got {boxes.dtype}, in which coordinates lose digits. "
            "Trainers and mixed-precision policies cast floating-point inputs, but not integers: pass int64 boxes, as "
            "this model's processor returns them."
        )


def roi_axis_weights(start: torch.Tensor, end: torch.Tensor, size: int, pooled_size: int) -> torch.Tensor:
    """Compute the weight `(..., size)` of each cell along one axis in the mean of RoI-align over its bins.

    `start` and `end` `(...)` are the ends of the regions in cells of the map; `size` is the number of cells and
    `pooled_size` that of bins. Equivalent to `roi_align(aligned=False, sampling_ratio=-1)`: regions are at least one
    cell long; each bin has `ceil(length / pooled_size)` samples, so all samples are evenly spaced; a sample
    interpolates between its two cells, is clamped onto the map if it lies up to one cell outside and counts as zero
    beyond that.

    Instead of looping over samples, this counts those between each pair of neighboring cells: `count` samples whose
    mean distance to the left cell is `offset` give it `count * (1 - offset)` and the right cell `count * offset`. The
    shapes do not depend on the boxes, and the cost does not depend on their size.
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

    # Samples up to one cell outside count for the border cell, samples beyond it do not count. For a sample exactly on
    # this limit, the reference's float32 rounding decides, so its own formula decides here too.
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
    """Compute the mean of RoI-align over each box, as if all maps were upsampled bilinearly to the size of the first.

    `feature_maps` are `(num_images, channels, height, width)`, the finest first. `boxes`,
    `(num_images, num_boxes, 4)`, are x1, y1, x2, y2 in pixels of the square input with side `image_size`, and get no
    gradient. Returns `(num_images, num_boxes, channels)` per map, in float32 (float64 for maps in float64).
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
    """Turn weights of upsampled cells `(..., upsampled)` into weights of the `size` original cells."""
    if weights.shape[-1] == size:
        return weights
    identity = torch.eye(size, dtype=weights.dtype, device=weights.device).unsqueeze(0)
    upsampling = F.interpolate(identity, size=weights.shape[-1], mode="linear", align_corners=False)[0]
    return weights @ upsampling.T


class MGLlavaBoxProjector(MGLlavaProjector):
    """Pools boxes from the features that `config.box_feature_type` names, and projects them to box tokens."""

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
        """Make a token `(num_images, num_boxes, hidden_size)` per box from all maps of the high-resolution tower.

        `boxes`, `(num_images, num_boxes, 4)`, are x1, y1, x2, y2 in pixels of the high-resolution input.
        """
        if self.feature_type == "last_stage":
            feature_maps = feature_maps[-1:]
        dtype = feature_maps[0].dtype
        levels = pool_boxes(feature_maps, boxes, self.image_size, POOLED_SIZE[self.feature_type])
        levels = [level.to(dtype) for level in levels]
        if self.feature_type == "multi_level":
            # The projections are linear, so projecting the mean gives the mean of the projected map.
            features = sum(project(level) for project, level in zip(self.level_projections, levels, strict=True))
        else:
            features = torch.cat(levels, dim=-1)
        return super().forward(features)


__all__ = [
    "FUSIONS",
    "POOLED_SIZE",
    "MGLlavaBoxProjector",
    "MGLlavaConvFusion",
    "MGLlavaCrossAttention",
    "MGLlavaHighResVisionModel",
    "MGLlavaNoFusion",
    "MGLlavaPatchInfoMining",
    "MGLlavaPlainConcatFusion",
    "MGLlavaProjector",
    "MGLlavaResampler",
    "check_box_dtype",
    "pool_boxes",
    "roi_axis_weights",
]
