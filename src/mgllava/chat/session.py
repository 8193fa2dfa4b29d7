"""A conversation: its turns, its images and videos with their boxes, and the KV cache of its tokens."""

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers import DynamicCache, GenerationConfig, TextStreamer

from mgllava.errors import MGLlavaError
from mgllava.families import family_of, takes_boxes, takes_videos
from mgllava.modeling.pretrained_common import CACHE_NAME
from mgllava.processing.images_common import as_rgb, load_upright
from mgllava.user_text import encode_conversation

# Longest answer in tokens if neither the caller nor the model's generation config sets it.
_MAX_NEW_TOKENS = 512


class ChatError(MGLlavaError, ValueError):
    """A mistake that the user can correct; it leaves the conversation unchanged."""


@dataclass
class ChatImage:
    """An image of a conversation.

    Attributes:
        name: Its path or URL, or `"image"`.
        picture: The upright image, RGB.
        detections: `{"boxes", "labels", "scores"}` as a detector returns them (labels and scores may be absent); boxes
            are xyxy in pixels of `picture`. `None` if the model has no boxes.
        objects: The detections that get tokens in the model, in the model's order. `None` if the model has no boxes.
    """

    name: str
    picture: Image.Image
    detections: Mapping[str, Any] | None
    objects: Mapping[str, Any] | None


@dataclass
class ChatVideo:
    """A video of a conversation.

    Attributes:
        name: Its path or URL, or `"video"`.
        frames: The sampled frames, upright, RGB.
        num_total_frames: Number of frames of the whole video.
        detections: For each frame `{"boxes", "labels", "scores"}` as a detector returns them. `None` if the model has
            no boxes.
        objects: For each frame the detections that get tokens in the model, in the model's order. `None` if the model
            has no boxes.
        pixels: The frames as the processor takes them, uint8 of shape `(num_frames, 3, height, width)`.
    """

    name: str
    frames: list[Image.Image]
    num_total_frames: int
    detections: Sequence[Any] | None
    objects: Sequence[Mapping[str, Any]] | None
    pixels: torch.Tensor


@dataclass
class Answer:
    """An answer of the model.

    Attributes:
        text: The answer, without control tokens.
        finish: Why the answer ended: `"end"` if the model ended it, `"length"` if it reached `max_new_tokens` or the
            end of the context, `"interrupted"` if the user stopped it.
        num_tokens: How many tokens were generated.
        image_outputs: For models that do not see all tokens of images, what [`visualization.kept_tokens`] draws, for
            the images of the conversation in turn. `None` for an answer that was interrupted.
    """

    text: str
    finish: Literal["end", "length", "interrupted"]
    num_tokens: int
    image_outputs: Mapping[str, Any] | None = None


def read_picture(image: Any) -> Image.Image:
    """Return an image, in any form that the processor takes, upright and RGB."""
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else "The image"
    try:
        return to_pil_image(as_rgb(load_upright(image)))
    # Decoders and connections fail in too many ways to list, and none of them may end a chat.
    except Exception as error:
        raise ChatError(f"{name[:200]} cannot be read as an image: {error}") from error


