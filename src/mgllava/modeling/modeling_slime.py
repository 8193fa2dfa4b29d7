"""SliME: a global view, tiles, and a router that keeps what matters for the text (arXiv 2406.08487)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check

from .adapters_slime import SlimeProjector, SlimeQueryAdapter, reset_adapter, reset_projector, route
from .configuration_slime import SlimeConfig
from .language_model_common import (
    ImageTextCausalLMOutputWithPast,
    ImageTextForConditionalGeneration,
    ImageTextModel,
    ImageTextModelOutputWithPast,
)
from .pretrained_common import CACHE_NAME, ImageTextPreTrainedModel, either_cache


@dataclass
class SlimeImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_images, num_global_tokens, hidden_size)`):
            Embeddings of the global views.
        pooler_output (`list` of `torch.FloatTensor` of shape `(num_tokens, hidden_size)`):
            All embeddings of each image: of its global view, the separator, and of its tiles. Those that the language
            model does not see are among them; with `branch="global"` those of tiles are zeros.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Of the vision tower, for all views that the branch uses, when asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Of the vision tower, for all views that the branch uses, when asked for.
        image_grids (`torch.LongTensor` of shape `(num_images, 2)`):
            Rows and columns of tiles of each image.
        local_order (`str`): Order of the embeddings of tiles, as in the configuration.
    """

    image_grids: torch.LongTensor | None = None
    local_order: str | None = None


@dataclass
class SlimeModelOutputWithPast(ImageTextModelOutputWithPast):
    """Output of `SlimeModel`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the language model's last layer. Where a token of an image is not kept, that of the last token
            before it that is.
        cache (`Cache`, *optional*):
            Keys and values for the next step, when `use_cache=True`. `past_key_values` before transformers 5.24.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Output of the embeddings and of every layer, when asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights of every layer, when asked for.
        image_hidden_states (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*):
            Embeddings of the images in turn, with those that are not kept.
        image_outputs ([`SlimeImageFeatures`], *optional*):
            Output of `get_image_features`, from which they are.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            Scores of the experts in every layer of a mixture of experts, when asked for.
        kept_tokens (`torch.BoolTensor` of shape `(num_placeholders,)`, *optional*):
            Which of `image_hidden_states` the language model sees.
    """

    kept_tokens: torch.BoolTensor | None = None


@dataclass
class SlimeCausalLMOutputWithPast(ImageTextCausalLMOutputWithPast):
    """Output of `SlimeForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the next token over the original vocabulary, when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of every row of the embedding table, `config.unused_token_ids` included. Where a token of an image
            is not kept, those of the last token before it that is.
        cache (`Cache`, *optional*):
            Keys and values for the next step, when `use_cache=True`. `past_key_values` before transformers 5.24.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Output of the embeddings and of every layer, when asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights of every layer, when asked for.
        image_hidden_states (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*):
            Embeddings of the images in turn, with those that are not kept.
        image_outputs ([`SlimeImageFeatures`], *optional*):
            Output of `get_image_features`, from which they are.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Loss for the balance of the experts, when `output_router_logits=True` and the language model has one.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            Scores of the experts in every layer of a mixture of experts, when asked for.
        kept_tokens (`torch.BoolTensor` of shape `(num_placeholders,)`, *optional*):
            Which of `image_hidden_states` the language model sees.
    """

    kept_tokens: torch.BoolTensor | None = None


class SlimePreTrainedModel(ImageTextPreTrainedModel):
    """Configuration, capabilities and initialization of all SliME models."""

    config: SlimeConfig
    config_class = SlimeConfig
    # Each of these combines tensors of several sources, which must lie on one device.
    _no_split_modules = ["SlimeProjector", "SlimeQueryAdapter"]
    unquantized_modules = ("vision_tower", "multi_modal_projector", "local_compressor")

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SlimeQueryAdapter):
            reset_adapter(module, init)
        elif isinstance(module, SlimeProjector):
            reset_projector(module, init)


