"""Configuration of SliME (arXiv 2406.08487)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from .pretrained_common import ImageTextConfig

# Width of an attention head of the query adapters.
HEAD_SIZE = 128


@strict
class SlimeConfig(ImageTextConfig):
    r"""Configuration of a SliME model.

    `SlimeConfig()` describes SliME-vicuna-7B.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model. Llama by default.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the CLIP vision tower that reads the views. The model uses the output of its *last* layer,
            so a published 24-layer tower whose layer -2 is used is stored with 23 layers (the default).
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder.
        unpadded_vocab_size (`int`, *optional*):
            Number of rows of the embedding table that belong to the vocabulary of the language model. Rows above it
            (the placeholder, padding) take no part in the loss and are never generated. `None`: all rows belong.
        separator_token_id (`int`, *optional*, defaults to 1919):
            Id of the token whose embedding separates global and local tokens, a comma.
        num_local_queries (`int`, *optional*, defaults to 144):
            Number of tokens that a local view is compressed to, a square number. `None`: local views are neither
            compressed nor routed, and no separator stands before them.
        local_order (`str`, *optional*, defaults to `"spatial"`):
            Order of the local tokens of an image: `"spatial"`, row by row over all views, or `"flat"`, view by view.
        router_top_p (`float`, *optional*, defaults to 0.95):
            The router keeps the fewest local tokens whose probabilities add up to more than this. 1.0: all.
        router_temperature (`float`, *optional*, defaults to 1.0):
            Divides the router's scores.
        router_sees_answers (`bool`, *optional*, defaults to `True`):
            Whether the router sees the answers in training, as in the original.
        branch (`str`, *optional*, defaults to `"both"`):
            Views that the model uses: `"both"`, `"global"` or `"local"`.
        forced_expert (`int`, *optional*):
            0: the global adapter is the projection alone; 1: queries and projection. `None`: the gate mixes them.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares the embedding table; taken from `text_config` when that says so.

    Raises:
        ValueError: If values contradict each other.
    """

    model_type = "slime"
    remote_classes = dict.fromkeys(
        ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        "modeling_slime.SlimeForConditionalGeneration",
    )
    keys_to_ignore_at_inference = [*ImageTextConfig.keys_to_ignore_at_inference, "kept_tokens"]

    separator_token_id: int = 1919
    num_local_queries: int | None = 144
    local_order: Literal["spatial", "flat"] = "spatial"
    router_top_p: float | int = 0.95
    router_temperature: float | int = 1.0
    router_sees_answers: bool = True
    branch: Literal["both", "global", "local"] = "both"
    forced_expert: Literal[0, 1] | None = None

    def validate_architecture(self):
        """Check what the sub-configurations must have in common, and the ranges of the other values."""
        super().validate_architecture()
        rows = self.text_config.vocab_size
        if not 0 <= self.separator_token_id < rows:
            raise ValueError(
                f"`separator_token_id` must be a row of the embedding table, 0 to {rows - 1} "
                f"(`text_config.vocab_size` is {rows}), got {self.separator_token_id}."
            )
        queries = self.num_local_queries
        if queries is not None and (queries < 1 or round(queries**0.5) ** 2 != queries):
            raise ValueError(f"`num_local_queries` must be a square number such as 144, or None, got {queries}.")
        if not 0 < self.router_top_p <= 1:
            raise ValueError(f"`router_top_p` must be greater than 0 and at most 1, got {self.router_top_p}.")
        if not 0 < self.router_temperature < math.inf:
            raise ValueError(f"`router_temperature` must be greater than 0 and finite, got {self.router_temperature}.")
        width = self.vision_config.hidden_size
        if width % 4 or width % max(width // HEAD_SIZE, 1):
            raise ValueError(
                f"`vision_config.hidden_size` must be a multiple of 4, for positions, and of the number of heads of "
                f"the query adapters, one for each {HEAD_SIZE} channels, got {width}."
            )

    @property
    def num_global_tokens(self) -> int:
        """Number of tokens of a view that is not compressed."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_local_tokens(self) -> int:
        """Number of tokens of a local view before the router."""
        return self.num_global_tokens if self.num_local_queries is None else self.num_local_queries


__all__ = ["HEAD_SIZE", "SlimeConfig"]
