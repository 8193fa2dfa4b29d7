"""Check OpenAI-style messages and turn them into a conversation for the processor."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError
from .limits import MAX_MESSAGES, MAX_PARTS, MAX_TEXT_CHARACTERS, ServingLimits
from .values import is_number, shown, wrong_value

# "developer" is OpenAI's newer name for "system".
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_IMAGE_PARTS = ("image_url", "input_image", "image")
_VIDEO_PART = "video_url"
_BOX_KEYS = {"boxes", "labels", "scores"}
_DETAILS = ("auto", "low", "high", "original")
# `name`, `id` and `status` do not change the answer. Others are accepted if they are empty: clients that send an
# answer back send all keys that it came with.
_MESSAGE_KEYS = {"role", "content", "name", "id", "type", "status"}


@dataclass
class ImageSource:
    """An image of a request, before it is loaded.

    Attributes:
        url: http(s) URL or data URL.
        param: The field of the request that has it.
        boxes: Its boxes; `None` if the detector should find them.
        boxes_param: The field of the request that has the boxes.
        data: The file, once it is downloaded.
    """

    url: str
    param: str
    boxes: Any = None
    boxes_param: str = "boxes"
    data: bytes | None = None


@dataclass
class VideoSource(ImageSource):
    """A video of a request, before it is loaded.

    Attributes:
        num_frames: How many frames are sampled; `None`: as many as the server samples by default.
        num_frames_param: The field of the request that has this number.
    """

    num_frames: int | None = None
    num_frames_param: str = "num_frames"


@dataclass
class Conversation:
    """A conversation for the processor.

    Attributes:
        param: The field of the request that has it.
        messages: Messages for `apply_chat_template`, in which the blocks of images and videos have none.
        sources: The images and videos of these blocks, in order.
    """

    param: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    sources: list[ImageSource] = field(default_factory=list)

    @property
    def videos(self) -> list[VideoSource]:
        """The videos, in order."""
        return [source for source in self.sources if isinstance(source, VideoSource)]


class MessageReader:
    """Reads the messages of requests.

    Image parts may have `boxes` if the model takes them: a list of rows x1, y1, x2, y2, or a mapping with `boxes`,
    `labels` and `scores`; in pixels of the upright image. Without `boxes`, the processor's box detector finds them.
    Video parts may have a list with such an entry for each sampled frame, or a mapping with this list as `frames`.
    `no_videos` says why videos are refused, if they are.
    """

    def __init__(self, limits: ServingLimits, takes_boxes: bool, no_videos: str | None = None):
        self._limits, self._takes_boxes, self._no_videos = limits, takes_boxes, no_videos

    def read(
        self, messages: Any, root: str = "messages", instructions: str | None = None, boxes: Any = None
    ) -> Conversation:
        """Check messages and bring them into the order that chat templates expect, see [`in_trained_order`].

        `root` is the field that has them; `instructions` is a system message that comes first. `boxes` is the field
        `boxes` of the request, one entry per image and video, for clients that cannot write boxes into parts.
        """
        if not isinstance(messages, list) or not messages:
            raise wrong_value(root, "a list with at least one message", messages)
        if len(messages) > MAX_MESSAGES:
            raise RequestError(f"`{root}` must have at most {MAX_MESSAGES} messages, got {len(messages)}.", root)
        conversation = Conversation(root)
        turns: list[dict[str, Any]] = []
        characters = parts = 0
        for index, message in enumerate(messages):
            param = f"{root}[{index}]"
            role, content = _read_message(message, param)
            parts += len(content)
            if parts > MAX_PARTS:
                raise RequestError(f"`{root}` must have at most {MAX_PARTS} parts in all messages, got more.", root)
            blocks = [
                self._read_part(part, f"{param}.content[{place}]", role, conversation.sources)
                for place, part in enumerate(content)
            ]
            characters += sum(len(block.get("text", "")) for block in blocks)
            turns.append({"role": role, "content": blocks})
        check_text_length(characters, root)
        if boxes is not None:
            self._distribute_boxes(boxes, conversation.sources)
        if instructions is not None:
            turns.insert(0, {"role": "system", "content": [_text(instructions)]})
        conversation.messages = in_trained_order(turns)
        return conversation

    def _read_part(self, part: Any, param: str, role: str, sources: list[ImageSource]) -> dict[str, Any]:
        """Return a part as a block of the conversation; append an image or video to `sources`."""
        if not isinstance(part, Mapping):
            raise wrong_value(param, "an object with a type", part)
        kind = part.get("type")
        if isinstance(kind, str) and kind in _TEXT_PARTS:
            key = "refusal" if kind == "refusal" else "text"
            if not isinstance(text := part.get(key), str):
                raise wrong_value(f"{param}.{key}", "a string", text)
            _check_keys(part, {"type", key}, param)
            return _text(text)
        if not isinstance(kind, str) or kind not in (*_IMAGE_PARTS, _VIDEO_PART):
            kinds = ", ".join(map(repr, (*_TEXT_PARTS, *_IMAGE_PARTS, _VIDEO_PART)))
            raise wrong_value(f"{param}.type", f"one of {kinds}", kind)
        if role != "user":
            raise RequestError(f"`{param}` must be text: only messages of the user may have images and videos.", param)
        is_video = kind == _VIDEO_PART
        modality, most = ("video", self._limits.videos) if is_video else ("image", self._limits.images)
        if is_video and self._no_videos is not None:
            raise RequestError(f"`{param}` must be absent: {self._no_videos}.", param, "unsupported")
        if sum(isinstance(source, VideoSource) == is_video for source in sources) == most:
            raise RequestError(
                f"`{param}` must be absent: a request may have at most {most} {modality}s (`--max-{modality}s`).",
                param,
            )
        if kind == "image":
            source = _read_image_block(part, param)
        else:
            source = _read_video_url(part, param) if is_video else _read_image_url(part, param)
        if not source.url.lower().startswith(("http://", "https://", "data:")):
            raise wrong_value(source.param, "an http(s) URL or a data URL", source.url, code=f"invalid_{modality}_url")
        if source.boxes is not None:
            self._check_source_boxes(source)
        sources.append(source)
        return {"type": modality}

    def _distribute_boxes(self, boxes: Any, sources: list[ImageSource]) -> None:
        """Assign the boxes in the request's own field to its images and videos."""
        if not isinstance(boxes, list) or len(boxes) != len(sources):
            got = f"{len(boxes)} entries" if isinstance(boxes, list) else shown(boxes)
            raise RequestError(
                "`boxes` must be a list with one entry per image and video (null if its boxes should be found), got "
                f"{got} for {len(sources)} images and videos.",
                "boxes",
            )
        for index, (entry, source) in enumerate(zip(boxes, sources, strict=True)):
            if entry is None:
                continue
            if source.boxes is not None:
                raise RequestError(f"`boxes[{index}]` must be null: there is `{source.boxes_param}` already.", "boxes")
            source.boxes, source.boxes_param = entry, f"boxes[{index}]"
            self._check_source_boxes(source)

    def _check_source_boxes(self, source: ImageSource) -> None:
        """Check the boxes of an image, or those of each frame of a video."""
        if not isinstance(source, VideoSource):
            return self._check_boxes(source.boxes, source.boxes_param)
        if isinstance(source.boxes, Mapping) and set(source.boxes) == {"frames"}:
            source.boxes, source.boxes_param = source.boxes["frames"], f"{source.boxes_param}.frames"
        if not isinstance(source.boxes, list):
            raise wrong_value(source.boxes_param, "a list with one entry per sampled frame", source.boxes)
        for frame, boxes in enumerate(source.boxes):
            if boxes is not None:
                self._check_boxes(boxes, f"{source.boxes_param}[{frame}]")
        return None

    def _check_boxes(self, boxes: Any, param: str) -> None:
        """Check the types and the number of boxes; the processor checks the rest once it has the image."""
        if not self._takes_boxes:
            raise RequestError(f"`{param}` must be absent: this model has no boxes.", param, "unsupported")
        rows: Any = boxes
        if isinstance(boxes, Mapping):
            if unknown := sorted(set(boxes) - _BOX_KEYS):
                known = ", ".join(sorted(_BOX_KEYS))
                raise RequestError(f"`{param}` may have {known}, got also {str(unknown)[:80]}.", param)
            rows, labels, scores = boxes.get("boxes"), boxes.get("labels"), boxes.get("scores")
            if not _is_list(labels, lambda label: isinstance(label, str | int)):
                raise wrong_value(f"{param}.labels", "a list of strings", labels)
            if not _is_list(scores, is_number):
                raise wrong_value(f"{param}.scores", "a list of numbers", scores)
        if not isinstance(rows, list):
            raise wrong_value(param, "a list of x1, y1, x2, y2", rows)
        if len(rows) > self._limits.boxes:
            raise RequestError(f"`{param}` must have at most {self._limits.boxes} boxes, got {len(rows)}.", param)
        for index, row in enumerate(rows):
            if not isinstance(row, list) or not all(map(is_number, row)):
                raise wrong_value(f"{param}[{index}]", "four numbers", row, param=param)


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Tell whether an optional value is a list of valid values."""
    return value is None or (isinstance(value, list) and all(map(is_valid, value)))


def _read_message(message: Any, param: str) -> tuple[str, list[Any]]:
    """Check a message except for its parts; return its role and its parts."""
    if not isinstance(message, Mapping):
        raise wrong_value(param, "an object with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        roles = ", ".join(map(repr, _ROLES))
        raise wrong_value(f"{param}.role", f"one of {roles}", role)
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and value not in (None, "", [], {}):
            reason = "this model does not call tools" if key == "tool_calls" else "this server does not know it"
            raise RequestError(f"`{param}.{key[:50]}` must be absent: {reason}.", f"{param}.{key[:50]}")
    for key in ("name", "id", "status"):
        if not isinstance(message.get(key), str | None):
            raise wrong_value(f"{param}.{key}", "a string", message[key])
    if message.get("type") not in (None, "message"):
        raise wrong_value(f"{param}.type", "'message'", message["type"])
    content = message.get("content")
    if role == "assistant" and content is None:
        content = ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not (content or role == "assistant"):
        raise wrong_value(f"{param}.content", "text or a list of parts", content)
    return _ROLES[role], content


def in_trained_order(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring turns into the order of training: at most one system message, then user and assistant in turn.

    System messages are joined at the start; several messages of one role are joined with a line break; an empty user
    message comes before an assistant that speaks first and after one that speaks last.
    """
    ordered: list[dict[str, Any]] = []
    system = [turn for turn in turns if turn["role"] == "system"]
    for turn in [*system, *(turn for turn in turns if turn["role"] != "system")]:
        before = ordered[-1] if ordered else None
        if before is not None and before["role"] == turn["role"]:
            if _has_text(before) and _has_text(turn):
                before["content"].append(_text("\n"))
            before["content"] += turn["content"]
            continue
        if turn["role"] == "assistant" and (before is None or before["role"] != "user"):
            ordered.append({"role": "user", "content": [_text("")]})
        ordered.append(turn)
    if ordered[-1]["role"] != "user":
        ordered.append({"role": "user", "content": [_text("")]})
    for turn in ordered:
        turn["content"] = _with_texts_joined(turn["content"])
    return ordered