class SlimeModel(SlimePreTrainedModel, ImageTextModel):
    """Vision tower, adapters, router and the language model, without the head."""

    output_class = SlimeModelOutputWithPast

    def __init__(self, config: SlimeConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # Only the CLS token would pass through it, and nobody reads that.
        self.vision_tower.post_layernorm = nn.Identity()
        self.multi_modal_projector = SlimeProjector(
            width, config.text_config.hidden_size, config.num_global_tokens, config.forced_expert
        )
        self.local_compressor = None
        if config.num_local_queries is not None:
            self.local_compressor = SlimeQueryAdapter(width, config.num_local_queries)
        self.add_language_model(language_model)

    def dummy_images(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the inputs of one empty image with one tile; see [`ImageTextModel`]."""
        size = self.config.vision_config.image_size
        grid = torch.ones(1, 2, dtype=torch.int64, device=device)
        return {"pixel_values": torch.zeros(2, 3, size, size, device=device), "image_grids": grid}

    def embed_views(
        self, pixel_values: torch.FloatTensor, is_global: torch.BoolTensor, **kwargs
    ) -> tuple[torch.FloatTensor, torch.FloatTensor, BaseModelOutputWithPooling]:
        """Run the vision tower and the adapters.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_views, 3, image_size, image_size)`): The views.
            is_global (`torch.BoolTensor` of shape `(num_views,)`): Which of them are global, the others being tiles.
            **kwargs: Arguments of the vision tower, such as `output_hidden_states`.

        Returns:
            Tokens of the global views, `(num_global_views, num_global_tokens, hidden_size)`; those of the tiles,
            `(num_tiles, num_local_tokens, hidden_size)`; the output of the vision tower.
        """
        vision_outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        tokens = vision_outputs.last_hidden_state[:, 1:]
        global_tokens = self.multi_modal_projector(tokens[is_global])
        local_tokens = tokens[~is_global]
        if self.local_compressor is None:
            return global_tokens, self.multi_modal_projector(local_tokens), vision_outputs
        compressed = self.local_compressor(local_tokens)
        local_tokens = self.multi_modal_projector(compressed, is_compressed=True)
        if not len(local_tokens):
            # Other processes may have tiles, and wait for the gradients of the compressor: here they are zero.
            global_tokens = global_tokens + 0 * local_tokens.sum()
        return global_tokens, local_tokens, vision_outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_grids: torch.LongTensor | None = None, **kwargs
    ) -> SlimeImageFeatures:
        """Embed images, whatever the text; the router sees the text, and runs in `forward` and `generate`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_views, 3, image_size, image_size)`):
                Of each image in turn the global view and its tiles, row by row.
            image_grids (`torch.LongTensor` of shape `(num_images, 2)`):
                Rows and columns of tiles of each image; (0, 0) for an image of one view.
            **kwargs: `output_hidden_states` and `output_attentions` of the vision tower; `return_dict=False` gives a
                tuple.

        Returns:
            [`SlimeImageFeatures`].

        Raises:
            TypeError: If one of them is not a tensor.
            ValueError: If the shapes of `pixel_values` and `image_grids` do not fit each other or the configuration.
        """
        grids = self._check_image_inputs(pixel_values, image_grids)
        is_global = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        num_tiles = [rows * columns for rows, columns in grids]
        firsts = torch.tensor([0, *(1 + tiles for tiles in num_tiles)][:-1]).cumsum(0)
        is_global[firsts] = True
        if self.config.branch == "global":  # the language model sees no tiles
            pixel_values, is_global = pixel_values[is_global], is_global[is_global]
        global_tokens, local_tokens, vision_outputs = self.embed_views(pixel_values, is_global, **kwargs)
        if self.config.branch == "global":
            width = global_tokens.shape[-1]
            local_tokens = global_tokens.new_zeros(sum(num_tiles), self.config.num_local_tokens, width)
        separator = self._separator(global_tokens)
        features = []
        for view, tiles, grid in zip(global_tokens, local_tokens.split(num_tiles), grids, strict=True):
            parts = [view]
            if len(tiles):
                parts += [*separator, self._arrange(tiles, *grid)]
            features.append(torch.cat(parts))
        return SlimeImageFeatures(
            last_hidden_state=global_tokens,
            pooler_output=features,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            image_grids=image_grids,
            local_order=self.config.local_order,
        )

    def _separator(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Embedding of the token between the global and the local tokens, of shape `(1, hidden_size)`; or nothing."""
        if self.local_compressor is None:
            return []
        ids = torch.tensor([self.config.separator_token_id], device=tokens.device)
        return [self.get_input_embeddings()(ids).to(tokens.device, tokens.dtype)]

    def _arrange(self, tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Put the tokens of an image's tiles into one sequence, line by line over all tiles or tile by tile."""
        if self.config.local_order == "flat":
            return tiles.flatten(0, 1)
        side = round(tiles.shape[1] ** 0.5)
        return tiles.view(rows, columns, side, side, -1).transpose(1, 2).flatten(0, 3)

    def _check_image_inputs(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None
    ) -> list[tuple[int, int]]:
        """Read `image_grids`; raise `TypeError` for what is not a tensor, `ValueError` for what does not fit."""
        size = self.config.vision_config.image_size
        for name, value in (("pixel_values", pixel_values), ("image_grids", image_grids)):
            if value is not None and not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"`{name}` must be a tensor, got {type(value).__name__}. Call the processor with "
                    "`return_tensors='pt'`."
                )
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size) or not len(pixel_values):
            raise ValueError(
                f"`pixel_values` must have shape (num_views, 3, {size}, {size}) with at least one view, got "
                f"{tuple(pixel_values.shape)}. Prepare images with this model's own processor, and leave "
                "`pixel_values` and `image_grids` out where a batch has none."
            )
        if image_grids is None:
            raise ValueError(
                "`image_grids` must be given with `pixel_values`, got None. Pass all that the processor returned. "
                "Images of one view each have `image_grids=torch.zeros(num_images, 2, dtype=torch.int64)`."
            )
        if image_grids.ndim != 2 or image_grids.shape[1] != 2 or image_grids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "`image_grids` must be int64 or int32 of shape (num_images, 2), rows and columns of tiles, got "
                f"{image_grids.dtype} of shape {tuple(image_grids.shape)}."
            )
        grids = [(rows, columns) for rows, columns in image_grids.tolist()]
        num_views = sum(1 + rows * columns for rows, columns in grids)
        if any(min(grid) < 0 for grid in grids) or num_views != len(pixel_values):
            raise ValueError(
                f"`image_grids` must describe the {len(pixel_values)} views of `pixel_values`, a global one and rows "
                f"x columns tiles for each image, got {grids}, which are {num_views} views."
            )
        return grids

    def placeholders_to_drop(
        self,
        image_outputs: SlimeImageFeatures,
        inputs_embeds: torch.FloatTensor,
        is_placeholder: torch.BoolTensor,
        attention_mask: torch.Tensor,
        labels: torch.LongTensor | None,
    ) -> torch.BoolTensor:
        """Tell which placeholders the language model does not see: the router's choice, for each image by its prompt.

        Args:
            image_outputs ([`SlimeImageFeatures`]): The images of all prompts.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Embeddings of text and images.
            is_placeholder (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where images are.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict: the router does not see these tokens if `config.router_sees_answers` is `False`.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length)`.

        Raises:
            ValueError: If the features have no `image_grids`, or an image is spread over several prompts.
        """
        config = self.config
        if image_outputs.get("image_grids") is None:
            raise ValueError(
                "`mm_encoder_outputs` must hold what `get_image_features` returned, got features without "
                "`image_grids`."
            )
        is_text = attention_mask.to(inputs_embeds.device).bool() & ~is_placeholder
        if labels is not None and not config.router_sees_answers:
            is_text &= (labels == -100).to(is_text.device)
        dropped = torch.zeros(is_placeholder.numel(), dtype=torch.bool, device=is_placeholder.device)
        embeds = inputs_embeds.flatten(0, 1)
        places = is_placeholder.flatten().nonzero().squeeze(-1)
        for image in places.split([len(tokens) for tokens in image_outputs.pooler_output]):
            row = image[0] // is_placeholder.shape[1]
            torch_compilable_check(
                row == image[-1] // is_placeholder.shape[1],
                lambda: "The placeholders of an image must be in one prompt. Prepare text and images in one call.",
            )
            has_tiles = len(image) > config.num_global_tokens
            if not has_tiles:
                continue
            first_local = config.num_global_tokens + (0 if self.local_compressor is None else 1)
            if config.branch == "global":
                dropped[image[config.num_global_tokens :]] = True
            elif config.branch == "local":
                dropped[image[:first_local]] = True
            if self.local_compressor is not None and config.branch != "global":
                local = image[first_local:]
                kept, _ = route(
                    embeds[local],
                    inputs_embeds[row],
                    is_text[row],
                    config.router_top_p,
                    config.router_temperature,
                    has_noise=self.training,
                )
                dropped[local] = ~kept
        return dropped.view_as(is_placeholder)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> SlimeModelOutputWithPast:
        """Embed text and images, drop what the router does not keep, and run the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with one placeholder per image embedding. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens. With images they are counted again, without the tokens that are dropped.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier steps.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, which the router does not see if `config.router_sees_answers` is `False`.
            pixel_values (`torch.FloatTensor` of shape `(num_views, 3, image_size, image_size)`, *optional*):
                The views of all images of the batch, in the order of their placeholders.
            image_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Rows and columns of tiles of each image; (0, 0) for an image of one view.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, to use in place of `pixel_values`.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, by its name since transformers 5.24.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted and not used, so that all that the processor returns may be passed on.
            **kwargs: Arguments of the language model, such as `use_cache` and `output_hidden_states`.

        Returns:
            [`SlimeModelOutputWithPast`].

        Raises:
            TypeError: If inputs of images are not tensors.
            ValueError: If inputs are missing, double, or do not fit each other.
        """
        arguments = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": either_cache(past_key_values, cache),
            "mm_encoder_outputs": mm_encoder_outputs,
            "labels": labels,
        }
        return self.embed_and_run({"pixel_values": pixel_values, "image_grids": image_grids}, arguments, **kwargs)


