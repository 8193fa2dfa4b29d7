"""The language model learns to answer questions about scenes that it is told, before it is shown any.

Large language models can look things up in their context, and know words, before they get eyes; stage 1 of the paper,
in which only the projectors learn, rests on that. A small one has to be taught.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerBase

from small_world.pictures import ATTRIBUTES, CHARACTERS
from small_world.questions import GRID
from small_world.scenes import COLORS, SHAPES, TEXTURES
from small_world.told import ANSWERS

from .architecture import language_model_config
from .objectives import count_right

_UNSAID = ("", TEXTURES[0])


class LanguageModelTraining(nn.Module):
    """Predicts answers about told scenes.

    The token of an object is the sum of the embeddings of its words ("striped", "red", "cross"); that of a cell the
    sum of the objects centered in it and of its place. Places, margins, and what tells the two kinds of token from
    words, are learned and thrown away: later the projectors say that.

    Embeddings and head are one table here, so that naming what was found is learned once for all words. They are saved
    as two, as models that the paper uses have them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Knows the placeholder `<image>`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config = language_model_config()
        self.model = LlamaModel(self.config)
        _begin_with_copying(self.model)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        vocabulary = (SHAPES, COLORS, TEXTURES, ("", *CHARACTERS))
        for name, words in zip(ATTRIBUTES, vocabulary, strict=True):
            ids = [_word_id(word, tokenizer) for word in words]
            self.register_buffer(f"{name}_words", torch.tensor(ids), persistent=False)
        self.no_word = tokenizer.pad_token_id
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
        """Compute the loss of a batch of `ToldScenes`."""
        is_told = input_ids == self.image_token_id
        # The placeholder has no row in the table.
        embeddings = self.model.get_input_embeddings()(input_ids.masked_fill(is_told, self.no_word))
        embeddings = embeddings.masked_scatter(is_told.unsqueeze(-1), self._tell(attributes, cells, margin, found))
        mask, positions = _apart(conversations)
        hidden = self.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        asked = labels[:, 1:] != -100
        logits = F.linear(hidden[:, :-1][asked], self.model.get_input_embeddings().weight)
        wanted, kinds = labels[:, 1:][asked], kinds[:, 1:][asked]
        right = logits.argmax(-1) == wanted
        counts = {name: count_right(right & (kinds == i), kinds == i) for i, name in enumerate(ANSWERS)}
        return {"loss": F.cross_entropy(logits, wanted), "counts": counts}

    def _tell(
        self, attributes: torch.Tensor, cells: torch.Tensor, margin: torch.Tensor, found: torch.Tensor
    ) -> torch.Tensor:
        """Make the tokens of cells and objects, one scene after the other: `(num_tokens, hidden_size)`."""
        table = self.model.get_input_embeddings().weight
        there = (attributes[..., :1] >= 0).float()
        objects = torch.zeros(())
        for name, index in zip(ATTRIBUTES, attributes.clamp(min=0).unbind(-1), strict=True):
            words = getattr(self, f"{name}_words")[index]
            objects = objects + table[words] * (words != self.no_word).unsqueeze(-1)
        places = (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        empty = margin.unsqueeze(-1) * self.is_margin + places + self.is_cell
        cells = empty.scatter_add(1, cells.unsqueeze(-1).expand_as(objects), objects * there)
        objects = objects + self.is_object
        rows = zip(cells, objects, found, strict=True)
        return torch.cat([part for cell, of_scene, index in rows for part in (cell, of_scene[index[index >= 0]])])

    def save(self, folder: Path) -> None:
        """Write the model as transformers writes it."""
        whole = LlamaForCausalLM(self.config)
        whole.model.load_state_dict(self.model.state_dict())
        whole.lm_head.weight.data.copy_(self.model.get_input_embeddings().weight)
        whole.save_pretrained(folder)


def _word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Look up a word. What goes without saying, a plain texture or no character, is padding."""
    if word in _UNSAID:
        return tokenizer.pad_token_id
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"`tokenizer` must have a token for each word of the small world, got {len(ids)} for {word!r}. Train it "
            "on more pictures."
        )
    return ids[0]


def _apart(conversations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each conversation see what is shared and itself, and begin right behind what is shared.

    Args:
        conversations (`torch.LongTensor` of shape `(num_scenes, num_ids)`): See `ToldScenes`.

    Returns:
        The mask, boolean of shape `(num_scenes, 1, num_ids, num_ids)`, and positions of shape `(num_scenes, num_ids)`.
    """
    is_shared = conversations == 0
    same = conversations.unsqueeze(2) == conversations.unsqueeze(1)
    before = torch.ones_like(same[0]).tril()
    mask = (same | is_shared.unsqueeze(1)) & before
    return mask.unsqueeze(1), mask.sum(-1) - 1


def _begin_with_copying(model: LlamaModel) -> None:
    """Start attention so that a token adds what it looks at to itself: the output projection undoes the values.

    That is near to where trained models have been seen to end ("Mimetic initialization of self-attention layers",
    arXiv 2305.09828). Together with one table for embeddings and head, what is looked at is what is said, from the
    first step; all that is left to learn is where to look.
    """
    for layer in model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.data.copy_(0.5 * attention.v_proj.weight.T)


__all__ = ["LanguageModelTraining"]
