"""Make the model's inputs from checked messages, one image or video at a time."""

import asyncio
import re
from contextlib import AsyncExitStack
from typing import Any

from jinja2 import TemplateError

from mgllava.families import takes_boxes
from mgllava.processing.processing_mgllava import find_boxes_of_frames
from mgllava.user_text import control_tokens, encode_conversation

from .errors import RequestError
from .generation import DeviceHealth, Worker
from .image_urls import DownloadRoom, ImageHosts, download_image, download_video
from .images import decode_image, read_data_url
from .limits import MAX_REQUESTS_WITH_PIXELS, ServingLimits
from .messages import Conversation, ImageSource, VideoSource
from .videos import decode_video


class PromptMaker:
    """Makes the model's inputs, in three threads: one for images and boxes, one that decodes videos, one for text.

    Images are decoded one at a time, with those of several requests in turn: no request waits for all images of
    another, images never wait for a video to be decoded, and text never waits. `num_frames` is how many frames of a
    video are sampled, unless the request asks for fewer; `template_kwargs` are variables of the chat template.
    """

    def __init__(
        self,
        processor: Any,
        context_length: int,
        limits: ServingLimits,
        hosts: ImageHosts,
        health: DeviceHealth,
        template_kwargs: dict[str, Any],
        num_frames: int = 0,
    ):
        self._processor, self._context_length = processor, context_length
        self._limits, self._hosts, self._template_kwargs = limits, hosts, template_kwargs
        self._num_frames = num_frames
        # One thread each: tokenizers and the detector's cache of text embeddings are not thread-safe.
        self._image_worker, self._text_worker = Worker("images", health), Worker("texts", health)
        self._video_worker = Worker("videos", health)
        self._control_tokens = control_tokens(processor)
        self.takes_boxes = takes_boxes(processor)
        # Held by a request with images or videos from its first one until it is answered.
        self._room_for_pixels = asyncio.Semaphore(MAX_REQUESTS_WITH_PIXELS)

    async def _download(self, conversation: Conversation) -> None:
        """Download the images and videos of a conversation into it."""
        sources = [source for source in conversation.sources if source.url[:5].lower() != "data:"]
        room = DownloadRoom(self._limits.request_bytes)
        downloads = [
            asyncio.ensure_future(
                (download_video if isinstance(source, VideoSource) else download_image)(
                    source.url, source.param, self._hosts, self._limits, room
                )
            )
            for source in sources
        ]
        try:
            for source, data in zip(sources, await asyncio.gather(*downloads), strict=True):
                source.data = data
        finally:
            for download in downloads:
                download.cancel()

    async def from_conversation(self, conversation: Conversation, stack: AsyncExitStack) -> Any:
        """Make the inputs of a conversation; a place for its pixels is held until the stack is closed."""
        self._check_frames(conversation)
        await self._download(conversation)
        if conversation.sources:
            await stack.enter_async_context(self._room_for_pixels)
        self._check_control_tokens(conversation)
        images, videos = [], []
        pixels_left = self._limits.pixels
        for source in conversation.sources:
            if isinstance(source, VideoSource):
                clip = await self._video_worker.run(self._decode_video, source)
                videos.append(await self._image_worker.run(self._process_video, source, clip))
                continue
            side, feature = await self._image_worker.run(self._process_image, source, pixels_left)
            pixels_left -= side**2
            images.append(feature)
        return self._checked(await self._text_worker.run(self._encode_conversation, conversation, images, videos))

    async def from_text(self, text: str, param: str) -> Any:
        """Make the inputs of a raw prompt, whose control tokens are control tokens, except for the placeholder."""
        if len(self._control_tokens.findall(text)) > self._context_length:
            raise self._too_long(f"more than {self._context_length}", param)
        ids = await self._text_worker.run(self._encode_text, text)
        return self._checked(self._as_inputs(ids), param)

    def from_tokens(self, ids: list[int], param: str) -> Any:
        """Make the inputs of a prompt of token ids."""
        for modality, token_id in self._placeholder_ids().items():
            if token_id in ids:
                raise RequestError(
                    f"`{param}` must not have {token_id}, which stands for {modality}s: send them to "
                    "/v1/chat/completions.",
                    param,
                )
        return self._checked(self._as_inputs(ids), param)

    def _placeholder_ids(self) -> dict[str, int]:
        """Return the ids that stand for images and videos; code of models that were saved before knows images only."""
        ids: dict[str, int] = getattr(self._processor, "placeholder_ids", {"image": self._processor.image_token_id})
        return ids

    def _check_frames(self, conversation: Conversation) -> None:
        """Check the numbers of frames before any work is done for them."""
        least = 0
        for video in conversation.videos:
            number = video.num_frames = video.num_frames or self._num_frames
            if number > self._num_frames:
                raise RequestError(
                    f"`{video.num_frames_param}` must be at most {self._num_frames} (`--num-frames`), got {number}.",
                    video.num_frames_param,
                )
            if video.boxes is not None and len(video.boxes) not in (0, number):
                raise RequestError(
                    f"`{video.boxes_param}` must have one entry for each of the {number} sampled frames, got "
                    f"{len(video.boxes)}.",
                    video.boxes_param,
                )
            least += number * self._processor.image_seq_length
        if least >= self._context_length:
            raise self._too_long(f"at least {least} for the frames of videos")

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

    def _decode_video(self, video: VideoSource) -> Any:
        """Decode a video and sample its frames."""
        data = read_data_url(video.url, video.param, self._limits, "video") if video.data is None else video.data
        video.data, video.url = None, ""
        assert video.num_frames is not None  # set by `_check_frames`
        return decode_video(data, video.param, self._limits, self._processor.video_processor, video.num_frames)

    def _process_video(self, video: VideoSource, clip: Any) -> Any:
        """Find the boxes of the frames that have none, and return the model's inputs."""
        boxes = video.boxes
        if boxes == []:  # as for images: no boxes
            boxes = [[]] * len(clip.frames)
        entries = [None] * len(clip.frames) if boxes is None else list(boxes)
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing and self._processor.box_detector is not None:
            found = find_boxes_of_frames(self._processor.box_detector, clip, missing, {})
            for index, entry in zip(missing, found, strict=True):
                entries[index] = entry
        try:
            features = self._processor.video_processor([clip], video_boxes=[entries], return_tensors="pt")
        except (TypeError, ValueError) as error:
            message = str(error).replace("video_boxes[0]", video.boxes_param)
            raise RequestError(message, video.param if video.boxes is None else video.boxes_param) from error
        return self._processor.take_videos(features, 0)

    def _encode_conversation(self, conversation: Conversation, images: list[Any], videos: list[Any]) -> Any:
        """Encode the text, and put the processed images and videos in their places."""
        options = {**self._template_kwargs}
        processed: dict[str, Any] = {}
        if images:
            processed["processed_images"] = self._processor.join_images(images)
        if videos:
            processed["processed_videos"] = self._processor.join_videos(videos)
        if processed:
            options["processor_kwargs"] = processed
        try:
            return encode_conversation(self._processor, conversation.messages, **options)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(str(error), conversation.param) from error

    def _encode_text(self, text: str) -> list[int]:
        tokenizer, placeholders = self._processor.tokenizer, self._placeholder_ids().values()
        tokens = [tokenizer.convert_ids_to_tokens(token_id) for token_id in placeholders]
        before, *others = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        ids: list[int] = self._processor(text=before)["input_ids"][0]
        for piece in filter(None, others):  # a prompt without images and videos: placeholders are text
            new = tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=piece in tokens)
            if not set(new).isdisjoint(placeholders):
                new = tokenizer.encode(f"{piece[0]} {piece[1:]}", add_special_tokens=False)
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