class ChatSession:
    """Answers questions about images and videos, turn by turn.

    Every turn encodes the whole conversation, as in training, but the model only runs the tokens after the longest
    prefix that is already in the KV cache. So no image is encoded twice, and the answers are those to a single prompt
    with all turns. If the model's embeddings of images depend on the text of the prompt, the prefix ends before the
    first image.

    Example:
        ```python
        session = ChatSession(model, processor)
        session.add_image("table.jpg").objects["labels"]  # ["cup", "spoon"]
        session.ask("What is on the table?", on_text=lambda piece: print(piece, end="")).text
        session.ask("What color is it?")
        ```

    Args:
        model (`PreTrainedModel`): A model of one of the families of this package, such as
            [`MGLlavaForConditionalGeneration`].
        processor (`ProcessorMixin`): The processor of the model; its box detector, if it has one, finds the boxes of
            images.
        system (`str`, *optional*): System message.
        generation_config ([`GenerationConfig`], *optional*): Options of generation; by default the model's own.
        detection_threshold (`float`, *optional*): Detections must have higher scores; by default the detector's own
            threshold.
        num_frames (`int`, *optional*): Frames that are sampled from each video; by default that of the processor.

    Raises:
        ValueError: If the model belongs to no family of this package, `detection_threshold` is given for a model
            without boxes, or `num_frames` for one that takes no videos.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        detection_threshold: float | None = None,
        num_frames: int | None = None,
    ):
        self.model = model
        self.processor = processor
        self.system = system
        self.generation_config = deepcopy(generation_config or model.generation_config)
        # Each turn sets the length of its answer and continues the session's cache.
        self.max_new_tokens = self.generation_config.max_new_tokens or _MAX_NEW_TOKENS
        self.generation_config.update(
            max_length=None, max_new_tokens=None, cache_implementation=None, return_dict_in_generate=True
        )
        self.detection_threshold = detection_threshold
        family = family_of(model.config)
        self._images_depend_on_text = family.images_depend_on_text
        self.takes_boxes = takes_boxes(processor)
        if detection_threshold is not None and not self.takes_boxes:
            raise ValueError(f"`detection_threshold` must be None: {family.title} has no boxes.")
        self.takes_videos = takes_videos(processor)
        self.num_frames = num_frames
        if num_frames is not None and not self.takes_videos:
            raise ValueError(f"`num_frames` must be None: this model of {family.title} takes no videos.")
        # Code of models that were saved before knows images only.
        self._placeholders = set(getattr(processor, "placeholder_ids", {"image": processor.image_token_id}).values())
        self._visual_inputs = {*processor.image_inputs, *getattr(processor, "video_inputs", ())}
        self.reset()

    def reset(self) -> None:
        """Forget all turns, images and videos."""
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.images: list[ChatImage] = []
        self.videos: list[ChatVideo] = []
        # Images and videos that belong to the next question.
        self._waiting: list[ChatImage | ChatVideo] = []
        self._forget()

    def _forget(self) -> None:
        """Empty the cache; the next turn fills it."""
        self._cache: DynamicCache | None = None
        self._cached_ids: list[int] = []

    def add_image(self, image: Any, boxes: Any = None, name: str | None = None) -> ChatImage:
        """Add an image to the conversation; it belongs to the next question.

        Args:
            image: The image in any form that the processor takes: path, URL, PIL image, array or tensor.
            boxes (`Mapping` or array of shape `(num_boxes, 4)`, *optional*): xyxy in pixels of the upright image. By
                default the processor's box detector finds them; without a detector there are none.
            name (`str`, *optional*): Name of the image; by default its path or URL.

        Returns:
            [`ChatImage`]: The image with its boxes.

        Raises:
            ChatError: If the image cannot be read, `boxes` is malformed or given for a model without boxes, or the
                detector cannot be loaded.
            torch.OutOfMemoryError: If the memory does not suffice for the detector.
        """
        if boxes is not None and not self.takes_boxes:
            raise ChatError("`boxes` must be None: this model has no boxes.")
        if name is None:
            name = os.fspath(image) if isinstance(image, str | os.PathLike) else "image"
        picture = read_picture(image)
        shown = ChatImage(name, picture, None, None)
        if self.takes_boxes:
            try:
                if boxes is None and self.processor.box_detector is not None:
                    options = {} if self.detection_threshold is None else {"threshold": self.detection_threshold}
                    (boxes,) = self.processor.detect([picture], **options)
                shown.detections = boxes if isinstance(boxes, Mapping) else {"boxes": [] if boxes is None else boxes}
                shown.objects = self.processor.objects(shown.detections, (picture.height, picture.width))
            except (OSError, TypeError, ValueError) as error:
                raise ChatError(f"The objects in {name[:200]} cannot be found: {error}") from error
        self._waiting.append(shown)
        return shown

    def add_video(self, video: Any, boxes: Any = None, name: str | None = None) -> ChatVideo:
        """Add a video to the conversation; it belongs to the next question.

        Args:
            video: The video in any form that the processor takes: path, URL, bytes, frames.
            boxes (`Sequence` or `Mapping`, *optional*): One entry for each sampled frame, xyxy in pixels of the
                upright frame, or a record of a box file, `{"frames": [...]}`. By default the processor's box detector
                finds them; without a detector there are none.
            name (`str`, *optional*): Name of the video; by default its path or URL.

        Returns:
            [`ChatVideo`]: The sampled frames with their boxes.

        Raises:
            ChatError: If the model takes no videos, the video cannot be read, `boxes` are malformed or those of
                another number of frames, or the detector cannot be loaded.
            ImportError: If the video needs a decoder that is not installed.
            torch.OutOfMemoryError: If the memory does not suffice for the detector.
        """
        if name is None:
            name = os.fspath(video) if isinstance(video, str | os.PathLike) else "video"
        if not self.takes_videos:
            raise ChatError(
                f"{name[:200]} cannot be shown: this model takes no videos. A model of MG-LLaVA that was saved "
                "without them gets them from `mgllava.add_videos`."
            )
        try:
            clips = self.processor.video_processor.read_clips([video], num_frames=self.num_frames)
        except (OSError, TypeError, ValueError) as error:
            raise ChatError(f"{name[:200]} cannot be read as a video: {error}") from error
        if len(clips) != 1:
            raise ChatError(f"`video` must be one video, got {len(clips)}.")
        (clip,) = clips
        frames = [to_pil_image(frame) for frame in clip.frames]
        shown = ChatVideo(name, frames, clip.metadata.total_num_frames, None, None, clip.frames)
        if self.takes_boxes:
            size = (frames[0].height, frames[0].width)
            try:
                if boxes is None and self.processor.box_detector is not None:
                    options = {} if self.detection_threshold is None else {"threshold": self.detection_threshold}
                    (boxes,) = self.processor.detect(videos=[clip], **options)
                entries = boxes["frames"] if isinstance(boxes, Mapping) else boxes
                shown.detections = [[]] * len(frames) if entries is None else list(entries)
                if len(shown.detections) != len(frames):
                    raise ValueError(
                        f"there must be an entry for each of the {len(frames)} sampled frames, got "
                        f"{len(shown.detections)}."
                    )
                select = self.processor.video_processor.objects
                shown.objects = [select(entry, size) for entry in shown.detections]
            except (KeyError, OSError, TypeError, ValueError) as error:
                raise ChatError(f"The objects in {name[:200]} cannot be found: {error}") from error
        self._waiting.append(shown)
        return shown

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask a question and generate the answer.

        The question, the system message and earlier answers are plain text: `</s>` in them does not end anything, and
        `<image>` does not stand for an image.

        A `KeyboardInterrupt` (Ctrl-C) ends the answer; what has been generated stays in the conversation. After any
        other error the conversation is as it was before.

        Args:
            question (`str`): The question.
            on_text (`Callable`, *optional*): Called with each piece of the answer as it comes.

        Returns:
            [`Answer`]: The answer.

        Raises:
            ChatError: If the conversation is longer than the model's context.
            KeyboardInterrupt: If the user stopped the answer before its first token; the question is removed again.
            torch.OutOfMemoryError: If the memory does not suffice.
        """
        content: list[dict[str, Any]] = []
        for item in self._waiting:
            block: dict[str, Any] = {"type": "image", "image": item.picture} if isinstance(item, ChatImage) else {}
            if isinstance(item, ChatVideo):
                block = {"type": "video", "video": item.pixels}
            content.append({**block, "boxes": item.detections} if self.takes_boxes else block)
        content.append({"type": "text", "text": question})
        messages = [*self.messages, {"role": "user", "content": content}]
        options: dict[str, Any] = {}
        if self.videos or any(isinstance(item, ChatVideo) for item in self._waiting):
            options["processor_kwargs"] = {"do_sample_frames": False}  # they were sampled when they were added
        inputs = encode_conversation(self.processor, messages, **options)
        try:
            answer = self._generate(inputs, on_text)
        except BaseException:
            # The layers of the cache may have different lengths now, and the next question may have other images.
            self._forget()
            raise
        messages.append({"role": "assistant", "content": answer.text})
        self.messages = messages
        self.images += [item for item in self._waiting if isinstance(item, ChatImage)]
        self.videos += [item for item in self._waiting if isinstance(item, ChatVideo)]
        self._waiting = []
        return answer

    def _generate(self, inputs: Any, on_text: Callable[[str], None] | None) -> Answer:
        """Generate the answer to a prompt, continuing from the prefix of it that is in the cache."""
        prompt: list[int] = inputs["input_ids"][0].tolist()
        limit = self.model.config.get_text_config().max_position_embeddings
        if len(prompt) >= limit:
            raise ChatError(
                f"With this question the conversation has {len(prompt)} tokens, but the model's context has {limit} "
                "(`max_position_embeddings` of its language model). Ask a shorter question, pass fewer images or "
                "frames, or reset the conversation."
            )
        self.generation_config.max_new_tokens = min(self.max_new_tokens, limit - len(prompt))
        are_cached = self._reuse(prompt)
        of_text = {name: value for name, value in inputs.items() if name not in self._visual_inputs}
        arguments = {**of_text, **self.processor.take_images(inputs, len(self.images) if are_cached else 0)}
        if self.takes_videos:
            arguments |= self.processor.take_videos(inputs, len(self.videos) if are_cached else 0)
        if self._cache is None:
            # Without the model's config it keeps all keys and values, so it can be cut anywhere. A model with a
            # sliding window masks the old ones.
            self._cache = DynamicCache()
        streamer = _Listener(self.processor.tokenizer, on_text)
        finish: Literal["end", "length", "interrupted"] = "end"
        image_outputs = None
        try:
            output = self.model.generate(
                **{name: value.to(self.model.device) for name, value in arguments.items()},
                generation_config=self.generation_config,
                streamer=streamer,
                **{CACHE_NAME: self._cache},
            )
        except KeyboardInterrupt:
            if not streamer.tokens:
                raise
            streamer.end()
            finish = "interrupted"
            # Some layers may have one token more than others, but all have the prompt; the next turn cuts the rest.
            self._cached_ids = prompt
        else:
            # The last generated token is not in the cache.
            self._cached_ids = output.sequences[0, : self._cache.get_seq_length()].tolist()
            is_full = len(streamer.tokens) == self.generation_config.max_new_tokens
            if is_full and streamer.tokens[-1] not in self._end_tokens():
                finish = "length"
            if "kept_tokens" in output:
                image_outputs = {name: output[name] for name in ("kept_tokens", "image_outputs")}
        text = self.processor.decode(streamer.tokens, skip_special_tokens=True).strip()
        return Answer(text, finish, len(streamer.tokens), image_outputs)

    def _reuse(self, prompt: list[int]) -> bool:
        """Cut the cache to its common prefix with a prompt, without the last token.

        Returns whether the images and videos of earlier turns are in it.
        """
        common = 0
        for cached, wanted in zip(self._cached_ids, prompt[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        # A part of the placeholders does not say how many images it is, so a prefix keeps all of them or none.
        if self._images_depend_on_text or not self._placeholders.isdisjoint(self._cached_ids[common:]):
            first = next((place for place, token in enumerate(prompt) if token in self._placeholders), len(prompt))
            common = min(common, first)
        self._cut(common)
        return not self._placeholders.isdisjoint(self._cached_ids)

    def _cut(self, length: int) -> None:
        """Shorten the cache to the first tokens."""
        if self._cache is None or length == 0:
            self._forget()
            return
        self._cached_ids = self._cached_ids[:length]
        # `Cache.crop` counts from the end, the same number in every layer.
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[..., :length, :])

    def _end_tokens(self) -> list[int]:
        end = self.generation_config.eos_token_id or self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]


class _Listener(TextStreamer):
    """Streamer that passes on text as soon as it is complete, and keeps the tokens."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self._on_text = on_text

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)


__all__ = ["Answer", "ChatError", "ChatImage", "ChatSession", "ChatVideo", "read_picture"]
