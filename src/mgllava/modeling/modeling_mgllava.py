"""MG-LLaVA: three views of an image for one language model (arXiv 2406.17770)."""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .attention_mgllava import MGLlavaCrossAttention
from .cache_mgllava import CACHE_NAME, either_cache
from .configuration_mgllava import MGLlavaConfig
from .fusion_mgllava import FUSIONS, MGLlavaResampler
from .high_res_vision_mgllava import MGLlavaHighResVisionModel
from .projector_mgllava import MGLlavaProjector
from .quantization_mgllava import leave_unpackable_layers, with_skipped_modules
from .regions_mgllava import MGLlavaBoxProjector, check_box_dtype

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a repository is.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class MGLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `MGLlavaForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the next token over the original vocabulary, when `labels` are given.
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
    """

    image_hidden_states: torch.FloatTensor | None = None


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


def _is_distributed() -> bool:
    """Whether this is one of several processes, which may share the parameters out among them (FSDP, ZeRO-3)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class MGLlavaPreTrainedModel(PreTrainedModel):
    """What all MG-LLaVA models share: configuration, capabilities, initialization."""

    config: MGLlavaConfig
    config_class = MGLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Each of these meets tensors of several sources, which must lie on one device.
    _no_split_modules = [
        "MGLlavaConvFusion",
        "MGLlavaPatchInfoMining",
        "MGLlavaResampler",
        "MGLlavaBoxProjector",
        "MGLlavaProjector",
        "MGLlavaCrossAttention",
    ]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs
    ) -> "MGLlavaPreTrainedModel":
        """Load a model; a `quantization_config` that names no modules to skip quantizes the language model alone.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository id.
            *model_args: See the base class.
            **kwargs: See the base class.

        Returns:
            `MGLlavaPreTrainedModel`: The model, in evaluation mode.
        """
        quantization_config = kwargs.get("quantization_config")
        if quantization_config is not None:
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                location = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **location)
            # What is stored quantized knows its own list, which a list given here could overrule.
            if getattr(config, "quantization_config", None) is None:
                kwargs["quantization_config"] = with_skipped_modules(quantization_config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        leave_unpackable_layers(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def post_init(self):
        """Initialize the weights, and note what this variant of the model consists of."""
        super().post_init()
        # FSDP refuses to start where one of these names is not that of a module.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # transformers passes by modules of outside packages that own no parameter themselves, so what a block wants
        # for its layers is noted on the layers.
        initialization = getattr(module, "initialization", None)
        if initialization == "xavier_uniform":
            init.xavier_uniform_(module.weight)
        elif initialization == "zeros":
            init.zeros_(module.weight)
        elif isinstance(module, MGLlavaResampler):
            init.normal_(module.queries, std=0.02)


class MGLlavaModel(MGLlavaPreTrainedModel):
    """Vision towers, fusion, projectors and the language model, without the head."""

    def __init__(self, config: MGLlavaConfig):
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
        self.language_model = AutoModel.from_config(config.text_config)
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
                processor makes them), float32 or float64. Without them, each image has the single box
                `[0, 0, 0, 0]`, as in training on images without objects.
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
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

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
            if boxes is None and self.box_projector is not None and self.training and torch.is_grad_enabled():
                raise ValueError(
                    "`boxes` must be given with `pixel_values` in training, got None: whoever made this batch lost "
                    "them. TRL's GRPOTrainer and RLOOTrainer hand on only names that they know: set "
                    "`processor.packs_boxes = True`. An image without objects has one box, [0, 0, 0, 0]."
                )
            if image_outputs is not None:
                raise ValueError("Pass either `pixel_values` or `mm_encoder_outputs` with an image, not both.")
            image_outputs = self.get_image_features(pixel_values, boxes, num_boxes, return_dict=True)
        # Other processes may have images in their batches. Where parameters are gathered or their gradients reduced
        # together, all processes must touch the same ones in the same order: here an empty image, for a zero.
        is_unseen = image_outputs is None and cache is None and (self.training or _is_distributed())
        if is_unseen:
            device = input_ids.device if inputs_embeds is None else inputs_embeds.device
            size = self.config.high_res_vision_config.image_size
            image_outputs = self.get_image_features(torch.zeros(1, 3, size, size, device=device), return_dict=True)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if is_unseen:
            total = torch.cat(list(image_outputs.pooler_output)).sum()
            inputs_embeds = inputs_embeds + (0 * total).to(inputs_embeds.device, inputs_embeds.dtype)
        elif image_outputs is not None:
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
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
    >>> inputs = processor("table.jpg", prompt, boxes=[[[12, 40, 180, 220]]]).to(model.device)
    >>> output = model.generate(**inputs, max_new_tokens=64)
    >>> processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MGLlavaConfig):
        super().__init__(config)
        self.model = MGLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.suppress_tokens = config.unused_token_ids

    @classmethod
    def from_pretrained_parts(
        cls,
        llm: str | os.PathLike,
        vision_tower: str | os.PathLike,
        high_res_tower: str | os.PathLike,
        *,
        image_token_id: int | None = None,
        dtype: torch.dtype | str = "auto",
        **kwargs,
    ) -> "MGLlavaForConditionalGeneration":
        r"""Put a model together from trained parts; fusion and projectors are random, as stage 1 starts.

        The embedding table gets rows for the placeholder, up to a multiple of 64.

        Example:
        ```python
        >>> model = MGLlavaForConditionalGeneration.from_pretrained_parts(
        ...     llm="lmsys/vicuna-7b-v1.5",
        ...     vision_tower="openai/clip-vit-large-patch14-336",
        ...     high_res_tower="laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        ... )
        ```

        Args:
            llm (`str` or `os.PathLike`): Folder or Hub id of a causal language model.
            vision_tower (`str` or `os.PathLike`): Folder or Hub id of a CLIP model or of its vision tower.
            high_res_tower (`str` or `os.PathLike`): Folder or Hub id of an open_clip model with a ConvNeXt.
            image_token_id (`int`, *optional*):
                Id of the placeholder. By default that of `<image>` in the language model's tokenizer or, if it has
                none, the next free one, which `tokenizer.add_tokens` gives it.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
                Of all weights; `"auto"`: that of the language model.
            **kwargs:
                `high_res_image_size` (768 by default) and arguments of [`MGLlavaConfig`], such as `fusion_type`;
                `cache_dir`, `local_files_only` and `token` for downloads.

        Returns:
            `MGLlavaForConditionalGeneration`: The model, in evaluation mode.

        Raises:
            ValueError: If a part is none of these, lacks weights, or the parts do not fit together.
            OSError: If a part cannot be read.
        """
        location = {name: kwargs.pop(name) for name in ("cache_dir", "local_files_only", "token") if name in kwargs}
        options = {**location, "output_loading_info": True}
        language_model, loaded = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, **options)
        if loaded["missing_keys"]:
            raise ValueError(f"`llm`: {llm} lacks the weights {sorted(loaded['missing_keys'])[:5]}.")
        dtype = language_model.dtype
        tower, loaded = CLIPVisionModel.from_pretrained(vision_tower, dtype=dtype, **options)
        if loaded["missing_keys"]:
            raise ValueError(f"`vision_tower`: {vision_tower} lacks the weights {sorted(loaded['missing_keys'])[:5]}.")
        # Layer -2 is what the model reads.
        del tower.encoder.layers[-1]
        tower.config.num_hidden_layers -= 1
        tower.post_layernorm = nn.Identity()
        high_res_size = kwargs.pop("high_res_image_size", 768)
        high_res = MGLlavaHighResVisionModel.from_open_clip(high_res_tower, high_res_size, dtype, **location)

        if image_token_id is None:
            tokenizer = AutoTokenizer.from_pretrained(llm, **location)
            image_token_id = tokenizer.get_vocab().get("<image>", len(tokenizer))
        rows = language_model.config.vocab_size
        language_model.resize_token_embeddings(
            max(rows, image_token_id + 1), pad_to_multiple_of=64, mean_resizing=False
        )
        text_config = copy.deepcopy(language_model.config)
        text_config.name_or_path = ""
        config = cls.config_class(
            text_config=text_config,
            vision_config=tower.config,
            high_res_vision_config=high_res.config,
            image_token_id=image_token_id,
            unpadded_vocab_size=rows,
            dtype=dtype,
            **kwargs,
        )
        # Without memory: nearly all of it is there already.
        with torch.device("meta"):
            model = cls(config)
        model.lm_head = language_model.get_output_embeddings()
        parts = model.model
        parts.language_model, parts.vision_tower = language_model.base_model, tower
        if parts.high_res_vision_tower is not None:
            parts.high_res_vision_tower = high_res
        for part in (parts.fusion, parts.multi_modal_projector, parts.box_projector, parts.object_attention):
            if part is not None:
                for module in part.to_empty(device="cpu").to(dtype).modules():
                    model._init_weights(module)
        model.tie_weights()
        return model.eval()

    def get_output_embeddings(self) -> nn.Module:
        """Return the language modeling head."""
        return self.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the embedding table; all of the first `new_num_tokens` rows count as vocabulary from then on.

        Args:
            new_num_tokens (`int`, *optional*): New number of tokens.
            pad_to_multiple_of (`int`, *optional*): Add rows until the table is a multiple of this.
            mean_resizing (`bool`, *optional*, defaults to `True`): Start new rows from the mean of the old.

        Returns:
            `nn.Embedding`: the table.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            self.config.unpadded_vocab_size = new_num_tokens
            self.generation_config.suppress_tokens = self.config.unused_token_ids
        return embeddings

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
                Compute logits for the last so many positions only (0: all), or for the positions in a 1-D tensor.
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
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            boxes=boxes,
            num_boxes=num_boxes,
            mm_encoder_outputs=mm_encoder_outputs,
            image_position_ids=image_position_ids,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            placeholder = self.config.image_token_id
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == placeholder, -100)
            labels = labels.masked_fill(labels == placeholder, -100)
            # What a trainer that splits sequences has shifted already stands in for `labels`.
            if (shifted := kwargs.get("shift_labels")) is not None:
                kwargs["shift_labels"] = shifted.masked_fill(shifted == placeholder, -100)
            # Where nothing is to be learned, the sum is 0 and so is the loss, not 0 / 0.
            if (count := kwargs.get("num_items_in_batch")) is not None:
                kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
            # Padding rows of the table are no words: with them in the sum the loss would not be the reference's.
            vocab_size = self.config.unpadded_vocab_size or self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits[..., :vocab_size], labels=labels, vocab_size=vocab_size, **kwargs)
        return MGLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def generate(self, *args, **kwargs):
        """Generate ids, see the base class; `image_position_ids` may take the place of `boxes` and `num_boxes`.

        Args:
            *args: See the base class.
            **kwargs: See the base class.

        Returns:
            As the base class.

        Raises:
            ValueError: If `boxes` and `image_position_ids` are given.
        """
        kwargs.pop("box_labels", None)
        if (packed := kwargs.pop("image_position_ids", None)) is not None:
            kwargs["boxes"], kwargs["num_boxes"] = _unpack_boxes(kwargs.get("boxes"), kwargs.get("num_boxes"), packed)
        elif self.training and kwargs.get("boxes") is not None:
            logger.warning_once(
                "`generate` is called in training with `boxes`. TRL's GRPOTrainer and RLOOTrainer do not hand these "
                "on to the loss: set `processor.packs_boxes = True` before you train with them."
            )
        return super().generate(*args, **kwargs)

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
        num_boxes = images.get("num_boxes", torch.ones(len(images["pixel_values"])))
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
