"""Prompts: from checked messages to the model's inputs, image by image."""

import asyncio
import math
import re
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from jinja2 import TemplateError

from mgllava.serving.errors import RequestError
from mgllava.serving.generation import DeviceHealth, Worker
from mgllava.serving.image_urls import DownloadRoom, ImageHosts, download_image
from mgllava.serving.images import decode_image, read_data_url
from mgllava.serving.limits import MAX_REQUESTS_WITH_PIXELS, ServingLimits
from mgllava.serving.messages import Conversation, ImageSource
from mgllava.user_text import control_tokens, encode_conversation

# Stands for an image when text is encoded; its boxes too, of which there are as many as the image has.
_STAND_IN_SIDE = 8


class PromptMaker:
    """Makes the model's inputs, in two threads: one for images and boxes, one for text.

    Images are decoded one at a time, and in turn where several requests have some, so that nobody waits for all
    images of another request, and texts wait for none.

    Args:
        processor ([`MGLlavaProcessor`]): The processor.
        context_length (`int`): Tokens that a prompt and its answer may have together.
        limits ([`ServingLimits`]): What a request may cost.
        hosts ([`ImageHosts`]): Where images may come from.
        health ([`DeviceHealth`]): What examines failures.
        template_kwargs (`dict`): Variables of the chat template.
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
        # One thread each: tokenizers and the detector's cache of text embeddings are not made for several.
        self._image_worker, self._text_worker = Worker("images", health), Worker("texts", health)
        self._control_tokens = control_tokens(processor)
        # How many requests may have pixels in memory at a time, from the first image until the answer is there.
        self.room_for_pixels = asyncio.Semaphore(MAX_REQUESTS_WITH_PIXELS)

    async def download(self, conversation: Conversation) -> None:
        """Download the images of a conversation.

        Args:
            conversation ([`Conversation`]): The conversation; its images get their data.

        Raises:
            RequestError: If one of them cannot be had.
        """
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

    async def from_conversation(self, conversation: Conversation) -> Any:
        """Make the inputs of a conversation whose images are downloaded.

        Args:
            conversation ([`Conversation`]): The conversation.

        Returns:
            `BatchFeature`: One prompt.

        Raises:
            RequestError: If an image cannot be read, or the prompt is too long.
        """
        self._check_control_tokens(conversation)
        features: list[Any] = []
        pixels = self._limits.pixels
        for image in conversation.images:
            size, feature = await self._image_worker.run(self._process_image, image, pixels)
            pixels -= size
            features.append(feature)
        return self._checked(await self._text_worker.run(self._encode_conversation, conversation, features))

    async def from_text(self, text: str, param: str) -> Any:
        """Make the inputs of a raw prompt, in which control tokens are what they are, but images cannot be.

        Args:
            text (`str`): The prompt.
            param (`str`): The field of the request.

        Returns:
            `BatchFeature`: One prompt.

        Raises:
            RequestError: If the prompt is too long.
        """
        if len(self._control_tokens.findall(text)) > self._context_length:
            raise self._too_long(f"more than {self._context_length}", param)
        ids = await self._text_worker.run(self._encode_text, text)
        return self._checked(self._as_inputs(ids), param)

    def from_tokens(self, ids: list[int], param: str) -> Any:
        """Make the inputs of a prompt of token ids.

        Args:
            ids (`list[int]`): The prompt.
            param (`str`): The field of the request.

        Returns:
            `BatchFeature`: One prompt.

        Raises:
            RequestError: If an id stands for images, or the prompt is too long.
        """
        if self._processor.image_token_id in ids:
            raise RequestError(
                f"`{param}` must not have {self._processor.image_token_id}, which stands for images: send them to "
                "/v1/chat/completions.",
                param,
            )
        return self._checked(self._as_inputs(ids), param)

    def _check_control_tokens(self, conversation: Conversation) -> None:
        """Refuse a text that cannot fit early: each control token in it is encoded alone, which takes time."""
        number = 0
        for message in conversation.messages:
            for block in message["content"]:
                number += len(self._control_tokens.findall(block.get("text", "")))
        if number > self._context_length:
            raise self._too_long(f"more than {number}")

    def _process_image(self, image: ImageSource, most_pixels: int) -> tuple[int, Any]:
        """Decode an image, find its boxes, and make the model's inputs of it; nothing else of it stays."""
        data = read_data_url(image.url, image.param, self._limits) if image.data is None else image.data
        image.data, image.url = None, ""
        side = math.isqrt(most_pixels)
        try:
            picture = decode_image(
                data, image.param, replace(self._limits, image_side=min(side, self._limits.image_side))
            )
        except RequestError as error:
            if error.code != "image_too_large" or side >= self._limits.image_side:
                raise
            raise RequestError(
                f"The images of a request must have at most {self._limits.pixels:,} pixels together, each counted as "
                f"the square of its longer side, of which `{image.param}` has more than the {most_pixels:,} that are "
                "left for it.",
                image.param,
                "image_too_large",
            ) from None
        boxes = image.boxes
        if boxes is None and self._processor.box_detector is not None:
            (boxes,) = self._processor.detect([picture])
        try:
            features = self._processor.image_processor(images=[picture], boxes=[boxes], return_tensors="pt")
        except (TypeError, ValueError) as error:
            message = str(error).replace("boxes[0]", image.boxes_param)
            raise RequestError(message, image.param if image.boxes is None else image.boxes_param) from error
        return max(picture.size) ** 2, features

    def _encode_conversation(self, conversation: Conversation, features: list[Any]) -> Any:
        """Encode the text with stand-ins for the images, and put the images in their place."""
        counts = [int(feature["num_boxes"][0]) for feature in features]
        side = _STAND_IN_SIDE
        stand_ins = iter(
            {"image": PIL.Image.new("RGB", (side, side)), "boxes": [[0, 0, side, side]] * count} for count in counts
        )
        messages = [
            {
                **message,
                "content": [
                    {**block, **next(stand_ins)} if block["type"] == "image" else block for block in message["content"]
                ],
            }
            for message in conversation.messages
        ]
        try:
            inputs = encode_conversation(self._processor, messages, **self._template_kwargs)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(str(error), "messages") from error
        if features:
            if inputs["num_boxes"].tolist() != counts:
                raise RuntimeError(f"{counts} boxes became {inputs['num_boxes'].tolist()}.")
            boxes = [feature["boxes"][0, :count] for feature, count in zip(features, counts, strict=True)]
            inputs["pixel_values"] = torch.cat([feature["pixel_values"] for feature in features])
            inputs["boxes"] = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        return inputs

    def _encode_text(self, text: str) -> list[int]:
        tokenizer, token = self._processor.tokenizer, self._processor.image_token
        before, *others = re.split(f"({re.escape(token)})", text)
        ids: list[int] = self._processor(text=before)["input_ids"][0]
        for piece in filter(None, others):  # the placeholder is text here: there are no images
            new = tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=piece == token)
            if self._processor.image_token_id in new:
                new = tokenizer.encode(f"{token[0]} {token[1:]}", add_special_tokens=False)
            ids += new
        return ids

    def _as_inputs(self, ids: list[int]) -> Any:
        return self._processor.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")

    def _checked(self, inputs: Any, param: str | None = None) -> Any:
        """Refuse prompts that leave no room for an answer."""
        length = inputs["input_ids"].shape[-1]
        if length >= self._context_length:
            raise self._too_long(str(length), param)
        return inputs

    def _too_long(self, length: str, param: str | None = None) -> RequestError:
        return RequestError(
            f"The prompt must leave room in the context of {self._context_length} tokens, images and boxes included, "
            f"got {length}.",
            param,
            "context_length_exceeded",
        )
