"""Greedy answers to questions about images and videos, in batches."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import logging

from mgllava.families import takes_boxes
from mgllava.processing.images_common import as_rgb, open_image
from mgllava.processing.video_reading_mgllava import Clip, UnreadableVideoError, read_video, uniform_indices

from .errors import BadRowError, EvaluationError

logger = logging.get_logger(__name__)

# That of the original; its configuration for 13B has 50.
MAX_NEW_TOKENS = 100
_ORIENTATION = 0x0112
_LISTS = ("boxes", "labels", "scores")


@dataclass(frozen=True)
class Picture:
    """An opened image.

    Attributes:
        image: RGB, as it is stored: the original ignores the orientation in EXIF data.
        is_turned: Whether its EXIF data say that it should be shown turned.
    """

    image: Image.Image
    is_turned: bool

    @property
    def frames(self) -> list[Image.Image]:
        """The image alone, as boxes are per frame."""
        return [self.image]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


@dataclass(frozen=True)
class Film:
    """The sampled frames of a video.

    Attributes:
        clip: The frames as the processor takes them.
        is_turned: False: the original's decoder turns videos upright, too.
    """

    clip: Clip
    is_turned: bool = False

    @property
    def frames(self) -> list[Image.Image]:
        """The frames as images."""
        return [to_pil_image(frame) for frame in self.clip.frames]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        height, width = self.clip.frames.shape[2:]
        return width, height


Visual = Picture | Film


def open_as_stored(image: Any) -> Picture:
    """Open an image as the original does, without turning it upright.

    Args:
        image: A path, bytes, or anything else that the processor takes.

    Returns:
        [`Picture`]: The image, without its EXIF data.

    Raises:
        BadRowError: If it cannot be read.
    """
    # Decoders raise errors of any type for damaged files.
    try:
        opened = open_image(image)
        rgb = to_pil_image(as_rgb(opened))
    except Exception as error:
        raise BadRowError(f"its image cannot be read: {type(error).__name__}: {error}") from error
    try:
        orientation = opened.getexif().get(_ORIENTATION, 1) if isinstance(opened, Image.Image) else 1
    except Exception:  # damaged metadata
        orientation = 1
    return Picture(rgb, orientation not in (0, 1))


def open_video(video: Any, num_frames: int) -> Film:
    """Sample the frames of a video.

    Args:
        video: A path, or anything else that the processor takes.
        num_frames (`int`): How many.

    Returns:
        [`Film`]: The frames.

    Raises:
        BadRowError: If it cannot be read.
        ImportError: If no decoder is installed.
    """
    try:
        return Film(read_video(video, lambda metadata: uniform_indices(metadata.total_num_frames, num_frames)))
    except (UnreadableVideoError, OSError, TypeError, ValueError) as error:
        raise BadRowError(f"its video cannot be read: {error}") from error


class Answerer:
    """Answers questions as the original's evaluation does: greedy, without a system message.

    Args:
        model (`PreTrainedModel`): A model of one of the families of this package.
        processor (`ProcessorMixin`): Its processor.
        max_new_tokens (`int`): Maximum length of an answer, in tokens.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = MAX_NEW_TOKENS):
        self.model = model
        self.processor = processor
        self.takes_boxes = takes_boxes(processor)
        self.generation_config = greedy(model.generation_config, max_new_tokens)

    def detect(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Find the boxes of images.

        Args:
            images (`Sequence[PIL.Image.Image]`): The images.

        Returns:
            `list[dict]`: Per image lists `boxes` (xyxy, pixels of the image), `labels` and `scores`.
        """
        found = self.processor.detect(list(images), batch_size=len(images)) if images else []
        return [plain(record) for record in found]

    def objects(self, record: Mapping[str, Any], image: Image.Image, is_frame: bool = False) -> dict[str, Any]:
        """Return the objects of an image, or of a frame of a video, that get tokens.

        Args:
            record (`Mapping`): `boxes` (xyxy in pixels of the image), and perhaps `labels` and `scores`.
            image (`PIL.Image.Image`): The image or frame.
            is_frame (`bool`, *optional*, defaults to `False`): Whether it is a frame.

        Returns:
            `dict`: The same lists, with the boxes of the objects in the model's order.
        """
        chooser = self.processor.video_processor if is_frame else self.processor
        return plain(chooser.objects(record, (image.height, image.width)))

    @torch.inference_mode()
    def answer_videos(
        self,
        clips: Sequence[Clip],
        prompts: Sequence[str],
        boxes: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        **video_options: Any,
    ) -> list[str]:
        """Answer a batch of questions, each about one video.

        Args:
            clips (`Sequence[Clip]`): Sampled frames, one clip per question.
            prompts (`Sequence[str]`): The text after each video.
            boxes (`Sequence[Sequence[Mapping]]`, *optional*): Per video and frame `boxes`, and perhaps `labels` and
                `scores`.
            **video_options: Options of the video processor, such as `box_limit`.

        Returns:
            `list[str]`: The answers, without control tokens and surrounding spaces.

        Raises:
            EvaluationError: If a prompt is longer than the model's context.
        """
        conversations = []
        for number, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            entries: list[Any] = [[]] * len(clip.frames) if boxes is None else list(boxes[number])
            block = {"type": "video", "video": clip.frames, "boxes": entries}
            conversations.append([{"role": "user", "content": [block, {"type": "text", "text": prompt}]}])
        return self.answer_conversations(conversations, do_sample_frames=False, **video_options)

    @torch.inference_mode()
    def answer(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        boxes: Sequence[Mapping[str, Any]] | None = None,
        **image_options: Any,
    ) -> list[str]:
        """Answer a batch of questions, each about one image.

        Args:
            images (`Sequence[PIL.Image.Image]`): One image per question.
            prompts (`Sequence[str]`): The text after each image.
            boxes (`Sequence[Mapping]`, *optional*): Per image `boxes`, and perhaps `labels` and `scores`; for models
                that take boxes.
            **image_options: Options of the image processor, such as `box_limit`.

        Returns:
            `list[str]`: The answers, without control tokens and surrounding spaces.

        Raises:
            EvaluationError: As [`~Answerer.answer_conversations`].
        """
        conversations = []
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            block: dict[str, Any] = {"type": "image", "image": image}
            if self.takes_boxes:
                block["boxes"] = {"boxes": []} if boxes is None else boxes[number]
            conversations.append([{"role": "user", "content": [block, {"type": "text", "text": prompt}]}])
        return self.answer_conversations(conversations, **image_options)

    @torch.inference_mode()
    def answer_conversations(
        self, conversations: Sequence[list[dict[str, Any]]], generation_config: Any = None, **image_options: Any
    ) -> list[str]:
        """Answer a batch of conversations.

        Args:
            conversations (`Sequence[list[dict]]`): Messages, with images, videos and their boxes in blocks.
            generation_config (`GenerationConfig`, *optional*): Options of generation; greedy by default.
            **image_options: Options of the processors of images and videos.

        Returns:
            `list[str]`: The answers.

        Raises:
            EvaluationError: If a prompt with a video is longer than the model's context.
        """
        inputs = self.processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **image_options},
        ).to(self.model.device)
        if "num_video_frames" in inputs:
            check_context(self.model, int(inputs["attention_mask"].sum(-1).max()))
        output = self.model.generate(**inputs, generation_config=generation_config or self.generation_config)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def check_context(model: Any, length: int) -> None:
    """Refuse prompts with videos that are longer than the model's context, for which it was not trained."""
    limit = model.config.get_text_config().max_position_embeddings
    if length >= limit:
        raise EvaluationError(
            f"A prompt has {length} tokens, those of frames and boxes included, but the model's context has {limit} "
            "(`max_position_embeddings` of its language model). Set a smaller `num_frames`, or convert a model that "
            "was trained on longer prompts with `mgllava convert --max-positions`."
        )


def greedy(config: Any, max_new_tokens: int) -> Any:
    """Copy a generation configuration, with greedy decoding and the end and unused tokens of the model."""
    config = deepcopy(config)
    # Neutral values instead of `None`, for which `generate` takes those of the model.
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_length=None,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=False,
    )
    return config


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the tensors and arrays of a record into lists."""
    return {
        name: record[name].tolist() if hasattr(record[name], "tolist") else list(record[name])
        for name in _LISTS
        if record.get(name) is not None
    }


__all__ = [
    "MAX_NEW_TOKENS",
    "Answerer",
    "Film",
    "Picture",
    "Visual",
    "check_context",
    "greedy",
    "open_as_stored",
    "open_video",
    "plain",
]