class SlimeForConditionalGeneration(SlimePreTrainedModel, ImageTextForConditionalGeneration):
    r"""SliME with its language modeling head.

    Example:
    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import mgllava

    >>> model = AutoModel.from_pretrained("path/to/slime-vicuna-7b", device_map="auto", dtype="auto")
    >>> processor = AutoProcessor.from_pretrained("path/to/slime-vicuna-7b")
    >>> prompt = "USER: <image>\nWhat does the sign say? ASSISTANT:"
    >>> inputs = processor("street.jpg", prompt, return_tensors="pt").to(model.device)
    >>> output = model.generate(**inputs, max_new_tokens=64)
    >>> answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    ```
    """

    body_class = SlimeModel
    output_class = SlimeCausalLMOutputWithPast
    image_arguments = ("pixel_values", "image_grids")

    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_grids: torch.LongTensor | None = None, **kwargs
    ) -> SlimeImageFeatures:
        """Embed images: see [`SlimeModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> SlimeCausalLMOutputWithPast:
        """Score the next token, and compute the loss if `labels` are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with one placeholder per image embedding. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens. With images they are counted again, without the tokens that are dropped.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier steps.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where none. At placeholders, and where they are one, they count as -100.
            pixel_values (`torch.FloatTensor` of shape `(num_views, 3, image_size, image_size)`, *optional*):
                The views of all images of the batch, in the order of their placeholders.
            image_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Rows and columns of tiles of each image; (0, 0) for an image of one view.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only (0: all), for the positions in a 1-D tensor, for
                those of each row in an integer tensor of shape `(batch_size, num_positions)`, or for those where a
                boolean tensor of shape `(batch_size, sequence_length)` is true, flattened to `(num_true, vocab_size)`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, to use in place of `pixel_values`.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, by its name since transformers 5.24.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted and not used, so that all that the processor returns may be passed on.
            **kwargs: Arguments of the language model, such as `use_cache` and `output_hidden_states`, and of the loss
                (`num_items_in_batch`).

        Returns:
            [`SlimeCausalLMOutputWithPast`].

        Raises:
            TypeError: If inputs of images are not tensors.
            ValueError: If inputs are missing, double, or do not fit each other.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            CACHE_NAME: either_cache(past_key_values, cache),
        }
        images = {
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "mm_encoder_outputs": mm_encoder_outputs,
            "labels": labels,
        }
        return self._score(images, arguments, logits_to_keep, **kwargs)

    def _num_image_tokens(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        tiles = images["image_grids"].prod(-1)
        separators = 0 if self.config.num_local_queries is None else 1
        local = (separators + tiles * self.config.num_local_tokens) * (tiles > 0)
        return self.config.num_global_tokens + local

    def _take_images(self, images: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
        grids = images["image_grids"]
        views = images["pixel_values"].split((1 + grids.prod(-1)).tolist())
        return {"pixel_values": torch.cat([views[index] for index in order]), "image_grids": grids[order]}


__all__ = [
    "SlimeCausalLMOutputWithPast",
    "SlimeForConditionalGeneration",
    "SlimeImageFeatures",
    "SlimeModel",
    "SlimeModelOutputWithPast",
    "SlimePreTrainedModel",
]
