"""Messages in OpenAI's form, checked, as a conversation for the processor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgllava.processing.boxes_mgllava import read_boxes
from mgllava.serving.errors import RequestError
from mgllava.serving.limits import MAX_TEXT_CHARACTERS, ServingLimits

# "developer" is OpenAI's newer name for it.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
_BOX_KEYS = {"boxes", "labels", "scores"}


@dataclass
class ImageSource:
    """An image of a request, before it is loaded.

    Attributes:
        url (`str`): http(s) URL or data URL.
        param (`str`): The field of the request.
        block (`dict`): The content block of the conversation that the image belongs to; its key `image` is to be set.
        data (`bytes`, *optional*): The file, once it is downloaded.
    """

    url: str
    param: str
    block: dict[str, Any]
    data: bytes | None = None


@dataclass
class Conversation:
    """A conversation for the processor.

    Attributes:
        messages (`list[dict]`): As [`MGLlavaProcessor.apply_chat_template`] takes them.
        images (`list[ImageSource]`): Its images, in order.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)


def read_messages(messages: Any, limits: ServingLimits, root: str = "messages") -> Conversation:
    """Check the messages of a request.

    Image parts may carry `boxes` beside `image_url`: a list of rows x1, y1, x2, y2, or a mapping with `boxes`,
    `labels` and `scores`; in pixels of the upright image. Without `boxes`, the processor's detector finds them.

    Args:
        messages: The field of the request.
        limits ([`ServingLimits`]): How many images and boxes there may be.
        root (`str`, *optional*, defaults to `"messages"`): Name of the field.

    Returns:
        [`Conversation`]: The conversation; its images are not loaded.

    Raises:
        RequestError: If something is not as it must be.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"`{root}` must be a list with at least one message, got {_shown(messages)}.", root)
    conversation = Conversation()
    characters = 0
    for index, message in enumerate(messages):
        param = f"{root}[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"`{param}` must be an object with role and content, got {_shown(message)}.", param)
        role = message.get("role")
        if role not in _ROLES:
            roles = ", ".join(map(repr, _ROLES))
            raise RequestError(f"`{param}.role` must be one of {roles}, got {_shown(role)}.", f"{param}.role")
        if message.get("tool_calls"):
            raise RequestError(f"`{param}.tool_calls` must be absent: MG-LLaVA calls no tools.", f"{param}.tool_calls")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RequestError(
                f"`{param}.content` must be text or a list of parts, got {_shown(content)}.", f"{param}.content"
            )
        blocks = [
            _read_part(part, f"{param}.content[{place}]", role, conversation.images, limits)
            for place, part in enumerate(parts)
        ]
        characters += sum(len(block.get("text", "")) for block in blocks)
        conversation.messages.append({"role": _ROLES[role], "content": blocks})
    check_text_length(characters, root)
    if conversation.messages[-1]["role"] != "user":
        raise RequestError(f"`{root}` must end with a message of the user, got one of the {role}.", root)
    return conversation


def check_text_length(characters: int, param: str) -> None:
    """Refuse texts that no context holds before they cost anything.

    Args:
        characters (`int`): Length.
        param (`str`): The field of the request.

    Raises:
        RequestError: If there are too many.
    """
    if characters > MAX_TEXT_CHARACTERS:
        raise RequestError(
            f"`{param}` must have at most {MAX_TEXT_CHARACTERS:,} characters of text, got {characters:,}.",
            param,
            "context_length_exceeded",
        )


def _read_part(part: Any, param: str, role: str, images: list[ImageSource], limits: ServingLimits) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RequestError(f"`{param}` must be an object with a type, got {_shown(part)}.", param)
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        if not isinstance(text := part.get("text"), str):
            raise RequestError(f"`{param}.text` must be a string, got {_shown(text)}.", f"{param}.text")
        return {"type": "text", "text": text}
    if kind not in _IMAGE_PARTS:
        kinds = ", ".join(map(repr, (*_TEXT_PARTS, *_IMAGE_PARTS)))
        raise RequestError(f"`{param}.type` must be one of {kinds}, got {_shown(kind)}.", f"{param}.type")

    if role != "user":
        raise RequestError(f"`{param}` must be text: images belong to messages of the user.", param)
    url, url_param = part.get("image_url"), f"{param}.image_url"
    if isinstance(url, Mapping):  # chat completions; in responses it is the string
        url, url_param = url.get("url"), f"{url_param}.url"
    if not isinstance(url, str) or not url.startswith(("http://", "https://", "data:")):
        raise RequestError(
            f"`{url_param}` must be an http(s) URL or a data URL, got {_shown(url)}.", url_param, "invalid_image_url"
        )
    if len(images) == limits.images:
        raise RequestError(f"`{param}` must not be there: a request has at most {limits.images} images.", param)
    block = {"type": "image", "image": None}
    if part.get("boxes") is not None:
        block["boxes"] = _read_boxes(part["boxes"], f"{param}.boxes", limits)
    images.append(ImageSource(url, url_param, block))
    return block


def _read_boxes(boxes: Any, param: str, limits: ServingLimits) -> Any:
    """Check what the processor checks too, under the name that the client knows."""
    rows: Any = boxes
    if isinstance(boxes, Mapping):
        if unknown := sorted(set(boxes) - _BOX_KEYS):
            raise RequestError(f"`{param}` may have {', '.join(sorted(_BOX_KEYS))}, got also {unknown}.", param)
        rows = boxes.get("boxes")
        labels = boxes.get("labels")
        if labels is not None and not (
            isinstance(labels, list) and all(isinstance(label, str | int) for label in labels)
        ):
            raise RequestError(f"`{param}.labels` must be a list of strings, got {_shown(labels)}.", f"{param}.labels")
        scores = boxes.get("scores")
        if scores is not None and not (
            isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
        ):
            raise RequestError(f"`{param}.scores` must be a list of numbers, got {_shown(scores)}.", f"{param}.scores")
    if not isinstance(rows, list):
        raise RequestError(f"`{param}` must be a list of x1, y1, x2, y2, got {_shown(rows)}.", param)
    if len(rows) > limits.boxes:
        raise RequestError(f"`{param}` must have at most {limits.boxes} boxes, got {len(rows)}.", param)
    try:
        read_boxes(boxes, param)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error), param) from None
    return boxes


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}" if value is not None else "nothing"