def _has_text(turn: Mapping[str, Any]) -> bool:
    return any(block.get("text") for block in turn["content"])


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _with_texts_joined(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighboring texts: templates append piece by piece, which takes quadratic time."""
    joined: list[dict[str, Any]] = []
    for kind, group in itertools.groupby(blocks, lambda block: block["type"]):
        members = list(group)
        joined += [_text("".join(block["text"] for block in members))] if kind == "text" else members
    return joined or [_text("")]


def check_text_length(characters: int, param: str) -> None:
    """Refuse texts that are too long for any context before work is done for them."""
    if characters > MAX_TEXT_CHARACTERS:
        raise RequestError(
            f"`{param}` must have at most {MAX_TEXT_CHARACTERS:,} characters of text, got {characters:,}.",
            param,
            "context_length_exceeded",
        )


def _read_image_url(part: Mapping[str, Any], param: str) -> ImageSource:
    """Read OpenAI's parts; `boxes` may be next to `image_url` or inside it, which is where some clients put them."""
    _check_keys(part, {"type", "image_url", "detail", "boxes"}, param)
    url, url_param = part.get("image_url"), f"{param}.image_url"
    found = [(f"{param}.boxes", part.get("boxes"))]
    _check_detail(part, param)
    if isinstance(url, Mapping):  # chat completions; in responses it is the string
        _check_keys(url, {"url", "detail", "boxes"}, url_param)
        _check_detail(url, url_param)
        found.append((f"{url_param}.boxes", url.get("boxes")))
        url, url_param = url.get("url"), f"{url_param}.url"
    return _image_source(url, url_param, found)


def _read_video_url(part: Mapping[str, Any], param: str) -> VideoSource:
    """Read a video part, which has the form of OpenAI's image parts; `num_frames` may be where `boxes` may be."""
    known = {"url", "boxes", "num_frames"}
    _check_keys(part, {"type", "video_url", *known} - {"url"}, param)
    places = [(param, part)]
    url, url_param = part.get(_VIDEO_PART), f"{param}.{_VIDEO_PART}"
    if isinstance(url, Mapping):
        _check_keys(url, known, url_param)
        places.append((url_param, url))
        url, url_param = url.get("url"), f"{url_param}.url"
    boxes, num_frames = (
        _one_of([(f"{place}.{key}", values.get(key)) for place, values in places]) for key in ("boxes", "num_frames")
    )
    if not isinstance(url, str):
        raise wrong_value(url_param, "an http(s) URL or a data URL", url, code="invalid_video_url")
    number = num_frames[1]
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise wrong_value(num_frames[0], "a whole number, at least 1", number)
    return VideoSource(url, url_param, boxes[1], boxes[0], num_frames=number, num_frames_param=num_frames[0])


def _one_of(found: list[tuple[str, Any]]) -> tuple[str, Any]:
    """Return the field that is given, with its value; refuse a second one."""
    given = [(param, value) for param, value in found if value is not None]
    if len(given) > 1:
        raise RequestError(f"`{given[1][0]}` must be absent: there is `{given[0][0]}` already.", given[1][0])
    return given[0] if given else (found[0][0], None)


def _read_image_block(part: Mapping[str, Any], param: str) -> ImageSource:
    """Read LangChain's blocks, which have `url`, or `base64` (formerly `data`) with `mime_type`."""
    known = {"type", "url", "base64", "data", "mime_type", "source_type", "boxes", "extras", "id", "index"}
    _check_keys(part, known, param)
    found = [(f"{param}.boxes", part.get("boxes"))]
    if (extras := part.get("extras")) is not None:  # LangChain puts keys there that it does not know
        if not isinstance(extras, Mapping):
            raise wrong_value(f"{param}.extras", "an object", extras)
        _check_keys(extras, {"boxes", "detail"}, f"{param}.extras")
        _check_detail(extras, f"{param}.extras")
        found.append((f"{param}.extras.boxes", extras.get("boxes")))
    given = [key for key in ("url", "base64", "data") if part.get(key) is not None]
    if len(given) != 1 or not isinstance(part[given[0]], str):
        raise RequestError(
            f"`{param}` must have `url`, or `base64` with `mime_type`, got {given or 'neither'}.", param
        )
    url = part[given[0]]
    if given[0] != "url":
        mime_type = part.get("mime_type")
        if not isinstance(mime_type, str):
            raise wrong_value(f"{param}.mime_type", "a string such as 'image/png'", mime_type)
        url = f"data:{mime_type};base64,{url}"
    return _image_source(url, f"{param}.{given[0]}", found)


def _image_source(url: Any, url_param: str, found: list[tuple[str, Any]]) -> ImageSource:
    if not isinstance(url, str):
        raise wrong_value(url_param, "an http(s) URL or a data URL", url, code="invalid_image_url")
    boxes_param, boxes = _one_of(found)
    return ImageSource(url, url_param, boxes, boxes_param)


def _check_keys(part: Mapping[str, Any], known: set[str], param: str) -> None:
    """Refuse keys that would be ignored, unless they are empty as in an answer that is sent back."""
    for key, value in part.items():
        if key not in known and value not in (None, "", [], {}):
            name = f"{param}.{key[:50]}"
            raise RequestError(
                f"`{name}` must be absent: this server does not know it. It knows {', '.join(sorted(known))}.", name
            )


def _check_detail(part: Mapping[str, Any], param: str) -> None:
    """Check OpenAI's `detail`, which has no effect: the processor alone decides about the resolution."""
    if (detail := part.get("detail")) is not None and detail not in _DETAILS:
        kinds = ", ".join(map(repr, _DETAILS))
        raise wrong_value(f"{param}.detail", f"one of {kinds}", detail)


__all__ = ["Conversation", "ImageSource", "MessageReader", "VideoSource", "check_text_length", "in_trained_order"]
