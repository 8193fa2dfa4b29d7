"""Pretrain the language model to answer questions about scenes whose image tokens are made by an oracle.

Stage 1 of the paper trains only the projectors, because a large language model already knows words and can look things
up in its context. The small one learns both here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerBase

from small_world.oracle_scenes import ANSWERS
from small_world.pictures import ATTRIBUTES, CHARACTERS
from small_world.questions import GRID
from small_world.scenes import COLORS, SHAPES, TEXTURES

from .architecture import language_model_config
from .objectives import count_right

_OMITTED = ("", TEXTURES[0])


class LanguageModelTraining(nn.Module):
    """Predicts the answers of `OracleScenes`, for a tokenizer that has `<image>`.

    The oracle token of an object is the sum of the embeddings of its words ("striped", "red", "cross"). That of a cell
    is the sum of the objects whose centers it contains and of an embedding of its place. The embeddings of places,
    margins and the two kinds of token are learned, but not saved: later the projectors provide them.

    Embeddings and head are tied here, so that naming is learned once for all words. They are saved as two tables, as
    in the paper's language models.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config = language_model_config()
        self.model = LlamaModel(self.config)
        _initialize_as_copying(self.model)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        vocabulary = (SHAPES, COLORS, TEXTURES, ("", *CHARACTERS))
        for name, words in zip(ATTRIBUTES, vocabulary, strict=True):
            ids = [_word_id(word, tokenizer) for word in words]
            self.register_buffer(f"{name}_words", torch.tensor(ids), persistent=False)
        self.no_word_id = tokenizer.pad_token_id
        size, deviation = self.config.hidden_size, self.config.initializer_range
        self.rows, self.columns = (nn.Parameter(deviation * torch.randn(GRID, size)) for _ in range(2))
        self.is_cell, self.is_margin, self.is_object = (nn.Parameter(deviation * torch.randn(size)) for _ in range(3))

    def forward(
        self,
        input_ids: torch.Tensor,
        conversations: torch.Tensor,
        labels: torch.Tensor,
        kinds: torch.Tensor,
        attributes: torch.Tensor,
        cells: torch.Tensor,
        margin: torch.Tensor,
        found: torch.Tensor,
    ) -> dict[str, Any]:
        """Compute the loss of a batch of `OracleScenes`."""
        is_oracle = input_ids == self.image_token_id
        # The placeholder has no row in the table.
        embeddings = self.model.get_input_embeddings()(input_ids.masked_fill(is_oracle, self.no_word_id))
        embeddings = embeddings.masked_scatter(
            is_oracle.unsqueeze(-1), self._oracle_tokens(attributes, cells, margin, found)
        )
        mask, positions = _mask_and_positions(conversations)
        hidden = self.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        asked = labels[:, 1:] != -100
        logits = F.linear(hidden[:, :-1][asked], self.model.get_input_embeddings().weight)
        wanted, kinds = labels[:, 1:][asked], kinds[:, 1:][asked]
        right = logits.argmax(-1) == wanted
        counts = {name: count_right(right & (kinds == i), kinds == i) for i, name in enumerate(ANSWERS)}
        return {"loss": F.cross_entropy(logits, wanted), "counts": counts}

    def _oracle_tokens(
        self, attributes: torch.Tensor, cells: torch.Tensor, margin: torch.Tensor, found: torch.Tensor
    ) -> torch.Tensor:
        """Return the tokens of cells and objects, one scene after the other, of shape `(num_tokens, hidden_size)`."""
        table = self.model.get_input_embeddings().weight
        exists = (attributes[..., :1] >= 0).float()
        objects = torch.zeros(())
        for name, index in zip(ATTRIBUTES, attributes.clamp(min=0).unbind(-1), strict=True):
            words = getattr(self, f"{name}_words")[index]
            objects = objects + table[words] * (words != self.no_word_id).unsqueeze(-1)
        places = (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        empty = margin.unsqueeze(-1) * self.is_margin + places + self.is_cell
        cells = empty.scatter_add(1, cells.unsqueeze(-1).expand_as(objects), objects * exists)
        objects = objects + self.is_object
        rows = zip(cells, objects, found, strict=True)
        return torch.cat([part for cell, of_scene, index in rows for part in (cell, of_scene[index[index >= 0]])])

    def save(self, folder: Path) -> None:
        """Save the model as transformers does."""
        whole = LlamaForCausalLM(self.config)
        whole.model.load_state_dict(self.model.state_dict())
        whole.lm_head.weight.data.copy_(self.model.get_input_embeddings().weight)
        whole.save_pretrained(folder)


def _word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a word; a plain texture and a missing character, which captions omit, have the padding id."""
    if word in _OMITTED:
        return tokenizer.pad_token_id
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"`tokenizer` must have a token for each word of the small world, got {len(ids)} for {word!r}. Train it "
            "on more pictures."
        )
    return ids[0]


def _mask_and_positions(conversations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention mask and positions with which each conversation attends to the shared prefix and itself.

    `conversations` and the positions are of shape `(num_scenes, num_ids)`, the boolean mask of shape
    `(num_scenes, 1, num_ids, num_ids)`. All conversations start at the position after the prefix.
    """
    is_shared = conversations == 0
    same = conversations.unsqueeze(2) == conversations.unsqueeze(1)
    before = torch.ones_like(same[0]).tril()
    mask = (same | is_shared.unsqueeze(1)) & before
    return mask.unsqueeze(1), mask.sum(-1) - 1


def _initialize_as_copying(model: LlamaModel) -> None:
    """Initialize attention so that it copies the tokens attended to: output and value projections are inverse.

    Trained models are close to that ("Mimetic initialization of self-attention layers", arXiv 2305.09828). With tied
    embeddings, the model says the word that it attends to from the first step, and learns only where to attend.
    """
    for layer in model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.data.copy_(0.5 * attention.v_proj.weight.T)


__all__ = ["LanguageModelTraining"]
