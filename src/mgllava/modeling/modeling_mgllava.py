"""MG-LLaVA: three views of an image for one language model (arXiv 2406.17770)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput
from transformers.integrations import is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .configuration_mgllava import MGLlavaConfig
from .language_model_common import load_language_model
from .pretrained_common import CACHE_NAME, ImageTextPreTrainedModel, either_cache
from .vision_mgllava import (
    FUSIONS,
    MGLlavaBoxProjector,
    MGLlavaCrossAttention,
    MGLlavaHighResVisionModel,
    MGLlavaProjector,
    MGLlavaResampler,
    check_box_dtype,
)

logger = logging.get_logger(__name__)

# Arguments of `forward` for images, and for the loss.
_IMAGE_ARGUMENTS = ("pixel_values", "boxes", "num_boxes", "mm_encoder_outputs")
# What `generate` calls, overridden here: under another name it would be passed over without a word.
_GENERATION_HOOKS = ("_expand_inputs_for_generation", "_supports_default_dynamic_cache")
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass
class MGLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `MGLlavaModel`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the language model's last layer.
        cache (`Cache`, *optional*):
            Keys and values for the next step, when `use_cache=True`. `past_key_values` before transformers 5.24.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Output of the embeddings and of every layer, when asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights of every layer, when asked for.
        image_hidden_states (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*):
            Embeddings of the images, fused tokens and then box tokens of each image in turn.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of `get_image_features`, from which they are.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            Scores of the experts in every layer of a mixture of experts, when asked for.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    router_logits: tuple[torch.FloatTensor] | None = None

    # Heads of language models read these of their own bodies.
    cross_attentions = None
    shared_kv_states = None


@dataclass
class MGLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `MGLlavaForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the next token over the original vocabulary, when `labels` are given. What the language
            model's own class adds to it (`output_router_logits=True`) is in it.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of every row of the embedding table, `config.unused_token_ids` included.
        cache (`Cache`, *optional*):
            Keys and values for the next step, when `use_cache=True`. `past_key_values` before transformers 5.24.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Output of the embeddings and of every layer, when asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights of every layer, when asked for.
        image_hidden_states (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*):
            Embeddings of the images, fused tokens and then box tokens of each image in turn.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of `get_image_features`, from which they are.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Loss for the balance of the experts, when `output_router_logits=True` and the language model has one.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            Scores of the experts in every layer of a mixture of experts, when asked for.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


def _unpack_boxes(
    boxes: torch.Tensor | None, num_boxes: torch.Tensor | None, packed: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Read `image_position_ids` as boxes and their numbers, and raise `ValueError` if these are given too."""
    if packed is None:
        return boxes, num_boxes
    if boxes is not None or num_boxes is not None:
        raise ValueError("Pass either `boxes` and `num_boxes` or `image_position_ids`, which holds both, not all.")
    if packed.ndim != 3 or packed.shape[2] != 4:
        raise ValueError(
            f"`image_position_ids` must have shape (num_images, max_boxes, 4), got {tuple(packed.shape)}. Let the "
            "processor make them: `processor.packs_boxes = True`."
        )
    return packed.clamp(min=0), (packed >= 0).all(-1).sum(-1)


def _must_be_touched(modules: list[nn.Module]) -> bool:
    """Whether all processes must run these modules, also those without an image.

    So it is where their gradients are reduced together, and where each process holds a share of their weights, which
    all gather together (ZeRO-3, FSDP).
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return True
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in parameters) or any(
        is_fsdp_managed_module(module) for module in modules
    )


class _UnusedTokens(LogitsProcessor):
    """Rows of the embedding table that are no words are never generated, whatever generation config is passed."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids, dtype=torch.long)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids = self.ids[self.ids < scores.shape[-1]]  # some language models cut the padding off themselves
        return scores.index_fill(-1, ids.to(scores.device), -torch.inf)


