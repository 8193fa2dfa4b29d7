"""Models of MG-LLaVA (arXiv 2406.17770)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModel, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .configuration_mgllava import MGLlavaConfig
from .language_model_common import (
    ImageTextCausalLMOutputWithPast,
    ImageTextForConditionalGeneration,
    ImageTextModel,
    ImageTextModelOutputWithPast,
    must_be_touched,
)
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


@dataclass
class MGLlavaModelOutputWithPast(ImageTextModelOutputWithPast):
    """Output of `MGLlavaModel`.

    Attributes:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the language model's last layer.
        cache (`Cache`, *optional*):
            The KV cache, with `use_cache=True`. Its name is `past_key_values` before transformers 5.24.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            With `output_hidden_states=True`: output of the embeddings and of every layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            With `output_attentions=True`: attention weights of every layer.
        image_hidden_states (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*):
            Embeddings of the images: for each image its fused tokens, then its box tokens.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of `get_image_features`.
        video_hidden_states (`torch.FloatTensor` of shape `(num_video_placeholders, hidden_size)`, *optional*):
            Embeddings of the videos: for each frame its fused tokens, then its box tokens.
        video_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of `get_video_features`.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            With `output_router_logits=True`: scores of the experts in every layer of a mixture of experts.
    """

    video_hidden_states: torch.FloatTensor | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MGLlavaCausalLMOutputWithPast(ImageTextCausalLMOutputWithPast):
    """Output of `MGLlavaForConditionalGeneration`.

    It also has all fields of [`MGLlavaModelOutputWithPast`] except `last_hidden_state`.

    Attributes:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `labels`: cross-entropy of the next token over the original vocabulary, plus what the class of the
            language model adds, such as `aux_loss`.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of every row of the embedding table, including `config.unused_token_ids`.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `output_router_logits=True`: the language model's load-balancing loss of its experts.
    """

    video_hidden_states: torch.FloatTensor | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


# Arguments of `forward` that hold the tensors of videos, and how errors name them.
_VIDEO_ARGUMENTS = (
    "pixel_values_videos",
    "low_res_pixel_values_videos",
    "video_boxes",
    "num_video_boxes",
    "num_video_frames",
)
_VIDEO_NAMES = ("frame", "pixel_values_videos", "video_boxes", "num_video_boxes")


def _drop_unused(kwargs: dict) -> None:
    """Remove what the processor may return in addition to the model's inputs."""
    for name in ("box_labels", "video_box_labels", "video_metadata"):
        kwargs.pop(name, None)


