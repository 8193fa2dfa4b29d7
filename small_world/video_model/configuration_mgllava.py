"""Configuration of MG-LLaVA (arXiv 2406.17770)."""

import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pretrained_common import ImageTextConfig


@strict
class MGLlavaHighResVisionConfig(PreTrainedConfig):
    r"""Configuration of the high-resolution tower, a ConvNeXt of timm without its head.

    The defaults are those of the trunk of `laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup`.

    Args:
        architecture (`str`, *optional*, defaults to `"convnext_large"`):
            Name of the ConvNeXt in timm. It decides everything except `depths` and `hidden_sizes`.
        depths (`list[int]`, *optional*, defaults to `[3, 3, 27, 3]`):
            Number of blocks in each of the four stages.
        hidden_sizes (`list[int]`, *optional*, defaults to `[192, 384, 768, 1536]`):
            Number of channels of each of the four stages.
        image_size (`int`, *optional*, defaults to 768):
            Side of the square input, in pixels. A multiple of 32, the stride of the last stage.
    """

    model_type = "mgllava_high_res_vision"
    base_config_key = "high_res_vision_config"

    architecture: str = "convnext_large"
    depths: list[int] | tuple[int, ...] = (3, 3, 27, 3)
    hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    image_size: int = 768
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        """Check the name, the number of stages, and that the image size is a multiple of the last stride."""
        # timm also accepts `local-dir:...` and `hf-hub:...`; a configuration must not reach outside its model folder.
        if not re.fullmatch(r"convnext[\w.-]*", self.architecture):
            raise ValueError(
                f"`architecture` must be the name of a ConvNeXt in timm, such as 'convnext_large', got "
                f"{self.architecture!r}."
            )
        if len(self.depths) != 4 or len(self.hidden_sizes) != 4:
            raise ValueError(
                "`depths` and `hidden_sizes` must have one entry for each of the 4 ConvNeXt stages, "
                f"got depths={self.depths} and hidden_sizes={self.hidden_sizes}."
            )
        if self.image_size % 32:
            raise ValueError(
                f"`image_size` must be a multiple of 32 (the stride of the last stage), got {self.image_size}."
            )


