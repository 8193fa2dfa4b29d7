"""The language model learns how people speak in the small world: captions, questions and answers, without pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from .architecture import language_model_config
from .objectives import count_right


class LanguageModelTraining(nn.Module):
    """Predicts the next token."""

    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(language_model_config())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of texts."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        wanted = labels[:, 1:]
        asked = wanted >= 0
        right = (outputs.logits[:, :-1].argmax(-1) == wanted) & asked
        return {"loss": outputs.loss, "counts": {"next token": count_right(right, asked)}}

    def save(self, folder: Path) -> None:
        """Write the model as transformers writes it."""
        self.model.save_pretrained(folder)


__all__ = ["LanguageModelTraining"]
