"""Cross-attention of the fusion and merging variants (MG-LLaVA, arXiv 2406.17770, table 5)."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class MGLlavaCrossAttention(nn.Module):
    """Multi-head cross-attention with layer norms on both sides, without the residual.

    The output projection starts at zero, so that a variant begins as the model without it, as Conv-Gate does.
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
        """Let `query` attend to `context`.

        Args:
            query (`torch.Tensor` of shape `(batch_size, num_queries, query_size)`): Tokens that ask.
            context (`torch.Tensor` of shape `(batch_size, num_keys, context_size)`): Tokens that answer.
            context_mask (`torch.BoolTensor` of shape `(batch_size, num_keys)`, *optional*):
                `True` where a key may be attended to.
            query_positions (`torch.Tensor` of shape `(num_queries, hidden_size)`, *optional*):
                Added to the projected queries.
            context_positions (`torch.Tensor` of shape `(num_keys, hidden_size)`, *optional*):
                Added to the projected keys.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_queries, query_size)`.
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


__all__ = ["MGLlavaCrossAttention"]
