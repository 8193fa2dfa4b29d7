"""What stands between the vision tower and the language model of SliME: two query adapters, a gate, a router."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_slime import HEAD_SIZE
from .language_model_common import must_be_touched

# Standard deviation of the noise on the router's scores in training.
_ROUTER_NOISE = 0.1
# Least scale of the noise on the gate in training.
_GATE_NOISE = 0.01


def sincos_positions(size: int, width: int) -> torch.Tensor:
    """Sine-cosine position embeddings of a square grid, row by row: columns in the first half of the channels.

    Args:
        size (`int`): Side of the grid.
        width (`int`): Number of channels, a multiple of 4.

    Returns:
        `torch.FloatTensor` of shape `(size**2, width)`: Rounded to float16, as the original creates them.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = axis[None].expand(size, size, -1)
    rows = axis[:, None].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).half().float()


class SlimeQueryAdapter(nn.Module):
    """Learned queries attend to the tokens of a view (section 3.2 of the paper); no residual, no feed-forward."""

    def __init__(self, width: int, num_queries: int):
        super().__init__()
        self.num_heads = max(width // HEAD_SIZE, 1)
        self.grid_size = round(num_queries**0.5)
        self.queries = nn.Parameter(torch.zeros(num_queries, width))
        # Of the checkpoint, which rounds it: computed values differ in the last bits.
        self.register_buffer("positions", sincos_positions(self.grid_size, width))
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.context_norm = nn.LayerNorm(width, eps=1e-6)
        self.output_norm = nn.LayerNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def key_positions(self, num_tokens: int) -> torch.Tensor:
        """Position embeddings of the tokens of a view: the table, resized if the grids differ."""
        size = round(num_tokens**0.5)
        if size == self.grid_size:
            return self.positions.to(self.queries.dtype)
        table = self.positions.float().unflatten(0, (self.grid_size, self.grid_size)).permute(2, 0, 1)
        resized = F.interpolate(table[None], size=(size, size), mode="bicubic", align_corners=False)[0]
        return resized.permute(1, 2, 0).flatten(0, 1).to(self.queries.dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compress tokens of shape `(num_views, num_tokens, width)` to `(num_views, num_queries, width)`."""
        context = self.context_norm(tokens)
        # `from_pretrained` leaves a table that a file lacks in float32.
        positions = self.positions.to(self.queries.dtype)
        queries = self.q_proj(self.query_norm(self.queries) + positions).expand(len(tokens), -1, -1)
        keys = self.k_proj(context + self.key_positions(tokens.shape[1]))
        values = self.v_proj(context)
        queries, keys, values = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (queries, keys, values)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.output_norm(self.out_proj(attended.transpose(1, 2).flatten(2)))


class SlimeProjector(nn.Module):
    """A mixture of two adapters for the global view: the projection, and queries before the same projection."""

    def __init__(self, width: int, output_width: int, num_tokens: int, forced_expert: int | None):
        super().__init__()
        self.num_tokens, self.forced_expert = num_tokens, forced_expert
        self.linear_1 = nn.Linear(width, output_width)
        self.linear_2 = nn.Linear(output_width, output_width)
        self.query_adapter = SlimeQueryAdapter(width, num_tokens)
        self.gate = nn.Parameter(torch.zeros(width, 2))

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project tokens of any view to the width of the language model."""
        return self.linear_2(F.gelu(self.linear_1(tokens)))

    def forward(self, tokens: torch.Tensor, is_compressed: bool = False) -> torch.Tensor:
        """Project the tokens of global views, `(num_views, num_tokens, width)`, or those of compressed tiles.

        Both pass through `forward`, where FSDP gathers the weights and accelerate moves inputs to their device.
        """
        if is_compressed:
            return self.project(tokens)
        if self.forced_expert is None:
            weights = self.gate_weights(tokens)
            attended = self.project(self.query_adapter(tokens))
            return weights[..., :1] * self.project(tokens) + weights[..., 1:] * attended
        output = self.project(tokens if self.forced_expert == 0 else self.query_adapter(tokens))
        if not must_be_touched([self]):
            return output
        # Other processes wait for the gradients of all trained parameters: what is not used has one of zero.
        unused = self.gate_weights(tokens).sum()
        if self.forced_expert == 0:
            unused = unused + self.query_adapter(tokens).sum()
        return output + 0 * torch.nan_to_num(unused, posinf=0.0, neginf=0.0)

    def gate_weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """Weights of the two experts for each token; in training with the original's noise."""
        scores = tokens @ self.gate.to(tokens.dtype)
        if self.training:
            # The original means the noise to have a weight of its own, and uses the gate's (`noisy_gating`).
            scores = scores + torch.randn_like(scores) * (F.softplus(scores) + _GATE_NOISE)
        weights = scores.softmax(dim=-1)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)


def route(
    local_tokens: torch.Tensor,
    text_tokens: torch.Tensor,
    is_text: torch.BoolTensor,
    top_p: float,
    temperature: float,
    has_noise: bool = False,
) -> tuple[torch.BoolTensor, torch.Tensor]:
    """Choose the local tokens of an image that matter for a text (section 3.3 of the paper).

    The score of a token is the sum of its cosine similarities with all tokens of the text. It is computed in float32
    whatever the model's dtype, because a cumulative sum in bfloat16 stalls before it reaches `top_p`.

    Args:
        local_tokens (`torch.FloatTensor` of shape `(num_tokens, hidden_size)`): Tokens of all local views.
        text_tokens (`torch.FloatTensor` of shape `(length, hidden_size)`): Embeddings of a prompt.
        is_text (`torch.BoolTensor` of shape `(length,)`): Which of them count.
        top_p (`float`): Keep the fewest tokens whose probabilities add up to more than this.
        temperature (`float`): Divides the scores.
        has_noise (`bool`, *optional*, defaults to `False`): Whether to add the original's training noise.

    Returns:
        `tuple[torch.BoolTensor, torch.FloatTensor]`: Which tokens are kept, and their scores without noise, both of
        shape `(num_tokens,)`.
    """
    with torch.no_grad(), torch.autocast(local_tokens.device.type, enabled=False):
        dtype = torch.promote_types(local_tokens.dtype, torch.float32)
        local_tokens, text_tokens = local_tokens.to(dtype), text_tokens.to(local_tokens.device, dtype)
        # A sum of products is the product with the sum: nothing of size tokens x text x width is ever made.
        directions = F.normalize(text_tokens, dim=-1, eps=1e-8)
        direction = is_text.to(directions) @ directions
        scores = F.normalize(local_tokens, dim=-1, eps=1e-8) @ direction
        noisy = scores + _ROUTER_NOISE * torch.randn_like(scores) if has_noise else scores
        if top_p >= 1:  # probabilities are rounded, and may add up to more than 1 before the last one
            return torch.ones_like(scores, dtype=torch.bool), scores
        probabilities, order = (noisy / temperature).softmax(dim=0).sort(descending=True, stable=True)
        num_kept = (probabilities.cumsum(dim=0) <= top_p).sum() + 1
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[order] = torch.arange(len(order), device=order.device) < num_kept
        return kept, scores


def reset_adapter(adapter: SlimeQueryAdapter, init: Any) -> None:
    """Initialize as the original does, with the functions of `init`, which leave alone what was loaded."""
    init.trunc_normal_(adapter.queries, std=0.02)
    init.copy_(adapter.positions, sincos_positions(adapter.grid_size, adapter.positions.shape[1]))
    # Queries, keys and values are one matrix in the original, whose bounds Xavier takes from all three.
    for layer in (adapter.q_proj, adapter.k_proj, adapter.v_proj):
        init.xavier_uniform_(layer.weight, gain=0.5**0.5)
        init.zeros_(layer.bias)
    _reset_linear(adapter.out_proj, init)
    init.zeros_(adapter.out_proj.bias)


def reset_projector(projector: SlimeProjector, init: Any) -> None:
    """Initialize as the original does; see [`reset_adapter`]."""
    init.zeros_(projector.gate)
    _reset_linear(projector.linear_1, init)
    _reset_linear(projector.linear_2, init)


def _reset_linear(layer: nn.Linear, init: Any) -> None:
    """Initialize as torch does."""
    bound = layer.in_features**-0.5
    init.uniform_(layer.weight, -bound, bound)
    init.uniform_(layer.bias, -bound, bound)


__all__ = ["SlimeProjector", "SlimeQueryAdapter", "reset_adapter", "reset_projector", "route", "sincos_positions"]