def _keep(hidden_states: torch.FloatTensor, logits_to_keep: int | torch.Tensor) -> torch.FloatTensor:
    """Cut hidden states to the positions whose logits are wanted; those of a mask are one row."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep].unsqueeze(0)
        return torch.take_along_dim(hidden_states, logits_to_keep.unsqueeze(-1), dim=1)
    raise ValueError(
        "`logits_to_keep` must be a number of positions or a tensor of one or two dimensions, got shape "
        f"{tuple(logits_to_keep.shape)}."
    )


class MGLlavaPreTrainedModel(ImageTextPreTrainedModel):
    """Configuration, capabilities and initialization of all MG-LLaVA models."""

    config: MGLlavaConfig
    config_class = MGLlavaConfig
    # Each of these combines tensors of several sources, which must lie on one device.
    _no_split_modules = [
        "MGLlavaConvFusion",
        "MGLlavaPatchInfoMining",
        "MGLlavaResampler",
        "MGLlavaBoxProjector",
        "MGLlavaProjector",
        "MGLlavaCrossAttention",
    ]
    unquantized_modules = (
        "vision_tower",
        "high_res_vision_tower",
        "fusion",
        "multi_modal_projector",
        "box_projector",
        "object_attention",
    )
    modules_without_int8 = ("high_res_vision_tower",)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MGLlavaResampler):
            init.normal_(module.queries, std=0.02)


class MGLlavaModel(MGLlavaPreTrainedModel):
    """Vision towers, fusion, projectors and the language model, without the head."""

    def __init__(self, config: MGLlavaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        uses_boxes = config.object_merging != "none"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # Only the CLS token would pass through it, and nobody reads that.
        self.vision_tower.post_layernorm = nn.Identity()
        # The low-resolution baseline has no use for the second tower.
        self.high_res_vision_tower = None
        if uses_boxes or config.fusion_type != "none":
            self.high_res_vision_tower = MGLlavaHighResVisionModel(config.high_res_vision_config)
        self.fusion = FUSIONS[config.fusion_type](config)
        self.multi_modal_projector = MGLlavaProjector(self.fusion.output_size, config)
        self.box_projector = MGLlavaBoxProjector(config) if uses_boxes else None
        self.object_attention = None
        if config.object_merging in ("box_to_fused", "fused_to_box"):
            self.object_attention = MGLlavaCrossAttention(
                config.text_config.hidden_size,
                config.text_config.hidden_size,
                config.vision_config.hidden_size,
                config.vision_config.num_attention_heads,
            )
        # The model with a head brings the body of the same instance that its head comes from.
        self.language_model = language_model
        if language_model is None:
            self.language_model, _ = load_language_model(config.text_config).take_parts()
        self.post_init()

    def encode_images(
        self, pixel_values: torch.FloatTensor, boxes: torch.LongTensor, num_boxes: torch.LongTensor, **kwargs
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None, BaseModelOutputWithPooling]:
        """Run the vision flow: both towers, fusion, boxes and projectors. Shapes do not depend on values.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`):
                High-resolution images. The low-resolution ones are derived from them.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`):
                Boxes as x1, y1, x2, y2 in pixels of the high-resolution image; int64, int32, float32 or float64.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`):
                How many of the boxes of each image are real; the others are padding.
            **kwargs: Arguments of the low-resolution tower, such as `output_hidden_states`.

        Returns:
            The fused tokens, `(num_images, image_seq_length, hidden_size)`; the box tokens,
            `(num_images, max_boxes, hidden_size)` or `None` if the model has none; the output of the low-resolution
            tower.
        """
        # Bilinear, without antialiasing, in float32: what the towers were trained on (section 3.1).
        size = self.config.vision_config.image_size
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        low_res_pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        vision_outputs = self.vision_tower(low_res_pixels.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        low_res = vision_outputs.last_hidden_state[:, 1:]
        feature_maps = None
        if self.high_res_vision_tower is not None:
            feature_maps = self.high_res_vision_tower(pixel_values).feature_maps

        fused_tokens = self.multi_modal_projector(self.fusion(low_res, feature_maps))
        if self.box_projector is None:
            return fused_tokens, None, vision_outputs
        box_tokens = self.box_projector(feature_maps, boxes)
        if self.config.object_merging == "box_to_fused":
            box_tokens = box_tokens + self.object_attention(box_tokens, fused_tokens).to(box_tokens.device)
        elif self.config.object_merging == "fused_to_box":
            is_box = torch.arange(boxes.shape[1], device=boxes.device) < num_boxes.unsqueeze(1)
            attended = self.object_attention(fused_tokens, box_tokens, context_mask=is_box)
            return fused_tokens + attended.to(fused_tokens.device), None, vision_outputs
        return fused_tokens, box_tokens, vision_outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        boxes: torch.LongTensor | None = None,
        num_boxes: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images for the language model.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`):
                High-resolution images. The low-resolution ones are derived from them.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                Boxes as x1, y1, x2, y2 in pixels of the high-resolution image, zero-padded; int64 or int32 (as the
                processor makes them), float32 or float64. An image without objects has the single box
                `[0, 0, 0, 0]`, as in training. Only a model that uses no boxes does without.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                How many of the boxes of each image are real, at least 1. By default all are.
            **kwargs: `output_hidden_states` and `output_attentions` of the low-resolution tower; `return_dict=False`
                gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` holds the fused tokens, of shape
            `(num_images, image_seq_length, hidden_size)`; `pooler_output` is a list with what stands for each image in
            the prompt, fused tokens and then box tokens, `(image_seq_length + num_boxes[i], hidden_size)`;
            `hidden_states` and `attentions` are those of the low-resolution tower.

        Raises:
            ValueError: If the shapes of `pixel_values`, `boxes` and `num_boxes` do not fit each other or the
                configuration, or boxes are not finite or in a dtype that rounds them (such as bfloat16).
        """
        boxes, num_boxes = self._check_image_inputs(pixel_values, boxes, num_boxes)
        fused_tokens, box_tokens, vision_outputs = self.encode_images(pixel_values, boxes, num_boxes, **kwargs)
        tokens = list(fused_tokens)
        if box_tokens is not None:
            tokens = [
                torch.cat([fused, objects[:count].to(fused.device)])
                for fused, objects, count in zip(tokens, box_tokens, num_boxes.tolist(), strict=True)
            ]
        return BaseModelOutputWithPooling(
            last_hidden_state=fused_tokens,
            pooler_output=tokens,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
        )

    def _check_image_inputs(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor | None, num_boxes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Complete missing `boxes` and `num_boxes`, and raise `ValueError` for shapes that do not fit."""
        size = self.config.high_res_vision_config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"`pixel_values` must have shape (num_images, 3, {size}, {size}), got {tuple(pixel_values.shape)}. "
                "Prepare images with this model's own processor."
            )
        num_images = len(pixel_values)
        if boxes is None:
            # The one box of an image without objects has a placeholder of its own, so counting would not find this.
            if self.box_projector is not None:
                raise ValueError(
                    f"`boxes` must be given with `pixel_values`, got None for {num_images} image(s). Pass all that "
                    "the processor returned. An image without objects has one box, [0, 0, 0, 0]: "
                    f"`boxes=torch.zeros({num_images}, 1, 4, dtype=torch.int64)`. TRL's GRPOTrainer and RLOOTrainer "
                    "hand on only names that they know: set `processor.packs_boxes = True`."
                )
            boxes = pixel_values.new_zeros(num_images, 1, 4, dtype=torch.int64)
        if boxes.ndim != 3 or boxes.shape[0] != num_images or boxes.shape[1] == 0 or boxes.shape[2] != 4:
            raise ValueError(
                f"`boxes` must have shape (num_images, max_boxes, 4) with {num_images} images and at least one box, "
                f"got {tuple(boxes.shape)}. Pass x1, y1, x2, y2 in pixels of the {size}x{size} input, zero-padded."
            )
        if num_boxes is None:
            num_boxes = torch.full((num_images,), boxes.shape[1], device=boxes.device)
        check_box_dtype(boxes)
        if num_boxes.shape != (num_images,):
            raise ValueError(f"`num_boxes` must have shape ({num_images},), got {tuple(num_boxes.shape)}.")
        if num_boxes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"`num_boxes` must be int64 or int32, got {num_boxes.dtype}. Pass the processor's output as it is."
            )
        torch_compilable_check(
            ((num_boxes >= 1) & (num_boxes <= boxes.shape[1])).all(),
            lambda: (
                f"`num_boxes` must lie between 1 and the {boxes.shape[1]} rows of `boxes`, got {num_boxes.tolist()}. "
                "An image without objects has one box, [0, 0, 0, 0]."
            ),
        )
        if boxes.is_floating_point():
            torch_compilable_check(
                torch.isfinite(boxes).all(),
                lambda: (
                    "`boxes` must be finite, got NaN or infinity for image(s) "
                    f"{(~torch.isfinite(boxes).flatten(1).all(1)).nonzero().flatten().tolist()}."
                ),
            )
        return boxes.to(pixel_values.device), num_boxes.to(pixel_values.device)

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None
    ) -> torch.BoolTensor:
        """Tell which positions of prompts are placeholders.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Without them, placeholders are recognized by their embedding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Token embeddings.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length)`.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds.device)).all(-1)

    def vision_modules(self) -> list[nn.Module]:
        """List what images pass: towers, fusion, projectors.

        Returns:
            `list[nn.Module]`.
        """
        return [module for name, module in self.named_children() if name != "language_model"]

    def _with_gradient(self, inputs_embeds: torch.FloatTensor) -> torch.FloatTensor:
        """Let a loss of text alone have a gradient, zero, where only vision parameters are trained (stage 1)."""
        if not self.training or not torch.is_grad_enabled():
            return inputs_embeds
        if any(parameter.requires_grad for parameter in self.language_model.parameters()):
            return inputs_embeds
        parameters = (parameter for module in self.vision_modules() for parameter in module.parameters())
        trained = next((parameter for parameter in parameters if parameter.requires_grad), None)
        if trained is None:
            return inputs_embeds
        zero = torch.zeros((), dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        return inputs_embeds + zero * torch.nan_to_num(trained.flatten()[0]).to(inputs_embeds.device)

    def _check_no_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> None:
        """Raise `ValueError` where placeholders would be read as text."""
        if inputs_embeds.shape[1] == 1:
            return  # a step of generation, which never gives a placeholder
        mask = self.find_placeholders(input_ids, inputs_embeds)
        torch_compilable_check(
            ~mask.any(),
            lambda: (
                f"The prompt holds {int(mask.sum())} image placeholders, but no image: `pixel_values` and "
                "`mm_encoder_outputs` are missing. Pass all that the processor returned, or, if images are "
                "left out on purpose, write the prompt without `<image>`. With a cache that holds them already, pass "
                "only the ids that follow (chunked prefill works from transformers 5.24 on)."
            ),
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: list[torch.FloatTensor],
    ) -> torch.BoolTensor:
        """Find the placeholders that `image_features` take the place of.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Without them, placeholders are recognized by their embedding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Token embeddings.
            image_features (`list` of `torch.FloatTensor` of shape `(num_tokens, hidden_size)`):
                Embeddings of each image.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: If there are more or fewer placeholders than image embeddings.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        num_features = sum(len(features) for features in image_features)
        torch_compilable_check(
            mask.sum() == num_features,
            lambda: (
                f"The prompt holds {int(mask.sum())} image placeholders, but its {len(image_features)} image(s) give "
                f"{num_features} embeddings ({[len(features) for features in image_features]}). Prepare text, images "
                "and boxes in one call of the processor, and do not truncate inside an image."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        boxes: torch.LongTensor | None = None,
        num_boxes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MGLlavaModelOutputWithPast:
        """Embed text and images and run the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with one placeholder per image embedding. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier steps.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use in place of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`, *optional*):
                The images of the whole batch, in the order of their placeholders.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                Boxes as x1, y1, x2, y2 in pixels of `pixel_values`, zero-padded; int64 or int32 (as the processor
                makes them), float32 or float64. Ignored without `pixel_values`.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                How many of the boxes of each image are real. Ignored without `pixel_values`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, to use in place of `pixel_values`.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, by its name since transformers 5.24.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted and not used, so that all that the processor returns may be passed on; so is `box_labels`,
                among `kwargs`, since `Trainer` takes every argument with "label" in its name for labels.
            image_position_ids (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                `boxes` and `num_boxes` in one: boxes as x1, y1, x2, y2 in pixels of `pixel_values`, then rows of -1.
                For trainers that hand on only names that they know; the processor makes it with `packs_boxes`.
            **kwargs: Arguments of the language model, such as `use_cache` and `output_hidden_states`.

        Returns:
            `MGLlavaModelOutputWithPast`.

        Raises:
            ValueError: If inputs are missing, double, or do not fit each other.
        """
        cache = either_cache(past_key_values, cache)
        kwargs.pop("box_labels", None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        image_outputs = None if mm_encoder_outputs is None else mm_encoder_outputs.get("image")
        boxes, num_boxes = _unpack_boxes(boxes, num_boxes, image_position_ids)
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("Pass either `pixel_values` or `mm_encoder_outputs` with an image, not both.")
            image_outputs = self.get_image_features(pixel_values, boxes, num_boxes, return_dict=True)
        # Other processes may have images in their batches: then an empty image, for a zero, in the same place.
        is_unseen = image_outputs is None and cache is None and _must_be_touched(self.vision_modules())
        if is_unseen:
            device = input_ids.device if inputs_embeds is None else inputs_embeds.device
            size = self.config.high_res_vision_config.image_size
            pixels, no_box = torch.zeros(1, 3, size, size, device=device), torch.zeros(1, 1, 4, dtype=torch.int64)
            image_outputs = self.get_image_features(pixels, no_box, return_dict=True)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if is_unseen or image_outputs is None:
            self._check_no_placeholders(input_ids, inputs_embeds)
        if is_unseen:
            # Zero also where the empty image overflows.
            total = torch.nan_to_num(torch.cat(list(image_outputs.pooler_output)), posinf=0.0, neginf=0.0).sum()
            inputs_embeds = inputs_embeds + (0 * total).to(inputs_embeds.device, inputs_embeds.dtype)
        elif image_outputs is None:
            inputs_embeds = self._with_gradient(inputs_embeds)
        else:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_outputs.pooler_output)
            image_features = torch.cat(list(image_outputs.pooler_output))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return MGLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            image_outputs=None if is_unseen else image_outputs,
            router_logits=outputs.get("router_logits"),
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class MGLlavaForConditionalGeneration(MGLlavaPreTrainedModel, GenerationMixin):
    r"""MG-LLaVA with its language modeling head.

    Example:
    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import mgllava

    >>> model = AutoModel.from_pretrained("path/to/mg-llava-vicuna7b", device_map="auto", dtype="auto")
    >>> processor = AutoProcessor.from_pretrained("path/to/mg-llava-vicuna7b")
    >>> prompt = "USER: <image>\nWhat is on the table? ASSISTANT:"
    >>> boxes = [[[12, 40, 180, 220]]]  # one image, one box
    >>> inputs = processor("table.jpg", prompt, boxes=boxes, return_tensors="pt").to(model.device)
    >>> output = model.generate(**inputs, max_new_tokens=64)
    >>> answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MGLlavaConfig):
        super().__init__(config)
        self._head = load_language_model(config.text_config)
        language_model, lm_head = self._head.take_parts()
        self.model = MGLlavaModel(config, language_model)
        self.lm_head = lm_head
        self._tied_weights_keys = self._head.tied_weights_keys
        self._is_stateful = self._head.rest._is_stateful
        self.post_init()
        self.generation_config.suppress_tokens = config.unused_token_ids

    def get_output_embeddings(self) -> nn.Module:
        """Return the language modeling head."""
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        boxes: torch.LongTensor | None = None,
        num_boxes: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images for the language model: see [`MGLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, boxes, num_boxes, **kwargs)

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
        boxes: torch.LongTensor | None = None,
        num_boxes: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MGLlavaCausalLMOutputWithPast:
        """Score the next token, and compute the loss if `labels` are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with one placeholder per image embedding. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier steps.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where none. At placeholders, and where they are one, they count as -100.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`, *optional*):
                The images of the whole batch, in the order of their placeholders.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                Boxes as x1, y1, x2, y2 in pixels of `pixel_values`, zero-padded; int64 or int32 (as the processor
                makes them), float32 or float64. Ignored without `pixel_values`.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                How many of the boxes of each image are real. Ignored without `pixel_values`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only (0: all), for the positions in a 1-D tensor, for
                those of each row in an integer tensor of shape `(batch_size, num_positions)`, or for those where a
                boolean tensor of shape `(batch_size, sequence_length)` is true, flattened to `(num_true, vocab_size)`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, to use in place of `pixel_values`.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, by its name since transformers 5.24.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted and not used, so that all that the processor returns may be passed on; so is `box_labels`,
                among `kwargs`, since `Trainer` takes every argument with "label" in its name for labels.
            image_position_ids (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                `boxes` and `num_boxes` in one: boxes as x1, y1, x2, y2 in pixels of `pixel_values`, then rows of -1.
                For trainers that hand on only names that they know; the processor makes it with `packs_boxes`.
            **kwargs: Arguments of the language model, such as `use_cache` and `output_hidden_states`, and of the loss
                (`num_items_in_batch`).

        Returns:
            `MGLlavaCausalLMOutputWithPast`.

        Raises:
            ValueError: If inputs are missing, double, or do not fit each other.
        """
        kwargs.pop("box_labels", None)
        cache = either_cache(past_key_values, cache)
        if position_ids is not None and not self._head.takes_positions:
            raise ValueError(
                f"A language model of type {self.config.text_config.model_type!r} takes no `position_ids`: the "
                "positions of its tokens follow from `attention_mask`."
            )
        loss_arguments = {name: kwargs.pop(name) for name in _LOSS_ARGUMENTS if name in kwargs}
        seen = []

        def body(input_ids: torch.LongTensor | None = None, **arguments) -> MGLlavaModelOutputWithPast:
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                boxes=boxes,
                num_boxes=num_boxes,
                mm_encoder_outputs=mm_encoder_outputs,
                image_position_ids=image_position_ids,
                **{**arguments, "return_dict": True},
            )
            seen.append(outputs)
            kept = _keep(outputs.last_hidden_state, logits_to_keep)
            return MGLlavaModelOutputWithPast(**{**outputs, "last_hidden_state": kept})

        def loss_function(logits: torch.FloatTensor, *_, **__) -> torch.FloatTensor:
            return self._loss(logits, labels, input_ids, **loss_arguments)

        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            CACHE_NAME: cache,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        scored = self._head.score(self, body, loss_function, **arguments, **kwargs, return_dict=True)
        outputs, logits = seen[0], scored.logits
        if (
            isinstance(logits_to_keep, torch.Tensor)
            and logits_to_keep.ndim == 2
            and logits_to_keep.dtype == torch.bool
        ):
            logits = logits[0]
        return MGLlavaCausalLMOutputWithPast(
            loss=scored.loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            aux_loss=scored.get("aux_loss"),
            router_logits=outputs.router_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _loss(
        self, logits: torch.FloatTensor, labels: torch.LongTensor, input_ids: torch.LongTensor | None, **kwargs
    ) -> torch.FloatTensor:
        """Cross-entropy of the next token: over the original vocabulary, where it is not a placeholder."""
        placeholder = self.config.image_token_id
        if input_ids is not None:
            labels = labels.masked_fill(input_ids == placeholder, -100)
        labels = labels.masked_fill(labels == placeholder, -100)
        # What a trainer that splits sequences has shifted already stands in for `labels`.
        targets = labels
        if (shifted := kwargs.get("shift_labels")) is not None:
            targets = kwargs["shift_labels"] = shifted.masked_fill(shifted == placeholder, -100)
        # Where nothing is to be learned, the sum is 0 and so is the loss, not 0 / 0.
        if (count := kwargs.get("num_items_in_batch")) is not None:
            kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
        # Padding rows of the table are no words: with them in the sum the loss would not be the reference's.
        vocab_size = self.config.unpadded_vocab_size or self.config.text_config.vocab_size
        torch_compilable_check(
            ((targets < vocab_size) & (targets >= 0) | (targets == -100)).all(),
            lambda: (
                f"`labels` must be ids from 0 to {vocab_size - 1} or -100, got {int(targets.min())} to "
                f"{int(targets.max())}. Of the {self.config.text_config.vocab_size} rows of the table only the first "
                f"{vocab_size} are words: after adding tokens call `model.resize_token_embeddings(len(tokenizer))`, "
                "also if the table is long enough."
            ),
        )
        return self.loss_function(logits=logits[..., :vocab_size], labels=labels, vocab_size=vocab_size, **kwargs)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """Generate; the placeholder and the padding of the embedding table never, whatever is passed.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, which are better passed as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): How to generate.
            logits_processor (`LogitsProcessorList`, *optional*): Further rules.
            *args: See the base class.
            **kwargs:
                All that the processor returned, and see the base class. `image_position_ids` may take the place of
                `boxes` and `num_boxes`.

        Returns:
            `torch.LongTensor` or `ModelOutput`: Prompts and answers, as in the base class.

        Raises:
            ValueError: If inputs are missing, double, or do not fit each other.
            RuntimeError: If the installed transformers has renamed what this relies on.
        """
        if gone := [name for name in _GENERATION_HOOKS if not hasattr(GenerationMixin, name)]:
            raise RuntimeError(
                f"The installed transformers has no `GenerationMixin.{gone[0]}`, on which answers to images rely. "
                "Install an older release, or a newer one of mgllava."
            )
        kwargs.pop("box_labels", None)
        if (packed := kwargs.pop("image_position_ids", None)) is not None:
            kwargs["boxes"], kwargs["num_boxes"] = _unpack_boxes(kwargs.get("boxes"), kwargs.get("num_boxes"), packed)
        elif self.training and kwargs.get("boxes") is not None:
            logger.warning_once(
                "`generate` is called in training with `boxes`. TRL's GRPOTrainer and RLOOTrainer do not hand these "
                "on to the loss: set `processor.packs_boxes = True` before you train with them."
            )
        processors = LogitsProcessorList([*(logits_processor or ()), _UnusedTokens(self.config.unused_token_ids)])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs
    ) -> dict:
        """Prepare the arguments of `forward` for a step of generation, as the language model's own class does.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Ids so far.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings of the prompts, if they are given so.
            **kwargs: See the base class.

        Returns:
            `dict`: Arguments of `forward`.
        """
        rest = self._head.rest
        if type(rest).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
            prepare = super().prepare_inputs_for_generation
        else:
            prepare = self._head.stand_in(self).prepare_inputs_for_generation
        inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # Images go with the first step alone. But Phi-3 starts again from the whole prompt where its position
        # embeddings change, and an assistant has no first step.
        images = {name: kwargs[name] for name in _IMAGE_ARGUMENTS if kwargs.get(name) is not None}
        ids = inputs.get("input_ids")
        is_left_out = ids is not None and ids.shape[1] > 1 and not images.keys() <= inputs.keys()
        if is_left_out and (ids == self.config.image_token_id).any():
            inputs |= self._own_images(images)
        if not self._head.takes_positions:
            inputs.pop("position_ids", None)
        return inputs

    def _own_images(self, images: dict) -> dict:
        """Images as this model reads them: an assistant is given the features of the model that it assists."""
        features = (images.get("mm_encoder_outputs") or {}).get("image")
        width = self.config.text_config.hidden_size
        if features is None or features.pooler_output[0].shape[-1] == width:
            return images
        logger.warning_once(
            f"The images were encoded for a model whose layers are {features.pooler_output[0].shape[-1]} wide, not "
            f"{width} as in this one, which drafts without seeing them. The answer is the same, but takes longer."
        )
        blank = [tokens.new_zeros(len(tokens), width) for tokens in features.pooler_output]
        return {**images, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=blank)}}

    def create_masks_for_generate(self, *args, **kwargs) -> torch.Tensor | dict[str, torch.Tensor]:
        """Make attention masks for a cache of fixed size, as the language model's own class does.

        Args:
            *args: See `transformers.masking_utils.create_masks_for_generate`.
            **kwargs: See there.

        Returns:
            `torch.Tensor` or `dict`: The masks.
        """
        make = getattr(self._head.rest, "create_masks_for_generate", create_masks_for_generate)
        return make(*args, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        return type(self._head.rest)._supports_default_dynamic_cache()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        # Releases that do not encode images before the prefill repeat every tensor row by row. Images must instead be
        # repeated prompt by prompt, since a prompt may hold none or several.
        images = {}
        if expand_size > 1 and model_kwargs.get("pixel_values") is not None:
            names = ("pixel_values", "boxes", "num_boxes")
            images = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
            embeds = model_kwargs.get("inputs_embeds")  # `generate` then holds no ids
            is_placeholder = self.model.find_placeholders(input_ids if embeds is None else None, embeds)
            order = self._image_order(is_placeholder, images, expand_size)
            images = {name: tensor[order] for name, tensor in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _image_order(self, is_placeholder: torch.BoolTensor, images: dict, expand_size: int) -> list[int]:
        """Indices of the images of all prompts, each prompt's repeated `expand_size` times as a group."""
        num_boxes = images.get("num_boxes")
        if num_boxes is None:  # then all boxes are real
            boxes = images.get("boxes")
            num_boxes = torch.full((len(images["pixel_values"]),), 1 if boxes is None else boxes.shape[1])
        tokens = self.config.image_seq_length + self.config.num_tokens_per_box * num_boxes
        ends = tokens.cumsum(0).tolist()
        prompt_ends = is_placeholder.sum(-1).cumsum(0).tolist()
        groups, first = [], 0
        for prompt_end in prompt_ends:
            last = sum(end <= prompt_end for end in ends)
            groups += list(range(first, last)) * expand_size
            first = last
        return groups


__all__ = [
    "MGLlavaCausalLMOutputWithPast",
    "MGLlavaForConditionalGeneration",
    "MGLlavaModel",
    "MGLlavaModelOutputWithPast",
    "MGLlavaPreTrainedModel",
]
