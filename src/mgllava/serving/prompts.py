"""Make the model's inputs from checked messages, one image at a time."""

import asyncio
import re
from contextlib import AsyncExitStack
from typing import Any

from jinja2 import TemplateError

from mgllava.families import takes_boxes
from mgllava.user_text import control_tokens, encode_conversation

from .errors import RequestError
from .generation import DeviceHealth, Worker
from .image_urls import DownloadRoom, ImageHosts, download_image
from .images import decode_image, read_data_url
from .limits import MAX_REQUESTS_WITH_PIXELS, ServingLimits
from .messages import Conversation, ImageSource


class PromptMaker:
    """Makes the model's inputs, in two threads: one for images and boxes, one for text.

    Images are decoded one at a time, with those of several requests in turn: no request waits for all images of
    another, and text never waits for images. `template_kwargs` are variables of the chat template.
    """

    def __init__(
        self,
        processor: Any,
        context_length: int,
        limits: ServingLimits,
        hosts: ImageHosts,
        health: DeviceHealth,
        template_kwargs: dict[str, Any],
    ):
        self._processor, self._context_length = processor, context_length
        self._limits, self._hosts, self._template_kwargs = limits, hosts, template_kwargs
        # One thread each: tokenizers and the detector's cache of text embeddings are not thread-safe.
        self._image_worker, self._text_worker = Worker("images", health), Worker("texts", health)
        self._control_tokens = control_tokens(processor)
        self.takes_boxes = takes_boxes(processor)
        # Held by a request with images from its first image until it is answered.
        self._room_for_pixels = asyncio.Semaphore(MAX_REQUESTS_WITH_PIXELS)

    async def _download(self, conversation: Conversation) -> None:
        """Download the images of a conversation into it."""
        images = [image for image in conversation.images if image.url[:5].lower() != "data:"]
        room = DownloadRoom(self._limits.request_bytes)
        downloads = [
            asyncio.ensure_future(download_image(image.url, image.param, self._hosts, self._limits, room))
            for image in images
        ]
        try:
            for image, data in zip(images, await asyncio.gather(*downloads), strict=True):
                image.data = data
        finally:
            for download in downloads:
                download.cancel()

    async def from_conversation(self, conversation: Conversation, stack: AsyncExitStack) -> Any:
        """Make the inputs of a conversation; a place for its pixels is held until the stack is closed."""
        await self._download(conversation)
        if conversation.images:
            await stack.enter_async_context(self._room_for_pixels)
        self._check_control_tokens(conversation)
        features: list[Any] = []
        pixels_left = self._limits.pixels
        for image in conversation.images:
            side, feature = await self._image_worker.run(self._process_image, image, pixels_left)
            pixels_left -= side**2
            features.append(feature)
        return self._checked(await self._text_worker.run(self._encode_conversation, conversation, features))

    async def from_text(self, text: str, param: str) -> Any:
        """Make the inputs of a raw prompt, whose control tokens are control tokens, except for the placeholder."""
        if len(self._control_tokens.findall(text)) > self._context_length:
            raise self._too_long(f"more than {self._context_length}", param)
        ids = await self._text_worker.run(self._encode_text, text)
        return self._checked(self._as_inputs(ids), param)

    def from_tokens(self, ids: list[int], param: str) -> Any:
        """Make the inputs of a prompt of token ids."""
        if self._processor.image_token_id in ids:
            raise RequestError(
                f"`{param}` must not have {self._processor.image_token_id}, which stands for images: send them to "
                "/v1/chat/completions.",
                param,
            )
        return self._checked(self._as_inputs(ids), param)

    def _check_control_tokens(self, conversation: Conversation) -> None:
        """Refuse too many control tokens early: each is encoded alone, which takes time."""
        number = 0
        for message in conversation.messages:
            for block in message["content"]:
                number += len(self._control_tokens.findall(block.get("text", "")))
        if number > self._context_length:
            raise self._too_long(f"more than {number}")

    def _process_image(self, image: ImageSource, pixels_left: int) -> tuple[int, Any]:
        """Decode an image, find its boxes and process it; return its longer side and the model's inputs."""
        data = read_data_url(image.url, image.param, self._limits) if image.data is None else image.data
        image.data, image.url = None, ""  # only the pixels stay in memory
        picture = decode_image(data, image.param, self._limits, pixels_left)
        options = {}
        if self.takes_boxes:
            options["boxes"] = [image.boxes]
            if image.boxes is None and self._processor.box_detector is not None:
                options["boxes"] = self._processor.detect([picture])
        try:
            features = self._processor.image_processor(images=[picture], return_tensors="pt", **options)
        except (TypeError, ValueError) as error:
            message = str(error).replace("boxes[0]", image.boxes_param)
            raise RequestError(message, image.param if image.boxes is None else image.boxes_param) from error
        return max(picture.size), self._processor.take_images(features, 0)

    def _encode_conversation(self, conversation: Conversation, features: list[Any]) -> Any:
        """Encode the text, and put the processed images in their places."""
        options = {**self._template_kwargs}
        if features:
            options["processor_kwargs"] = {"processed_images": self._processor.join_images(features)}
        try:
            return encode_conversation(self._processor, conversation.messages, **options)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(str(error), conversation.param) from error

    def _encode_text(self, text: str) -> list[int]:
        tokenizer, token = self._processor.tokenizer, self._processor.image_token
        before, *others = re.split(f"({re.escape(token)})", text)
        ids: list[int] = self._processor(text=before)["input_ids"][0]
        for piece in filter(None, others):  # a prompt without images: the placeholder is text
            new = tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=piece == token)
            if self._processor.image_token_id in new:
                new = tokenizer.encode(f"{token[0]} {token[1:]}", add_special_tokens=False)
            ids += new
        return ids

    def _as_inputs(self, ids: list[int]) -> Any:
        return self._processor.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")

    def _checked(self, inputs: Any, param: str | None = None) -> Any:
        """Return inputs, unless they leave no room for an answer."""
        length = inputs["input_ids"].shape[-1]
        if length >= self._context_length:
            raise self._too_long(str(length), param)
        return inputs

    def _too_long(self, length: str, param: str | None = None) -> RequestError:
        return RequestError(
            f"The prompt must leave room in the context of {self._context_length} tokens, images included, "
            f"got {length}. Send a shorter conversation, or fewer images or frames.",
            param,
            "context_length_exceeded",
        )


__all__ = ["PromptMaker"]
