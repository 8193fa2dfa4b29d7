"""The image tagger RAM++ (arXiv 2310.15200): a probability for each tag of a list.

A Swin transformer encodes the image. Each tag is a query: the mean of the embeddings of its descriptions, weighted by
their similarity to the image. In a small decoder, the query attends to the image tokens and gives one logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_ram_plus import DEFAULT_TAG_THRESHOLD, RamPlusConfig

_INITIAL_TEMPERATURE = 0.07


@dataclass
class RamPlusImageTaggingOutput(ModelOutput):
    """Output of [`RamPlusForImageTagging`].

    Attributes:
        logits (`torch.FloatTensor` of shape `(batch_size, num_tags)`):
            One logit for each tag, float32; its sigmoid is the probability of the tag.
        image_embeds (`torch.FloatTensor` of shape `(batch_size, num_tokens, projection_dim)`):
            The projected image tokens, after their mean.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            With `output_hidden_states=True`: the decoder's input and the output of each of its layers, of shape
            `(batch_size, num_tags, hidden_size)`.
        description_weights (`torch.FloatTensor` of shape `(batch_size, num_tags, num_descriptions)`, *optional*):
            With `output_hidden_states=True`: the weight of each description of a tag; they sum to 1.
        tag_embeds (`torch.FloatTensor` of shape `(batch_size, num_tags, projection_dim)`, *optional*):
            With `output_hidden_states=True`: the mean of the description embeddings with these weights.
        vision_hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            With `output_hidden_states=True`: output of the patch embedding and of each stage of the backbone, of shape
            `(batch_size, height, width, channels)`.
        vision_tokens (`torch.FloatTensor` of shape `(batch_size, num_tokens, 8 * embed_dim)`, *optional*):
            With `output_hidden_states=True`: the tokens before their projection to `image_embeds`.
    """

    logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    description_weights: torch.FloatTensor | None = None
    tag_embeds: torch.FloatTensor | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_tokens: torch.FloatTensor | None = None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class RamPlusLayerNorm(nn.LayerNorm):
    """Layer norm that always computes in float32, since an epsilon of 1e-12 is zero in float16."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize the last axis; the dtype does not change."""
        weight, bias = _at_least_float32(self.weight), _at_least_float32(self.bias)
        normed = F.layer_norm(_at_least_float32(hidden_states), self.normalized_shape, weight, bias, self.eps)
        return normed.to(hidden_states.dtype)


class RamPlusUnquantizedLinear(nn.Linear):
    """A linear layer that is never quantized, since quantizers replace only `nn.Linear` itself."""


class RamPlusClassifier(RamPlusUnquantizedLinear):
    """A linear layer that always computes in float32 or float64."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = _at_least_float32(hidden_states)
            return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype))


class RamPlusVisionModel(nn.Module):
    """Swin transformer of timm without its head, with the parameter names of timm."""

    def __init__(self, config: RamPlusConfig):
        super().__init__()
        trunk = SwinTransformer(
            img_size=config.image_size,
            num_classes=0,
            embed_dim=config.embed_dim,
            depths=tuple(config.depths),
            num_heads=tuple(config.num_heads),
            window_size=config.window_size,
            drop_path_rate=config.drop_path_rate,
        )
        for module in trunk.modules():
            if isinstance(module, PatchMerging):
                # Its inputs have four dimensions, which LLM.int8 cannot compute with.
                module.reduction = RamPlusUnquantizedLinear(4 * module.dim, module.out_dim, bias=False)
        self.patch_embed = trunk.patch_embed
        self.layers = trunk.layers
        self.norm = trunk.norm

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Compute the image tokens after their mean, and the outputs of the patch embedding and of each stage.

        Shapes: `(batch_size, 1 + height * width, channels)` and `(batch_size, height, width, channels)`.
        """
        hidden_states = self.patch_embed(pixel_values)
        stages = [hidden_states]
        for stage in self.layers:
            hidden_states = stage(hidden_states)
            stages.append(hidden_states)
        tokens = self.norm(hidden_states).flatten(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1), tuple(stages)


