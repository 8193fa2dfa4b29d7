"""Configuration of the image tagger RAM++ (arXiv 2310.15200)."""

import os
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

_RELEASED_TAG_COUNT = 4585
# The original uses it for tags that its threshold file does not list.
DEFAULT_TAG_THRESHOLD = 0.68
# Entries of `auto_map`: the model class, by the name of each Auto class that loads it.
_REMOTE_CLASSES = dict.fromkeys(
    ("AutoModel", "AutoModelForImageClassification"), "modeling_ram_plus.RamPlusForImageTagging"
)


@strict
class RamPlusConfig(PreTrainedConfig):
    r"""Configuration of a [`RamPlusForImageTagging`].

    The defaults are the sizes of the released `ram_plus_swin_large_14m`. `id2label` maps indices to tags, which
    have no names by default.

    Args:
        image_size (`int`, *optional*, defaults to 384):
            Side of the square input, in pixels. A multiple of 32, the stride of the last stage.
        embed_dim (`int`, *optional*, defaults to 192):
            Channels of the first stage of the Swin backbone. Each following stage has twice as many.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 18, 2]`):
            Number of blocks in each of the four stages.
        num_heads (`list[int]`, *optional*, defaults to `[6, 12, 24, 48]`):
            Number of attention heads in each stage.
        window_size (`int`, *optional*, defaults to 12):
            Side of the attention windows, in tokens. A smaller stage is a single window.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Rate of stochastic depth in training: it grows linearly from 0 to this value in the last block.
        projection_dim (`int`, *optional*, defaults to 512):
            Width of the description embeddings, and of the image tokens in the decoder.
        num_descriptions (`int`, *optional*, defaults to 51):
            Number of descriptions of each tag.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the tag decoder. If it equals `projection_dim`, queries are not projected.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 4):
            Number of attention heads of the decoder.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the decoder's feed-forward layers.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of the decoder's hidden states.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of the decoder's attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the decoder's layer norms. The backbone's is 1e-5.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new weights.
        thresholds (`list[float]`, *optional*):
            Probability that each tag must exceed to be reported; 1 switches a tag off. By default 0.68 for all.
        suppressed_tags (`list[int]`, *optional*, defaults to `[]`):
            Indices of tags that are never reported, whatever their probability.
        tag_chunk_size (`int`, *optional*, defaults to 1024):
            Number of tags that are decoded at once. It bounds the memory, and does not change the result, since tags
            do not attend to each other.

    Example:
    ```python
    >>> from mgllava import RamPlusConfig, RamPlusForImageTagging

    >>> configuration = RamPlusConfig(id2label={0: "cat", 1: "dog"}, thresholds=[0.6, 0.7])
    >>> model = RamPlusForImageTagging(configuration)
    ```
    """

    model_type = "ram_plus"

    image_size: int = 384
    embed_dim: int = 192
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (6, 12, 24, 48)
    window_size: int = 12
    drop_path_rate: float | int = 0.1
    projection_dim: int = 512
    num_descriptions: int = 51
    hidden_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float | int = 0.02
    # `__post_init__` makes a list and dictionaries with one entry for each tag.
    thresholds: Any = None
    id2label: Any = None
    label2id: Any = None
    suppressed_tags: list[int] | tuple[int, ...] = ()
    tag_chunk_size: int = 1024
    # This makes the image-classification pipeline apply a sigmoid to each logit.
    problem_type: Literal["multi_label_classification"] = "multi_label_classification"

    def __post_init__(self, **kwargs):
        if self.id2label is None:
            kwargs.setdefault("num_labels", _RELEASED_TAG_COUNT)
        super().__post_init__(**kwargs)
        self.label2id = {tag: index for index, tag in self.id2label.items()}
        if self.thresholds is None:
            self.thresholds = [DEFAULT_TAG_THRESHOLD] * len(self.id2label)
        else:
            self.thresholds = [float(threshold) for threshold in self.thresholds]  # files hold integers too

    def validate_architecture(self):
        """Check that sizes divide each other, then the tags."""
        if len(self.depths) != 4 or len(self.num_heads) != 4:
            raise ValueError(
                "`depths` and `num_heads` must have one entry for each of the 4 Swin stages, "
                f"got depths={self.depths} and num_heads={self.num_heads}."
            )
        for stage, heads in enumerate(self.num_heads):
            if (self.embed_dim << stage) % heads:
                raise ValueError(
                    f"`num_heads` must divide the channels of each stage, got {heads} heads for the "
                    f"{self.embed_dim << stage} channels of stage {stage}."
                )
        if self.image_size % 32:
            raise ValueError(
                f"`image_size` must be a multiple of 32 (the stride of the last stage), got {self.image_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} heads for "
                f"{self.hidden_size} channels."
            )
        if self.tag_chunk_size < 1:
            raise ValueError(f"`tag_chunk_size` must be at least 1, got {self.tag_chunk_size}.")
        self.validate_tags()

    def validate_tags(self):
        """Check tags, thresholds and suppressed tags against each other."""
        num_tags = len(self.id2label)
        if not num_tags or sorted(self.id2label) != list(range(num_tags)):
            raise ValueError(
                f"`id2label` must name at least one tag and count from 0 without gaps, got {num_tags} entries."
            )
        if len(self.thresholds) != num_tags:
            raise ValueError(
                f"`thresholds` must have one entry for each of the {num_tags} tags, got {len(self.thresholds)}."
            )
        outside = [index for index in self.suppressed_tags if not 0 <= index < num_tags]
        if outside:
            raise ValueError(f"`suppressed_tags` must hold indices of tags, 0 to {num_tags - 1}, got {outside}.")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration: see [`PreTrainedConfig.save_pretrained`].

        `auto_map` gets all Auto classes, where transformers itself writes only one.
        """
        if self._auto_class is not None:
            self.auto_map = {**_REMOTE_CLASSES, **(getattr(self, "auto_map", None) or {})}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def vision_hidden_size(self) -> int:
        """Channels of the last stage of the backbone."""
        return self.embed_dim * 8


__all__ = ["DEFAULT_TAG_THRESHOLD", "RamPlusConfig"]