@strict
class MGLlavaConfig(ImageTextConfig):
    r"""Configuration of an MG-LLaVA model.

    `MGLlavaConfig()` describes MG-LLaVA-Vicuna-7B. The sizes of both image inputs, the token grid and the numbers of
    channels follow from the sub-configurations.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model, of a type that docs/language_models.md lists. Llama by default.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the CLIP vision tower that reads the low-resolution image. The fused tokens are made from
            the output of its *last* layer. MG-LLaVA uses layer -2 of a published tower with 24 layers, so the tower
            has 23 layers by default.
        high_res_vision_config (`MGLlavaHighResVisionConfig` or `dict`, *optional*):
            Configuration of the ConvNeXt that reads the high-resolution image.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder, which is replaced by fused tokens and box tokens.
        video_token_id (`int`, *optional*):
            Id of the `<video>` placeholder, which is replaced by the fused tokens and box tokens of each frame in
            turn. By default the model takes no videos.
        unpadded_vocab_size (`int`, *optional*):
            Number of rows of the embedding table that are vocabulary of the language model. The rows after them (the
            placeholder, padding) are excluded from the loss and never generated. By default all rows are vocabulary.
        fusion_type (`str`, *optional*, defaults to `"conv_gate"`):
            How high-resolution features are merged into the low-resolution tokens (section 3.2 and table 5):
            `"conv_gate"`, `"conv_gate_concat"`, `"channel_concat"` (convolved), `"plain_channel_concat"`,
            `"patch_info_mining"`, `"resampler"` or `"none"`.
        object_merging (`str`, *optional*, defaults to `"concat"`):
            How object features enter the language model (section 3.3 and table 5): `"concat"` (one token per box,
            after the fused tokens), `"box_to_fused"` (the same, after the boxes attended to the fused tokens),
            `"fused_to_box"` (no box tokens; the fused tokens attend to the boxes) or `"none"`.
        box_feature_type (`str`, *optional*, defaults to `"pyramid"`):
            Features that boxes are pooled from: `"pyramid"` (all stages, concatenated at the resolution of the first),
            `"multi_level"` (each stage projected, then summed) or `"last_stage"`.
        box_multi_level_size (`int`, *optional*, defaults to 1024):
            Width of the per-stage projections of `"multi_level"`.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the two projectors.
        frames_per_step (`int`, *optional*, defaults to 8):
            Number of video frames that pass the vision towers at a time, which limits the memory. `None`: all frames
            at once, as always if other processes hold parts of the towers or train them too.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares the embedding table. Also true if `text_config.tie_word_embeddings` is.

    Example:
    ```python
    >>> from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration

    >>> text_config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32064}
    >>> configuration = MGLlavaConfig(text_config=text_config)
    >>> configuration.image_seq_length
    576
    ```
    """

    model_type = "mgllava"
    sub_configs = {**ImageTextConfig.sub_configs, "high_res_vision_config": MGLlavaHighResVisionConfig}
    remote_classes = dict.fromkeys(
        ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        "modeling_mgllava.MGLlavaForConditionalGeneration",
    )

    keys_to_ignore_at_inference = [
        *ImageTextConfig.keys_to_ignore_at_inference,
        "video_hidden_states",
        "video_outputs",
    ]

    high_res_vision_config: Any = None
    fusion_type: Literal[
        "conv_gate",
        "conv_gate_concat",
        "channel_concat",
        "plain_channel_concat",
        "patch_info_mining",
        "resampler",
        "none",
    ] = "conv_gate"
    object_merging: Literal["concat", "box_to_fused", "fused_to_box", "none"] = "concat"
    box_feature_type: Literal["pyramid", "multi_level", "last_stage"] = "pyramid"
    box_multi_level_size: int = 1024
    projector_hidden_act: str = "gelu"
    video_token_id: int | None = None
    frames_per_step: int | None = 8

    def __post_init__(self, **kwargs):
        if self.high_res_vision_config is None:
            self.high_res_vision_config = MGLlavaHighResVisionConfig()
        elif isinstance(self.high_res_vision_config, dict):
            self.high_res_vision_config = MGLlavaHighResVisionConfig(**self.high_res_vision_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the placeholders, and that both towers give the same grid if the fusion needs it."""
        super().validate_architecture()
        if self.video_token_id == self.image_token_id:
            raise ValueError(
                f"`video_token_id` must differ from `image_token_id`, got {self.video_token_id} for both. Give each "
                "a row of the embedding table, or pass `video_token_id=None` for a model without videos."
            )
        if self.frames_per_step is not None and self.frames_per_step < 1:
            raise ValueError(
                f"`frames_per_step` must be a positive number, got {self.frames_per_step}. Pass None for all frames "
                "at once."
            )
        grid, high_res_grid = self.token_grid_size, self.high_res_vision_config.image_size // 32
        if self.fusion_type not in ("none", "resampler") and grid != high_res_grid:
            raise ValueError(
                f"`fusion_type={self.fusion_type!r}` needs equal grids of both towers: `vision_config` gives "
                f"{grid}x{grid} tokens, `high_res_vision_config` a last stage of {high_res_grid}x{high_res_grid}. "
                "Choose sizes with vision_config.image_size / patch_size == high_res_vision_config.image_size / 32."
            )

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of the placeholder of each modality: of images and, if the model takes them, of videos."""
        # Without `super()`, of whose properties `torch.compile` makes no values.
        ids = {"image": self.image_token_id}
        if self.video_token_id is not None:
            ids["video"] = self.video_token_id
        return ids

    @property
    def token_grid_size(self) -> int:
        """Side of the square grid of low-resolution tokens."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def image_seq_length(self) -> int:
        """Number of fused tokens of an image, without its box tokens. It does not depend on the fusion."""
        return self.token_grid_size**2

    @property
    def num_tokens_per_box(self) -> int:
        """Number of tokens that each box adds to the prompt: 1 or 0."""
        return 1 if self.object_merging in ("concat", "box_to_fused") else 0


__all__ = ["MGLlavaConfig", "MGLlavaHighResVisionConfig"]