def _unpack_boxes(
    boxes: torch.Tensor | None, num_boxes: torch.Tensor | None, packed: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Split `image_position_ids` into `boxes` and `num_boxes`; raise `ValueError` if these are given too."""
    if packed is None:
        return boxes, num_boxes
    if boxes is not None or num_boxes is not None:
        raise ValueError(
            "Pass either `boxes` and `num_boxes`, or `image_position_ids`, which holds both. Got all of them."
        )
    if packed.ndim != 3 or packed.shape[2] != 4:
        raise ValueError(
            f"`image_position_ids` must have shape (num_images, max_boxes, 4), got {tuple(packed.shape)}. Set "
            "`processor.packs_boxes = True`, and pass what the processor returns."
        )
    return packed.clamp(min=0), (packed >= 0).all(-1).sum(-1)


class MGLlavaPreTrainedModel(ImageTextPreTrainedModel):
    """Configuration, capabilities and initialization of all MG-LLaVA models."""

    config: MGLlavaConfig
    config_class = MGLlavaConfig
    input_modalities = ("image", "video", "text")
    # The inputs of each of these modules come from several modules, and must be on one device.
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


class MGLlavaModel(MGLlavaPreTrainedModel, ImageTextModel):
    """Vision towers, fusion, projectors and the language model, without the head."""

    output_class = MGLlavaModelOutputWithPast

    def __init__(self, config: MGLlavaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        uses_boxes = config.object_merging != "none"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # It is applied to the CLS token only, which is not used.
        self.vision_tower.post_layernorm = nn.Identity()
        # The low-resolution baseline does not need the second tower.
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
        self.add_language_model(language_model)

    def dummy_images(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the inputs of one black image with the zero box; see [`ImageTextModel`]."""
        size = self.config.high_res_vision_config.image_size
        no_box = torch.zeros(1, 1, 4, dtype=torch.int64)
        return {"pixel_values": torch.zeros(1, 3, size, size, device=device), "boxes": no_box}

    def encode_images(
        self,
        pixel_values: torch.FloatTensor,
        boxes: torch.LongTensor,
        num_boxes: torch.LongTensor,
        low_res_pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None, BaseModelOutputWithPooling]:
        """Run both towers, fusion, box pooling and projectors. Shapes do not depend on the values of tensors.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`):
                High-resolution images, or frames of videos.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`):
                Boxes as x1, y1, x2, y2 in pixels of the high-resolution image; int64, int32, float32 or float64.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`):
                Number of boxes of each image; the rows of `boxes` after them are padding.
            low_res_pixel_values (`torch.FloatTensor`, *optional*):
                Low-resolution images of shape `(num_images, 3, low_res_size, low_res_size)`. By default they are made
                from the high-resolution images.
            **kwargs: Arguments of the low-resolution tower, such as `output_hidden_states`.

        Returns:
            The fused tokens, `(num_images, image_seq_length, hidden_size)`; the box tokens,
            `(num_images, max_boxes, hidden_size)` or `None` if the model has none; the output of the low-resolution
            tower.
        """
        if low_res_pixel_values is None:
            low_res_pixel_values = self._low_res_images(pixel_values)
        low_res_pixels = low_res_pixel_values.to(self.vision_tower.dtype)
        vision_outputs = self.vision_tower(low_res_pixels, return_dict=True, **kwargs)
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

    def _low_res_images(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """Make low-resolution images: bilinear, without antialiasing, in float32, as in training (section 3.1)."""
        size = self.config.vision_config.image_size
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)

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
                High-resolution images. The low-resolution images are made from them.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                Boxes as x1, y1, x2, y2 in pixels of the high-resolution image, zero-padded; int64 (from the
                processor), int32, float32 or float64. An image without objects has the single box `[0, 0, 0, 0]`, as
                in training. Required unless the model uses no boxes.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Number of boxes of each image, at least 1; the rows of `boxes` after them are padding. By default
                `boxes` has no padding.
            **kwargs: `output_hidden_states` and `output_attentions` of the low-resolution tower; `return_dict=False`
                gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` holds the fused tokens, of shape
            `(num_images, image_seq_length, hidden_size)`; `pooler_output` lists the embeddings that replace the
            placeholders of each image, fused tokens and then box tokens,
            `(image_seq_length + num_boxes[i], hidden_size)`;
            `hidden_states` and `attentions` are those of the low-resolution tower.

        Raises:
            ValueError: If the shapes of `pixel_values`, `boxes` and `num_boxes` do not match each other or the
                configuration, or boxes are not finite, or in a dtype that rounds them (such as bfloat16).
        """
        boxes, num_boxes = self._check_image_inputs(pixel_values, boxes, num_boxes)
        return self._join_tokens(*self.encode_images(pixel_values, boxes, num_boxes, **kwargs), num_boxes)

    @staticmethod
    def _join_tokens(
        fused_tokens: torch.Tensor,
        box_tokens: torch.Tensor | None,
        vision_outputs: BaseModelOutputWithPooling,
        num_boxes: torch.Tensor,
    ) -> BaseModelOutputWithPooling:
        """Put the box tokens of each image after its fused tokens."""
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

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        low_res_pixel_values_videos: torch.FloatTensor,
        video_boxes: torch.LongTensor | None = None,
        num_video_boxes: torch.LongTensor | None = None,
        num_video_frames: torch.LongTensor | None = None,
        frames_per_step: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed videos for the language model: each frame like an image, one after the other.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(total_frames, 3, image_size, image_size)`):
                High-resolution frames of all videos, one video after the other.
            low_res_pixel_values_videos (`torch.FloatTensor` of shape `(total_frames, 3, low_res_size, low_res_size)`):
                The same frames, resized from the original ones as well. They cannot be made from the others.
            video_boxes (`torch.LongTensor` of shape `(total_frames, max_boxes, 4)`, *optional*):
                Boxes of each frame, like `boxes` in [`MGLlavaModel.get_image_features`]. Required unless the model
                uses no boxes.
            num_video_boxes (`torch.LongTensor` of shape `(total_frames,)`, *optional*):
                Number of boxes of each frame, at least 1. By default `video_boxes` has no padding.
            num_video_frames (`torch.LongTensor` of shape `(num_videos,)`, *optional*):
                Number of frames of each video. By default all frames are of one video.
            frames_per_step (`int`, *optional*):
                Number of frames that pass the towers at a time. By default that of the configuration.
            **kwargs: `output_hidden_states` and `output_attentions` of the low-resolution tower; `return_dict=False`
                gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` holds the fused tokens, of shape
            `(total_frames, image_seq_length, hidden_size)`; `pooler_output` lists the embeddings that replace the
            placeholders of each video, frame by frame its fused tokens and then its box tokens; `hidden_states` and
            `attentions` are those of the low-resolution tower.

        Raises:
            ValueError: If the model takes no videos, or shapes, dtypes or values of the arguments do not match each
                other or the configuration.
        """
        self._check_modalities(["video"])
        low_res, boxes, num_boxes, counts = self._check_video_inputs(
            pixel_values_videos, low_res_pixel_values_videos, video_boxes, num_video_boxes, num_video_frames
        )
        limit = self.config.frames_per_step if frames_per_step is None else frames_per_step
        if limit is not None and limit < 1:
            raise ValueError(f"`frames_per_step` must be a positive number, got {limit}.")
        limit = limit or len(boxes)
        steps = []
        for first in range(0, len(boxes), limit):
            rows = slice(first, first + limit)
            encoded = self.encode_images(
                pixel_values_videos[rows], boxes[rows], num_boxes[rows], low_res[rows], **kwargs
            )
            steps.append(self._join_tokens(*encoded, num_boxes[rows]))
        return self._join_frames(steps, counts)

    @staticmethod
    def _join_frames(steps: list[BaseModelOutputWithPooling], counts: list[int]) -> BaseModelOutputWithPooling:
        """Join the features of frames from one or more steps, those of each video in one tensor."""
        frames = [tokens for step in steps for tokens in step.pooler_output]
        videos = []
        for count in counts:
            videos.append(torch.cat(frames[:count]))
            frames = frames[count:]
        layers = {}
        for name in ("hidden_states", "attentions"):
            given = [step[name] for step in steps if step.get(name) is not None]
            layers[name] = tuple(map(torch.cat, zip(*given, strict=True))) if given else None
        fused_tokens = torch.cat([step.last_hidden_state for step in steps])
        return BaseModelOutputWithPooling(last_hidden_state=fused_tokens, pooler_output=videos, **layers)

    def encode_inputs(self, inputs: dict[str, dict]) -> dict[str, BaseModelOutputWithPooling]:
        """Encode images and videos; see [`ImageTextModel`]."""
        # Other processes wait for this one in each module that they share with it, so each module must run once,
        # however many images and frames there are.
        if "video" not in inputs or not must_be_touched(self.vision_modules()):
            return super().encode_inputs(inputs)
        videos = inputs["video"]
        pixels = videos["pixel_values_videos"]
        low_res, boxes, num_boxes, counts = self._check_video_inputs(
            pixels, *(videos.get(name) for name in _VIDEO_ARGUMENTS[1:])
        )
        num_images = 0
        if "image" in inputs:
            images = inputs["image"]["pixel_values"]
            num_images, pixels = len(images), torch.cat([images, pixels.to(images.dtype)])
            low_res = torch.cat([self._low_res_images(images), low_res.to(images.device)])
            image_boxes, image_counts = self._check_image_inputs(**inputs["image"])
            most = max(image_boxes.shape[1], boxes.shape[1])
            boxes = torch.cat([F.pad(rows, (0, 0, 0, most - rows.shape[1])) for rows in (image_boxes, boxes)])
            num_boxes = torch.cat([image_counts, num_boxes])
        encoded = self._join_tokens(*self.encode_images(pixels, boxes, num_boxes, low_res), num_boxes)
        outputs = {}
        for modality, rows in (("image", slice(0, num_images)), ("video", slice(num_images, None))):
            if modality in inputs:
                outputs[modality] = BaseModelOutputWithPooling(
                    last_hidden_state=encoded.last_hidden_state[rows], pooler_output=encoded.pooler_output[rows]
                )
        outputs["video"] = self._join_frames([outputs["video"]], counts)
        return outputs

    def _check_video_inputs(
        self,
        pixel_values: torch.Tensor,
        low_res_pixel_values: torch.Tensor | None,
        boxes: torch.Tensor | None,
        num_boxes: torch.Tensor | None,
        num_frames: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """Check the arguments of `get_video_features`, and return all but the first, complete."""
        boxes, num_boxes = self._check_image_inputs(pixel_values, boxes, num_boxes, _VIDEO_NAMES)
        total, size = len(pixel_values), self.config.vision_config.image_size
        if low_res_pixel_values is None or low_res_pixel_values.shape != (total, 3, size, size):
            given = "None" if low_res_pixel_values is None else tuple(low_res_pixel_values.shape)
            raise ValueError(
                f"`low_res_pixel_values_videos` must have shape ({total}, 3, {size}, {size}), got {given}. Pass all "
                "that the processor returned: these frames cannot be made from `pixel_values_videos`."
            )
        counts = [total] if num_frames is None else num_frames.tolist()
        if sum(counts) != total or min(counts, default=0) < 1:
            raise ValueError(
                f"`num_video_frames` must hold the number of frames of each video, {total} in all, got {counts}."
            )
        return low_res_pixel_values.to(pixel_values.device), boxes, num_boxes, counts

    def _check_image_inputs(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor | None = None,
        num_boxes: torch.Tensor | None = None,
        names: tuple[str, str, str, str] = ("image", "pixel_values", "boxes", "num_boxes"),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill in missing boxes and their counts, and raise `ValueError` for wrong shapes, dtypes and values.

        `names` are those of one item and of the arguments, for errors.
        """
        item, pixels_name, boxes_name, counts_name = names
        size = self.config.high_res_vision_config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size) or len(pixel_values) == 0:
            raise ValueError(
                f"`{pixels_name}` must have shape (num_{item}s, 3, {size}, {size}), got {tuple(pixel_values.shape)}. "
                f"Prepare {item}s with this model's own processor."
            )
        num_images = len(pixel_values)
        if boxes is None:
            # An image without objects has a box too, and its placeholder: counting placeholders would not find this.
            if self.box_projector is not None:
                advice = (
                    ""
                    if item != "image"
                    else (
                        " TRL's GRPOTrainer and RLOOTrainer pass on only arguments that they know: set "
                        "`processor.packs_boxes = True`."
                    )
                )
                raise ValueError(
                    f"`{boxes_name}` must be given with `{pixels_name}`, got None for {num_images} {item}(s). Pass "
                    f"all that the processor returned. One without objects has one box, [0, 0, 0, 0]: "
                    f"`{boxes_name}=torch.zeros({num_images}, 1, 4, dtype=torch.int64)`.{advice}"
                )
            boxes = pixel_values.new_zeros(num_images, 1, 4, dtype=torch.int64)
        if boxes.ndim != 3 or boxes.shape[0] != num_images or boxes.shape[1] == 0 or boxes.shape[2] != 4:
            raise ValueError(
                f"`{boxes_name}` must have shape (num_{item}s, max_boxes, 4) with {num_images} {item}s and at least "
                f"one box, got {tuple(boxes.shape)}. Pass x1, y1, x2, y2 in pixels of the {size}x{size} input, "
                "zero-padded."
            )
        if num_boxes is None:
            num_boxes = torch.full((num_images,), boxes.shape[1], device=boxes.device)
        check_box_dtype(boxes)
        if num_boxes.shape != (num_images,):
            raise ValueError(f"`{counts_name}` must have shape ({num_images},), got {tuple(num_boxes.shape)}.")
        if num_boxes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"`{counts_name}` must be int64 or int32, got {num_boxes.dtype}. Pass the processor's output "
                "unchanged."
            )
        torch_compilable_check(
            ((num_boxes >= 1) & (num_boxes <= boxes.shape[1])).all(),
            lambda: (
                f"`{counts_name}` must lie between 1 and the {boxes.shape[1]} rows of `{boxes_name}`, got "
                f"{num_boxes.tolist()}. One without objects has one box, [0, 0, 0, 0]."
            ),
        )
        if boxes.is_floating_point():
            torch_compilable_check(
                torch.isfinite(boxes).all(),
                lambda: (
                    f"`{boxes_name}` must be finite, got NaN or infinity for {item}(s) "
                    f"{(~torch.isfinite(boxes).flatten(1).all(1)).nonzero().flatten().tolist()}."
                ),
            )
        return boxes.to(pixel_values.device), num_boxes.to(pixel_values.device)

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
        pixel_values_videos: torch.FloatTensor | None = None,
        low_res_pixel_values_videos: torch.FloatTensor | None = None,
        video_boxes: torch.LongTensor | None = None,
        num_video_boxes: torch.LongTensor | None = None,
        num_video_frames: torch.LongTensor | None = None,
        **kwargs,
    ) -> MGLlavaModelOutputWithPast:
        """Embed text and images and run the language model.

        For the arguments see [`MGLlavaForConditionalGeneration.forward`], except `labels` and `logits_to_keep`.
        """
        _drop_unused(kwargs)
        boxes, num_boxes = _unpack_boxes(boxes, num_boxes, image_position_ids)
        arguments = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": either_cache(past_key_values, cache),
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        images = {"pixel_values": pixel_values, "boxes": boxes, "num_boxes": num_boxes}
        videos = {
            "pixel_values_videos": pixel_values_videos,
            "low_res_pixel_values_videos": low_res_pixel_values_videos,
            "video_boxes": video_boxes,
            "num_video_boxes": num_video_boxes,
            "num_video_frames": num_video_frames,
        }
        return self.embed_and_run(images, arguments, videos, **kwargs)


class MGLlavaForConditionalGeneration(MGLlavaPreTrainedModel, ImageTextForConditionalGeneration):
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

    body_class = MGLlavaModel
    output_class = MGLlavaCausalLMOutputWithPast
    image_arguments = ("pixel_values", "boxes", "num_boxes")
    video_arguments = _VIDEO_ARGUMENTS

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        low_res_pixel_values_videos: torch.FloatTensor,
        video_boxes: torch.LongTensor | None = None,
        num_video_boxes: torch.LongTensor | None = None,
        num_video_frames: torch.LongTensor | None = None,
        frames_per_step: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed videos for the language model: see [`MGLlavaModel.get_video_features`]."""
        return self.model.get_video_features(
            pixel_values_videos,
            low_res_pixel_values_videos,
            video_boxes,
            num_video_boxes,
            num_video_frames,
            frames_per_step,
            **kwargs,
        )

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
        pixel_values_videos: torch.FloatTensor | None = None,
        low_res_pixel_values_videos: torch.FloatTensor | None = None,
        video_boxes: torch.LongTensor | None = None,
        num_video_boxes: torch.LongTensor | None = None,
        num_video_frames: torch.LongTensor | None = None,
        **kwargs,
    ) -> MGLlavaCausalLMOutputWithPast:
        """Compute the logits of the next token, and the loss if `labels` are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with one placeholder per image embedding. Pass either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                The KV cache of earlier steps.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict; -100 where there is none. Labels at placeholders and labels that are placeholders count
                as -100.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`, *optional*):
                The images of the whole batch, in the order of their placeholders.
            boxes (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                Boxes as x1, y1, x2, y2 in pixels of `pixel_values`, zero-padded; int64 (from the processor), int32,
                float32 or float64. Ignored without `pixel_values`.
            num_boxes (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Number of boxes of each image; the rows of `boxes` after them are padding. Ignored without
                `pixel_values`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions to compute logits for. A number: the last positions (0: all). A 1-D tensor: these positions
                of every row. An integer tensor `(batch_size, num_positions)`: these positions of each row. A boolean
                tensor `(batch_size, sequence_length)`: where it is true; the logits are `(num_true, vocab_size)`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features, "video": output of get_video_features}`, to use instead of
                `pixel_values` and `pixel_values_videos`.
            cache (`Cache`, *optional*):
                `past_key_values` by the name that it has since transformers 5.24.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted but not used, so that the processor's whole output can be passed. The same holds for
                `box_labels` and `video_metadata`, which are taken from `kwargs`, since `Trainer` treats each argument
                in the signature with "label" in its name as labels.
            image_position_ids (`torch.LongTensor` of shape `(num_images, max_boxes, 4)`, *optional*):
                `boxes` and `num_boxes` in one tensor: boxes as x1, y1, x2, y2 in pixels of `pixel_values`, padded with
                rows of -1. For trainers that pass on only arguments that they know; the processor returns it with
                `packs_boxes`.
            pixel_values_videos (`torch.FloatTensor` of shape `(total_frames, 3, image_size, image_size)`, *optional*):
                Frames of the videos of the whole batch, in the order of their placeholders.
            low_res_pixel_values_videos (`torch.FloatTensor`, *optional*):
                The same frames for the low-resolution tower, `(total_frames, 3, low_res_size, low_res_size)`.
            video_boxes (`torch.LongTensor` of shape `(total_frames, max_boxes, 4)`, *optional*):
                Boxes of each frame, like `boxes`. This and the other arguments of videos are ignored without
                `pixel_values_videos`.
            num_video_boxes (`torch.LongTensor` of shape `(total_frames,)`, *optional*):
                Number of boxes of each frame; the rows of `video_boxes` after them are padding.
            num_video_frames (`torch.LongTensor` of shape `(num_videos,)`, *optional*):
                Number of frames of each video. By default all frames are of one video.
            **kwargs: Arguments of the language model, such as `use_cache` and `output_hidden_states`, and of the loss
                (`num_items_in_batch`).

        Returns:
            `MGLlavaCausalLMOutputWithPast`.

        Raises:
            ValueError: If inputs are missing, given twice, or inconsistent.
        """
        _drop_unused(kwargs)
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
            "boxes": boxes,
            "num_boxes": num_boxes,
            "mm_encoder_outputs": mm_encoder_outputs,
            "image_position_ids": image_position_ids,
            "pixel_values_videos": pixel_values_videos,
            "low_res_pixel_values_videos": low_res_pixel_values_videos,
            "video_boxes": video_boxes,
            "num_video_boxes": num_video_boxes,
            "num_video_frames": num_video_frames,
        }
        return self._score(images, arguments, logits_to_keep, **kwargs)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """Generate, but never the placeholder or the padding of the embedding table, whatever options are passed.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts. Better pass them as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): See the base class.
            logits_processor (`LogitsProcessorList`, *optional*): Applied before the tokens above are excluded.
            *args: See the base class.
            **kwargs: The output of the processor, and the options of the base class. `image_position_ids` may replace
                `boxes` and `num_boxes`.

        Returns:
            `torch.LongTensor` or `ModelOutput`: Prompts and answers, as in the base class.

        Raises:
            ValueError: If inputs are missing, given twice, or inconsistent.
            RuntimeError: If the installed transformers lacks a private method that this needs.
        """
        _drop_unused(kwargs)
        if (packed := kwargs.pop("image_position_ids", None)) is not None:
            kwargs["boxes"], kwargs["num_boxes"] = _unpack_boxes(kwargs.get("boxes"), kwargs.get("num_boxes"), packed)
        elif self.training and kwargs.get("boxes") is not None:
            logger.warning_once(
                "`generate` is called in training with `boxes`. TRL's GRPOTrainer and RLOOTrainer do not pass these "
                "on to the loss: set `processor.packs_boxes = True` before you train with them."
            )
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def _num_image_tokens(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        num_boxes = images.get("num_boxes")
        if num_boxes is None:  # then `boxes` has no padding
            boxes = images.get("boxes")
            num_boxes = torch.full((len(images["pixel_values"]),), 1 if boxes is None else boxes.shape[1])
        return self.config.image_seq_length + self.config.num_tokens_per_box * num_boxes

    def _num_video_tokens(self, videos: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels, boxes, num_boxes = (
            videos.get(name) for name in ("pixel_values_videos", "video_boxes", "num_video_boxes")
        )
        frames = self._num_image_tokens({"pixel_values": pixels, "boxes": boxes, "num_boxes": num_boxes})
        return torch.stack([part.sum() for part in frames.split(_frame_counts(videos))])

    def _take_videos(self, videos: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
        counts = _frame_counts(videos)
        rows = torch.arange(sum(counts)).split(counts)
        taken = torch.cat([rows[index] for index in order])
        counts_of_order = torch.tensor([counts[index] for index in order])
        return {
            name: counts_of_order.to(tensor.device) if name == "num_video_frames" else tensor[taken.to(tensor.device)]
            for name, tensor in ({"num_video_frames": counts_of_order} | videos).items()
        }


def _frame_counts(videos: dict[str, torch.Tensor]) -> list[int]:
    """Return the number of frames of each video."""
    counts = videos.get("num_video_frames")
    return [len(videos["pixel_values_videos"])] if counts is None else counts.tolist()


__all__ = [
    "MGLlavaCausalLMOutputWithPast",
    "MGLlavaForConditionalGeneration",
    "MGLlavaModel",
    "MGLlavaModelOutputWithPast",
    "MGLlavaPreTrainedModel",
]
