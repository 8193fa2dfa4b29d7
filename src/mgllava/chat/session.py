"""A conversation: its turns, its images with their boxes, and what the model remembers of them."""

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers import DynamicCache, GenerationConfig, TextStreamer

from mgllava.errors import MGLlavaError
from mgllava.modeling import CACHE_NAME
from mgllava.processing.boxes_mgllava import limit_boxes, nms_per_label, read_boxes_of_image
from mgllava.processing.images_common import as_rgb, load_upright
from mgllava.user_text import encode_conversation

# Longest answer where neither the caller nor the model's generation config names one.
_MAX_NEW_TOKENS = 512


class ChatError(MGLlavaError, ValueError):
    """Something that the user can mend; the conversation is as it was before."""


@dataclass
class ChatImage:
    """An image of a conversation.

    Attributes:
        name: What it was called: a path, a URL, or `"image"`.
        picture: The upright image, RGB.
        detections: `{"boxes", "labels", "scores"}` as a detector gives them (labels and scores may be absent), xyxy in
            pixels of `picture`.
        objects: Those of the detections that the model gets a token for, in its order.
    """

    name: str
    picture: Image.Image
    detections: Mapping[str, Any]
    objects: Mapping[str, Any]


@dataclass
class Answer:
    """What the model said.

    Attributes:
        text: The answer, without control tokens.
        finish: `"end"`: the model closed it. `"length"`: it reached `max_new_tokens` or the end of the context.
            `"interrupted"`: the user stopped it.
        num_tokens: How many tokens were generated.
    """

    text: str
    finish: Literal["end", "length", "interrupted"]
    num_tokens: int


def read_picture(image: Any) -> Image.Image:
    """Read an image that a user named.

    Args:
        image: In any form that the processor takes: path, URL, PIL image, array or tensor.

    Returns:
        `PIL.Image.Image`: The image, upright and RGB.

    Raises:
        ChatError: If it cannot be read.
    """
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else "The image"
    try:
        return to_pil_image(as_rgb(load_upright(image)))
    # Decoders and connections fail in more ways than can be listed, and none of them may end a chat.
    except Exception as error:
        raise ChatError(f"{name[:200]} cannot be read as an image: {error}") from error