class RamPlusDecoderLayer(nn.Module):
    """Cross-attention to the image, then a feed-forward network, each followed by a residual and a layer norm.

    Tags do not attend to each other.
    """

    def __init__(self, config: RamPlusConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.projection_dim, config.hidden_size)
        self.v_proj = nn.Linear(config.projection_dim, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = RamPlusLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = RamPlusLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def project_image(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the keys and values for all tags, `(batch_size, num_heads, num_tokens, head_size)`."""
        return self._split_heads(self.k_proj(image_embeds)), self._split_heads(self.v_proj(image_embeds))

    def forward(self, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Let tags, `(batch_size, num_tags, hidden_size)`, attend to the keys and values of `project_image`."""
        queries = self._split_heads(self.q_proj(hidden_states))
        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "eager":
            scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
            attended = F.dropout(scores.softmax(-1), dropout) @ values
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        attended = self.o_proj(attended.transpose(1, 2).flatten(2))
        hidden_states = self.attention_norm(self.dropout(attended) + hidden_states)
        output = self.fc2(self.activation(self.fc1(hidden_states)))
        return self.output_norm(self.dropout(output) + hidden_states)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class RamPlusTagDecoder(nn.Module):
    """Computes one vector for each tag from the descriptions of all tags and the tokens of an image.

    `label_embed`, `(num_tags, num_descriptions, projection_dim)`, holds the description embeddings. They come from a
    text encoder that is not part of the model, and are not trained.
    """

    def __init__(self, config: RamPlusConfig):
        super().__init__()
        shape = (len(config.id2label), config.num_descriptions, config.projection_dim)
        self.chunk_size = config.tag_chunk_size
        self.label_embed = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.reweight_scale = nn.Parameter(torch.empty(()))
        self.word_projection: nn.Module = nn.Identity()
        if config.hidden_size != config.projection_dim:
            self.word_projection = nn.Linear(config.projection_dim, config.hidden_size)
        self.layers: Any = nn.ModuleList(RamPlusDecoderLayer(config) for _ in range(config.num_hidden_layers))

    def reweight(self, label_embed: torch.Tensor, global_embed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Average the description embeddings of each tag, weighted by their similarity to the image, in float32.

        Returns the means, `(batch_size, num_tags, projection_dim)`, and the weights,
        `(batch_size, num_tags, num_descriptions)`.
        """
        # Two matrix products, so that no temporary tensor is as large as the batch size times `label_embed`.
        with torch.autocast(global_embed.device.type, enabled=False):
            descriptions, image = _at_least_float32(label_embed), _at_least_float32(global_embed)
            image = image / image.norm(dim=-1, keepdim=True)
            scores = _at_least_float32(self.reweight_scale).exp() * (descriptions @ image.to(descriptions.dtype).mT)
            weights = scores.softmax(1).mT  # (num_tags, batch_size, num_descriptions)
            mixed = torch.bmm(weights, descriptions)
        return mixed.transpose(0, 1), weights.transpose(0, 1)

    def forward(
        self, image_embeds: torch.Tensor, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Decode all tags; `image_embeds` are the projected image tokens after their mean.

        Returns the decoded tags, `(batch_size, num_tags, hidden_size)`, and with `output_hidden_states` the fields of
        [`RamPlusImageTaggingOutput`] that the decoder computes.
        """
        keys_values = [layer.project_image(image_embeds) for layer in self.layers]
        decoded, weights, tag_embeds = [], [], []
        hidden_states: list[list[torch.Tensor]] = [[] for _ in range(len(self.layers) + 1)]
        for label_embed in self.label_embed.split(self.chunk_size):
            mixed, chunk_weights = self.reweight(label_embed, image_embeds[:, 0])
            tags = F.relu(self.word_projection(mixed.to(image_embeds.dtype)))
            chunk_states = [tags]
            for layer, (keys, values) in zip(self.layers, keys_values, strict=True):
                tags = layer(tags, keys, values)
                chunk_states.append(tags)
            decoded.append(tags)
            if output_hidden_states:
                weights.append(chunk_weights)
                tag_embeds.append(mixed)
                for collected, state in zip(hidden_states, chunk_states, strict=True):
                    collected.append(state)
        if not output_hidden_states:
            return torch.cat(decoded, dim=1), {}
        return torch.cat(decoded, dim=1), {
            "hidden_states": tuple(torch.cat(states, dim=1) for states in hidden_states),
            "description_weights": torch.cat(weights, dim=1),
            "tag_embeds": torch.cat(tag_embeds, dim=1),
        }


class RamPlusForImageTagging(PreTrainedModel):
    """RAM++ (arXiv 2310.15200): one logit for each tag of `config.id2label`.

    `attn_implementation` applies to the tag decoder: `"sdpa"` (the default) or `"eager"`. The attention of the
    backbone follows timm's own setting.
    """

    config: RamPlusConfig
    config_class = RamPlusConfig
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    # Blocks with residuals, and the decoder, all parts of which read the image tokens, must be on one device.
    _no_split_modules = ["SwinTransformerBlock", "RamPlusTagDecoder"]
    _supports_sdpa = True

    def __init__(self, config: RamPlusConfig):
        super().__init__(config)
        self.vision_tower = RamPlusVisionModel(config)
        self.image_projection = nn.Linear(config.vision_hidden_size, config.projection_dim)
        self.decoder = RamPlusTagDecoder(config)
        self.classifier = RamPlusClassifier(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model: see [`PreTrainedModel.from_pretrained`]. The description embeddings stay frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.decoder.label_embed.requires_grad_(False)  # loading makes every floating-point parameter trainable
        return loaded

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Buffers are not saved, and `from_pretrained` builds models on the meta device.
        buffers: Any = module
        if isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            init.copy_(buffers.relative_position_index, get_relative_position_index(*module.window_size))
        elif isinstance(module, SwinTransformerBlock):
            if module.attn_mask is not None:
                init.copy_(buffers.attn_mask, buffers.get_attn_mask())
        elif isinstance(module, RamPlusTagDecoder):
            init.normal_(module.label_embed, std=module.label_embed.shape[-1] ** -0.5)  # unit length on average
            init.constant_(module.reweight_scale, -torch.tensor(_INITIAL_TEMPERATURE).log().item())

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor, output_hidden_states: bool | None = None, **kwargs
    ) -> RamPlusImageTaggingOutput:
        """Compute the logits of all tags.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
                Images from the model's image processor.
            output_hidden_states (`bool`, *optional*):
                Whether to return all optional fields. `config.output_hidden_states` by default.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            `RamPlusImageTaggingOutput`.

        Raises:
            ValueError: If `pixel_values` has another shape.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, 3, {size}, {size}), got {tuple(pixel_values.shape)}. "
                "Prepare images with this model's own image processor."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tokens, stages = self.vision_tower(pixel_values.to(self.dtype))
        image_embeds = self.image_projection(tokens)
        tags, intermediates = self.decoder(image_embeds, output_hidden_states)
        if output_hidden_states:
            intermediates |= {"vision_hidden_states": stages, "vision_tokens": tokens}
        return RamPlusImageTaggingOutput(
            logits=self.classifier(tags).squeeze(-1), image_embeds=image_embeds, **intermediates
        )

    def post_process_image_tagging(
        self, outputs: RamPlusImageTaggingOutput, threshold: float | None = None
    ) -> list[dict[str, list]]:
        """List the tags of each image.

        Args:
            outputs (`RamPlusImageTaggingOutput`): Output of the model.
            threshold (`float`, *optional*):
                Probability that a tag must exceed. By default each tag has its own, `config.thresholds`.

        Returns:
            `list[dict]`: For each image `labels` (the tags), `scores` (their probabilities) and `indices`, in the
            order of the indices. Tags in `config.suppressed_tags` are never listed.

        Raises:
            ValueError: If `outputs` does not have one logit for each tag.
        """
        logits: Any = outputs.logits
        if logits.ndim != 2 or logits.shape[1] != self.config.num_labels:
            raise ValueError(
                f"`outputs.logits` must have shape (batch_size, {self.config.num_labels}), got {tuple(logits.shape)}. "
                "Did `set_tags` change the tags after these outputs were computed?"
            )
        probabilities = logits.float().sigmoid()
        limits = probabilities.new_tensor(self.config.thresholds if threshold is None else [threshold])
        seen = probabilities > limits
        seen[:, list(self.config.suppressed_tags)] = False
        results = []
        for image_seen, image_probabilities in zip(seen.cpu(), probabilities.cpu(), strict=True):
            indices = image_seen.nonzero().flatten().tolist()
            results.append(
                {
                    "labels": [self.config.id2label[index] for index in indices],
                    "scores": image_probabilities[indices].tolist(),
                    "indices": indices,
                }
            )
        return results

    def set_tags(
        self,
        tags: Sequence[str],
        tag_embeds: torch.Tensor,
        thresholds: float | Sequence[float] | None = None,
    ) -> None:
        """Replace the tags. All new tags must have the same number of descriptions.

        The released model was trained on unit-length embeddings of the text encoder of CLIP ViT-B/16; this method does
        not normalize embeddings. The new tags are saved with the model.

        Args:
            tags (`Sequence[str]`): The tags.
            tag_embeds (`torch.Tensor` of shape `(num_tags, num_descriptions, projection_dim)`):
                Embeddings of their descriptions, also as `(num_tags * num_descriptions, projection_dim)`.
            thresholds (`float` or `Sequence[float]`, *optional*):
                Probability that a tag must exceed to be reported, for all tags or for each. 0.68 by default.

        Raises:
            ValueError: If tags, embeddings and thresholds do not match each other or the model.
        """
        tags, width = list(tags), self.config.projection_dim
        rows = tag_embeds.numel() // width
        fits = tag_embeds.ndim == 2 or (tag_embeds.ndim == 3 and len(tag_embeds) == len(tags))
        if not tags or not rows or not fits or tag_embeds.shape[-1] != width or rows % len(tags):
            raise ValueError(
                f"`tag_embeds` must have shape (num_tags, num_descriptions, {width}) or (num_tags * num_descriptions, "
                f"{width}) for the {len(tags)} tags, got {tuple(tag_embeds.shape)}."
            )
        if thresholds is None:
            thresholds = DEFAULT_TAG_THRESHOLD
        if not isinstance(thresholds, Sequence):
            thresholds = [thresholds] * len(tags)
        if len(thresholds) != len(tags):
            raise ValueError(
                f"`thresholds` must be one number or one for each of the {len(tags)} tags, got {len(thresholds)}."
            )
        old = self.decoder.label_embed
        new = tag_embeds.detach().reshape(len(tags), -1, width).to(old.device, old.dtype, copy=True)
        self.decoder.label_embed = nn.Parameter(new, requires_grad=False)
        self.config.num_descriptions = new.shape[1]
        self.config.id2label = dict(enumerate(tags))
        self.config.label2id = {tag: index for index, tag in enumerate(tags)}
        self.config.thresholds = [float(value) for value in thresholds]
        self.config.suppressed_tags = []


__all__ = ["RamPlusForImageTagging", "RamPlusImageTaggingOutput"]
