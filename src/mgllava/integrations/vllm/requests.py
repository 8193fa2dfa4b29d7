"""Requests that are read as by `mgllava serve`: its hosts, limits, messages and images."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from mgllava.families import takes_boxes
from mgllava.serving.errors import RequestError
from mgllava.serving.image_urls import DownloadRoom, ImageHosts, download_image
from mgllava.serving.images import decode_image, read_data_url
from mgllava.serving.messages import ImageSource, MessageReader

from .boxed_images import BoxedImage
from .options import PluginOptions


class RequestReader:
    """Reads the messages of requests with the checks of `mgllava serve`.

    Args:
        hosts ([`ImageHosts`]): Where images may be downloaded from.
        options ([`PluginOptions`]): Its limits.
        with_boxes (`bool`): Whether the model takes boxes.
    """

    def __init__(self, hosts: ImageHosts, options: PluginOptions, with_boxes: bool):
        self._hosts, self._limits = hosts, options.limits
        self._messages = MessageReader(options.limits, with_boxes, "the engine vLLM takes no videos of this model")

    @classmethod
    def of(cls, options: PluginOptions, processor: Any) -> "RequestReader | None":
        """Return a reader, or `None` if vLLM reads requests itself."""
        if options.allowed_image_hosts is None:
            return None
        return cls(ImageHosts.parse(options.allowed_image_hosts), options, takes_boxes(processor))

    async def read(self, messages: list[Any]) -> tuple[list[dict[str, Any]], list[BoxedImage]]:
        """Return messages whose image blocks have no images, and the images with their boxes.

        Raises a `ValueError` that names the field of the request.
        """
        try:
            conversation = self._messages.read(messages)
            room = DownloadRoom(self._limits.request_bytes)
            files = await asyncio.gather(*(self._file(image, room) for image in conversation.sources))
            pixels_left, images = self._limits.pixels, []
            for image, data in zip(conversation.sources, files, strict=True):
                picture = await asyncio.to_thread(decode_image, data, image.param, self._limits, pixels_left)
                pixels_left -= max(picture.size) ** 2
                images.append(BoxedImage(picture, image.boxes))
        except RequestError as error:
            raise ValueError(str(error)) from error
        return conversation.messages, images

    async def _file(self, image: ImageSource, room: DownloadRoom) -> bytes:
        if image.url[:5].lower() == "data:":
            return read_data_url(image.url, image.param, self._limits)
        return await download_image(image.url, image.param, self._hosts, self._limits, room)


class BoxesField:
    """ASGI middleware: moves the field `boxes` of a request into its image parts, where vLLM keeps it.

    vLLM ignores fields that it does not know. Errors have the form of vLLM's.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            body = boxes_into_parts(body)
        except ValueError as error:
            content = json.dumps({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}).encode()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": content})
            return None
        scope = {
            **scope,
            "headers": [
                (name, str(len(body)).encode() if name == b"content-length" else value)
                for name, value in scope["headers"]
            ],
        }
        is_read = False

        async def replay() -> Any:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)
        return None


def boxes_into_parts(body: bytes) -> bytes:
    """Move the field `boxes` of a request into its image parts; raise a `ValueError` if their numbers differ."""
    if b'"boxes"' not in body:
        return body
    try:
        request = json.loads(body)
    except ValueError:
        return body  # vLLM says what is wrong
    if not isinstance(request, dict):
        return body
    messages = request.get("messages") or request.get("input")
    parts = [
        part
        for message in (messages if isinstance(messages, list) else [])
        for part in (message.get("content") if isinstance(message, dict) else None) or []
        if isinstance(part, dict) and ("image" in str(part.get("type")) or "image_url" in part)
    ]
    for part in parts:  # vLLM would drop boxes there
        inner = part.get("image_url")
        if isinstance(inner, dict) and "boxes" in inner:
            if part.get("boxes") is not None:
                raise ValueError("`boxes` must be next to `image_url` or inside it, got both.")
            part["boxes"] = inner.pop("boxes")
    boxes = request.pop("boxes", None)
    if boxes is not None:
        if not isinstance(boxes, list) or len(boxes) != len(parts):
            raise ValueError(
                "`boxes` must be a list with one entry per image (null if its boxes should be found), got "
                f"{len(boxes) if isinstance(boxes, list) else 'no list'} for {len(parts)} images."
            )
        for index, (part, entry) in enumerate(zip(parts, boxes, strict=True)):
            if entry is None:
                continue
            if part.get("boxes") is not None:
                raise ValueError(f"`boxes[{index}]` must be null: the image has `boxes` already.")
            part["boxes"] = entry
    return json.dumps(request).encode()


__all__ = ["BoxesField", "RequestReader", "boxes_into_parts"]
