"""Fusion of low- and high-resolution features (MG-LLaVA, arXiv 2406.17770, section 3.2 and table 5).

Every module takes the low-resolution tokens and the maps of the high-resolution tower, returns as many tokens as it
was given, and names their width in `output_size`.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .attention_mgllava import MGLlavaCrossAttention
from .configuration_mgllava import MGLlavaConfig


class MGLlavaConvFusion(nn.Module):
    r"""Convolutions on both branches, then a gated sum (Conv-Gate, the paper's choice) or a concatenation.

    With `x` the low-resolution tokens and `y` the last high-resolution stage,

        y' = Conv1x1(GELU(Conv1x1(y)))
        x' = x + Conv1x1(GELU(DepthwiseConv7x7(x)))
        g  = Linear(GELU(Linear(mean over all positions of [x', y'])))      one scalar per image

    and the output is `x' + tanh(g) * y'` (`conv_gate`), `[x', tanh(g) * y']` (`conv_gate_concat`) or `[x', y']`
    (`channel_concat`, which has no gate). Output projections start at zero: at the start of training, `conv_gate` is
    the identity on `x`.
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
    """The last high-resolution stage behind the low-resolution channels, as it is."""

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        self.output_size = config.vision_config.hidden_size + config.high_res_vision_config.hidden_sizes[-1]

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Concatenate tokens `(num_images, num_tokens, low_size)` with the last of `feature_maps`."""
        return torch.cat([low_res, feature_maps[-1].flatten(2).transpose(1, 2)], dim=-1)


class MGLlavaPatchInfoMining(nn.Module):
    """Every token attends to its own cell of the high-resolution map (Mini-Gemini, arXiv 2403.18814, section 3.2).

    The map is the pyramid at the resolution of its first stage, so a cell has 8x8 positions at the published sizes.
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
    """Learned queries read the last stage; the result is added to the tokens (Qwen-VL, arXiv 2308.12966, section 2.1).

    One query per low-resolution token, with fixed 2-D sine positions on queries and keys. That the two are merged by
    addition is our choice: the paper only says that the number of tokens stays.
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
    """Sine and cosine positions, half of the channels for y, half for x, on a map that spans the unit square.

    Returns:
        `torch.Tensor` of shape `(height * width, size)`.
    """
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 6, size // 4, device=device)
    axes = []
    for length in (height, width):
        angles = ((torch.arange(length, device=device) + 0.5) / length).unsqueeze(1) * frequencies
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    y, x = axes
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, size - grid.shape[-1]))


class MGLlavaNoFusion(nn.Module):
    """The low-resolution tokens alone (the baseline of the paper's table 4)."""

    def __init__(self, config: MGLlavaConfig):
        super().__init__()
        self.output_size = config.vision_config.hidden_size

    def forward(self, low_res: torch.Tensor, feature_maps: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Return the tokens `(num_images, num_tokens, low_size)` as they are."""
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


__all__ = [
    "FUSIONS",
    "MGLlavaConvFusion",
    "MGLlavaNoFusion",
    "MGLlavaPatchInfoMining",
    "MGLlavaPlainConcatFusion",
    "MGLlavaResampler",
]
