"""The projector between vision and language (MG-LLaVA, arXiv 2406.17770, section 3.1)."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_mgllava import MGLlavaConfig


class MGLlavaProjector(nn.Module):
    """Linear, activation, Linear: from features of a vision tower to embeddings of the language model."""

    def __init__(self, input_size: int, config: MGLlavaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(input_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project `(..., input_size)` features to `(..., hidden_size)` embeddings."""
        return self.linear_2(self.act(self.linear_1(features)))


__all__ = ["MGLlavaProjector"]