class ChatSession:
    """Answers questions about images, turn by turn.

    Every turn reads the ids of the whole conversation, as the model was trained on them, and runs only those behind
    the longest beginning that is already in the cache: no image is looked at twice, and answers are those of a single
    prompt with all turns.

    Example:
        ```python
        session = ChatSession(model, processor)
        session.add_image("table.jpg").objects["labels"]  # ["cup", "spoon"]
        session.ask("What is on the table?", on_text=lambda piece: print(piece, end="")).text
        session.ask("What colour is it?")
        ```

    Args:
        model ([`MGLlavaForConditionalGeneration`]): The model.
        processor ([`MGLlavaProcessor`]): Its processor; its box detector finds the boxes of images.
        system (`str`, *optional*): System message.
        generation_config ([`GenerationConfig`], *optional*): How to generate; by default the model's own.
        detection_threshold (`float`, *optional*): Scores of boxes must be greater; by default the detector's own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        detection_threshold: float | None = None,
    ):
        self.model = model
        self.processor = processor
        self.system = system
        self.generation_config = deepcopy(generation_config or model.generation_config)
        # Each turn says itself how long the answer may be, and which cache it goes on with.
        self.max_new_tokens = self.generation_config.max_new_tokens or _MAX_NEW_TOKENS
        self.generation_config.update(max_length=None, max_new_tokens=None, cache_implementation=None)
        self.detection_threshold = detection_threshold
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.images: list[ChatImage] = []
        # Images that the next question comes with.
        self._waiting: list[ChatImage] = []
        self._forget()

    def _forget(self) -> None:
        """Empty the cache; the next turn fills it again."""
        self._cache: DynamicCache | None = None
        self._cached_ids: list[int] = []

    def add_image(self, image: Any, boxes: Any = None, name: str | None = None) -> ChatImage:
        """Show an image; the next question is the first one that sees it.

        Args:
            image: In any form that the processor takes: path, URL, PIL image, array or tensor.
            boxes (`Mapping` or array of shape `(num_boxes, 4)`, *optional*): xyxy in pixels of the upright image. By
                default those that the processor's box detector finds, or none if it has no detector.
            name (`str`, *optional*): What to call it; by default its path or URL.

        Returns:
            [`ChatImage`]: The image with its boxes.

        Raises:
            ChatError: If the image cannot be read, its boxes are no boxes, or the detector cannot be loaded.
            torch.OutOfMemoryError: If the detector finds no memory.
        """
        if name is None:
            name = os.fspath(image) if isinstance(image, str | os.PathLike) else "image"
        picture = read_picture(image)
        try:
            if boxes is None and self.processor.box_detector is not None:
                options = {} if self.detection_threshold is None else {"threshold": self.detection_threshold}
                (boxes,) = self.processor.detect([picture], **options)
            detections = boxes if isinstance(boxes, Mapping) else {"boxes": [] if boxes is None else boxes}
            objects = self._objects(detections, (picture.height, picture.width))
        except (OSError, TypeError, ValueError) as error:
            raise ChatError(f"The objects in {name[:200]} cannot be found: {error}") from error
        shown = ChatImage(name, picture, detections, objects)
        self._waiting.append(shown)
        return shown

    def _objects(self, detections: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
        """Choose the boxes that the processor keeps."""
        boxes, labels, scores = read_boxes_of_image(detections, image_size)
        kept = list(range(len(boxes)))
        if scores is not None:
            settings = self.processor.image_processor
            of_boxes = labels or [None] * len(boxes)
            kept = nms_per_label(boxes, scores, of_boxes, settings.iou_threshold)
            chosen = limit_boxes([of_boxes[row] for row in kept], settings.box_limit_mode, settings.box_limit)
            kept = [kept[row] for row in chosen]
        objects: dict[str, Any] = {"boxes": boxes[kept]}
        if labels is not None:
            objects["labels"] = [labels[row] for row in kept]
        if scores is not None:
            objects["scores"] = scores[kept]
        return objects

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Put a question and generate the answer.

        Whatever the question, the system message and earlier answers hold is text: `</s>` ends nothing, and `<image>`
        stands for no image.

        A `KeyboardInterrupt` (Ctrl-C) ends the answer; what was said until then stays in the conversation. After any
        other error the conversation is as it was before.

        Args:
            question (`str`): The question.
            on_text (`Callable`, *optional*): Called with each piece of the answer as it comes.

        Returns:
            [`Answer`]: The answer.

        Raises:
            ChatError: If the conversation is longer than what the model can read.
            KeyboardInterrupt: If the user stopped it before the first token; the question is taken back.
            torch.OutOfMemoryError: If memory is short.
        """
        content: list[dict[str, Any]] = [
            {"type": "image", "image": image.picture, "boxes": image.detections} for image in self._waiting
        ]
        content.append({"type": "text", "text": question})
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = encode_conversation(self.processor, messages)
        try:
            answer = self._generate(inputs, on_text)
        except BaseException:
            # Not every layer may have got as far as the others, and the next question may come with other images.
            self._forget()
            raise
        messages.append({"role": "assistant", "content": answer.text})
        self.messages, self.images, self._waiting = messages, [*self.images, *self._waiting], []
        return answer

    def _generate(self, inputs: Any, on_text: Callable[[str], None] | None) -> Answer:
        """Generate the answer to a prompt that goes on from what is in the cache."""
        prompt: list[int] = inputs["input_ids"][0].tolist()
        limit = self.model.config.get_text_config().max_position_embeddings
        if len(prompt) >= limit:
            raise ChatError(
                f"The conversation has {len(prompt)} tokens with this question, and the model reads {limit}. Ask a "
                "shorter one, or reset the conversation."
            )
        self.generation_config.max_new_tokens = min(self.max_new_tokens, limit - len(prompt))
        self._reuse(prompt)
        # The cache begins with the images of earlier turns: only those behind it are encoded.
        if self._cached_ids:
            for name in ("pixel_values", "boxes", "num_boxes"):
                if name in inputs:
                    inputs[name] = inputs[name][len(self.images) :]
            if "pixel_values" in inputs and len(inputs["pixel_values"]) == 0:
                inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self._cache is None:
            # Without the model's config: it then keeps all keys and values, so that it can be cut anywhere. A model
            # with a sliding window masks the old ones.
            self._cache = DynamicCache()
        streamer = _Listener(self.processor.tokenizer, on_text)
        finish: Literal["end", "length", "interrupted"] = "end"
        try:
            output = self.model.generate(
                **{name: value.to(self.model.device) for name, value in inputs.items()},
                generation_config=self.generation_config,
                streamer=streamer,
                **{CACHE_NAME: self._cache},
            )
        except KeyboardInterrupt:
            if not streamer.tokens:
                raise
            streamer.end()
            finish = "interrupted"
            # Some layers may have seen a token more than others, but all have seen the prompt; the next turn cuts
            # off what is behind it.
            self._cached_ids = prompt
        else:
            # The last token has not been run.
            self._cached_ids = output[0, : self._cache.get_seq_length()].tolist()
            is_full = len(streamer.tokens) == self.generation_config.max_new_tokens
            if is_full and streamer.tokens[-1] not in self._end_tokens():
                finish = "length"
        text = self.processor.decode(streamer.tokens, skip_special_tokens=True).strip()
        return Answer(text, finish, len(streamer.tokens))

    def _reuse(self, prompt: list[int]) -> None:
        """Keep what the cache has in common with a prompt, at most all but the last token."""
        common = 0
        for cached, wanted in zip(self._cached_ids, prompt[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        image_token = self.processor.image_token_id
        if self._cached_ids[common:].count(image_token):
            self._forget()
        else:
            self._cut(common)

    def _cut(self, length: int) -> None:
        """Shorten the cache to the first tokens."""
        if self._cache is None:
            return
        self._cached_ids = self._cached_ids[:length]
        # `Cache.crop` counts from the end, in every layer alike.
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[..., :length, :])

    def _end_tokens(self) -> list[int]:
        end = self.generation_config.eos_token_id or self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]


class _Listener(TextStreamer):
    """Hands on text as soon as it is complete, and keeps the tokens."""

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


__all__ = ["Answer", "ChatError", "ChatImage", "ChatSession"]
