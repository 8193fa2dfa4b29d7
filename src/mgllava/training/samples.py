"""Turn a sample, in LLaVA's or TRL's format, into the conversation that a chat template takes."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from mgllava.families import FAMILIES, Family, resolve, takes_videos
from mgllava.processing.boxes_mgllava import flatten_boxes
from mgllava.processing.text_chunks_common import IMAGE_TOKEN

from .errors import SampleError

logger = logging.getLogger(__name__)

BadSamples = Literal["error", "skip"]
MissingBoxes = Literal["error", "empty"]
# The modality of each type of block.
_MODALITIES = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
# Keys of a block that hold an image or a video; a block without them stands for the next one of the sample.
_SOURCES = ("image", "video", "url", "path", "base64", "bytes", "image_url", "video_url")


def longest_text(processor: Any) -> int:
    """Return the longest training text, in tokens, of the family that a processor belongs to."""
    family = _family_of_processor(processor)
    if family is None or not family.max_text_length:
        raise ValueError(
            f"`max_text_length` must be given for a processor of type {type(processor).__name__}, whose family is "
            "unknown."
        )
    return family.max_text_length


def labels_of(processor: Any, must_be_known: bool) -> Any:
    """Return the object that knows the original's labels, `None` if the family of a processor has none.

    `must_be_known`: raise `ValueError` if there is none, or if it does not know the processor's chat template.
    """
    family = _family_of_processor(processor)
    labels: Any = None
    if family is not None and family.original_labels:
        labels = resolve(family.original_labels)(processor)
    if must_be_known and labels is None:
        raise ValueError(
            "`original_labels` must be false for a model whose original learns from every answer, got true for a "
            f"processor of type {type(processor).__name__}."
        )
    if must_be_known and labels.template is None:
        raise ValueError(
            "`original_labels` needs a chat template of the original, got another one. Set `prompt_template`, or "
            "leave `original_labels` out."
        )
    return labels


def _family_of_processor(processor: Any) -> Family | None:
    # Classes are compared by name, because remote code has its own copies of them.
    names = {kind.__name__ for kind in type(processor).__mro__}
    families = (family for family in FAMILIES.values() if family.processor)
    return next((family for family in families if str(family.processor).partition(":")[2] in names), None)


def sample_id(sample: Mapping[str, Any]) -> str:
    """Return the `id` of a sample or, if it has none, the start of its first turn, for messages."""
    if sample.get("id") is not None:
        return str(sample["id"])
    turns = sample.get("messages") or sample.get("conversations") or [""]
    return f"without an id ({str(turns[0])[:80]})"


def sample_images(sample: Mapping[str, Any]) -> list[Any]:
    """List the images of a sample: paths, PIL images or whatever else the processor takes."""
    images = sample.get("images") if sample.get("images") is not None else sample.get("image")
    if images is None or images == "":
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def sample_videos(sample: Mapping[str, Any]) -> list[Any]:
    """List the videos of a sample: paths, or whatever else the processor takes; a list of images is one video."""
    videos = sample.get("videos") if sample.get("videos") is not None else sample.get("video")
    if videos is None or videos == "":
        return []
    if not isinstance(videos, list | tuple) or (videos and all(isinstance(one, Image.Image) for one in videos)):
        return [videos]
    return list(videos)


def video_token_of(processor: Any) -> str | None:
    """Return the placeholder of videos of a processor that takes videos; `None` for all others."""
    return str(processor.video_token) if takes_videos(processor) else None


def frames_of_a_video(processor: Any) -> int | None:
    """Return how many frames are sampled from each video; `None` if that depends on the video, or there are none."""
    sampler = processor.video_processor if takes_videos(processor) else None
    if sampler is None or not sampler.do_sample_frames or sampler.fps is not None:
        return None
    return int(sampler.num_frames)


def has_boxes(sample: Mapping[str, Any]) -> bool:
    """Tell whether a sample itself has boxes, in `boxes` or `video_boxes` or in the blocks of its messages."""
    contents = [message.get("content") for message in sample.get("messages") or () if isinstance(message, Mapping)]
    blocks = [block for content in contents if isinstance(content, list | tuple) for block in content]
    return any(sample.get(name) is not None for name in ("boxes", "video_boxes")) or any(
        isinstance(block, Mapping) and block.get("boxes") is not None for block in blocks
    )


def to_conversation(
    sample: Mapping[str, Any], missing_boxes: MissingBoxes | None = "error", video_token: str | None = None
) -> list[dict[str, Any]]:
    """Turn a sample into messages with `role` and a list of blocks; those of images and videos have their boxes.

    As in the original, answers before the first question and a last question without an answer are dropped, and
    several questions in a row are joined.

    Args:
        sample (`Mapping`): Either LLaVA's format, `conversations` with turns of `from` and `value`, or `messages` with
            `role` and `content`. Images are in `image` or `images`, in the order of their `<image>`, or in the blocks;
            videos in `video` or `videos`, in the order of their `<video>`, or in the blocks. Boxes are in `boxes`
            (those of the only image, or a list with one entry for each image) and `video_boxes` (a list of one entry
            for each sampled frame, or one such list for each video; in a sample without images also `boxes`), or in
            the blocks.
        missing_boxes (`str`, *optional*): How to treat images and videos without boxes, see [`MGLlavaDataCollator`].
            `None`: the model takes no boxes, so boxes are an error.
        video_token (`str`, *optional*): The placeholder of videos. `None`: the model takes no videos, so videos are an
            error.

    Raises:
        SampleError: If turns, images, videos and boxes do not match, or there is no answer.
    """
    name = sample_id(sample)
    given = {"image": sample_images(sample), "video": sample_videos(sample)}
    if given["video"] and video_token is None:
        raise SampleError(_no_videos(name))
    if has_boxes(sample) and missing_boxes is None:
        raise SampleError(_no_boxes(name))
    tokens = {"image": IMAGE_TOKEN} | ({} if video_token is None else {"video": video_token})
    if sample.get("messages") is not None:
        turns = [_read_message(message, name, tokens) for message in sample["messages"]]
    elif sample.get("conversations") is not None:
        turns = [_read_turn(turn, name, tokens) for turn in sample["conversations"]]
    else:
        raise SampleError(
            f"Sample {name} must have `conversations` or `messages`, got {', '.join(map(str, sample)) or 'nothing'}. "
            "A trainer drops columns that the model does not take, unless `remove_unused_columns=False`."
        )
    entries = _entries(sample, len(given["image"]), len(given["video"]), name)

    if next((role for role, _ in turns if role != "system"), "") == "assistant":
        _say_once(
            "leading answer",
            f"Sample {name} starts with an answer, which is dropped, as in the original. Others are not named.",
        )
    turns = _in_turn(turns)
    if not turns:
        raise SampleError(f"Sample {name} has no answer to learn.")
    open_blocks = [block["type"] for _, blocks in turns for block in blocks if _is_open(block)]
    for modality, found in given.items():
        if open_blocks.count(modality) != len(found):
            raise SampleError(
                _other_number(name, modality, tokens.get(modality), len(found), open_blocks.count(modality))
            )
    pending = {modality: iter(zip(found, entries[modality], strict=True)) for modality, found in given.items()}
    conversation: list[dict[str, Any]] = []
    for role, blocks in turns:
        content = []
        for block in blocks:
            if block["type"] not in _MODALITIES:
                content.append(block)
                continue
            modality = _MODALITIES[block["type"]]
            if modality not in tokens:
                raise SampleError(_no_videos(name))
            if _is_open(block):
                source, entry = next(pending[modality])
                if entry is not None and block.get("boxes") is not None:
                    raise SampleError(
                        f"Sample {name} must have boxes in `boxes` or in its {modality} blocks, got both."
                    )
                block = {"boxes": entry, **block, modality: source}
            content.append(_with_boxes(block, modality, missing_boxes, name))
        conversation.append({"role": role, "content": content})
    return conversation


def _is_open(block: Mapping[str, Any]) -> bool:
    """Tell whether a block stands for the next image or video of the sample."""
    return block["type"] in ("image", "video") and not any(key in block for key in _SOURCES)


def _entries(sample: Mapping[str, Any], num_images: int, num_videos: int, name: str) -> dict[str, list[Any]]:
    """List the boxes in `boxes` and `video_boxes` for each image and each video of a sample."""
    boxes, video_boxes = sample.get("boxes"), sample.get("video_boxes")
    if num_videos and not num_images and video_boxes is None:
        boxes, video_boxes = None, boxes
    try:
        of_images = flatten_boxes(boxes, num_images)
    except (TypeError, ValueError) as error:
        raise SampleError(f"Sample {name} must have boxes for each image: {error}") from error
    videos = [None] * num_videos if video_boxes is None else video_boxes
    if num_videos == 1 and video_boxes is not None and _levels(video_boxes) < 4:
        videos = [video_boxes]
    if hasattr(videos, "ndim"):
        videos = list(videos)
    if not isinstance(videos, list | tuple) or len(videos) != num_videos:
        number = len(videos) if isinstance(videos, list | tuple) else 1
        raise SampleError(
            f"Sample {name} must have boxes for each video: `video_boxes` must have one list, with an entry for each "
            f"frame, per video, got {number} for {num_videos} videos."
        )
    return {"image": of_images, "video": list(videos)}


def _levels(boxes: Any) -> int:
    """Count the levels of nested boxes: 1 for a box, 2 for those of a frame, 3 of a video, 4 of several videos."""
    if isinstance(boxes, Mapping):
        return 3 if "frames" in boxes else 2
    if hasattr(boxes, "ndim"):
        return int(boxes.ndim)
    return 1 + max(map(_levels, boxes), default=0) if isinstance(boxes, list | tuple) else 0


def _other_number(name: str, modality: str, token: str | None, number: int, num_placeholders: int) -> str:
    shown = f"{token or modality + ' block'}"
    advice = f"Name each {modality} in `{modality}`, in the order of the {shown}, or remove {shown} from the text."
    if num_placeholders < number:
        advice = f"Write {shown} into a question that has an answer, once for each, or remove the {modality}s."
    return (
        f"Sample {name} must have one {shown} in its questions for each {modality}, got {num_placeholders} {shown} "
        f"and {number} {modality}s. {advice}"
    )


def _with_boxes(block: dict[str, Any], modality: str, missing_boxes: MissingBoxes | None, name: str) -> dict[str, Any]:
    """Return a block with boxes if the model takes them, and without boxes otherwise."""
    if missing_boxes is None:
        return {key: value for key, value in block.items() if key != "boxes"}
    if block.get("boxes") is not None:
        return block
    if missing_boxes == "error":
        raise SampleError(
            f"Sample {name} has {'an image' if modality == 'image' else 'a video'} without boxes. Run the detector on "
            f"it (`mgllava detect`), or set `missing_boxes` to empty to treat it as {modality}s without objects. If "
            "the dataset has boxes, the trainer dropped them: pass it `remove_unused_columns=False`."
        )
    return {**block, "boxes": []}


def _no_boxes(name: str) -> str:
    return f"Sample {name} has boxes, but this model takes none. Remove `boxes` from the samples."


def _no_videos(name: str) -> str:
    return (
        f"Sample {name} has a video, but this model takes none. Remove these samples, or train a model that takes "
        "videos: of MG-LLaVA, converted or built with them (for one that was saved without, see `mgllava.add_videos`)."
    )


def _read_turn(turn: Mapping[str, Any], name: str, tokens: Mapping[str, str]) -> tuple[str, list[dict[str, Any]]]:
    role = {"human": "user", "gpt": "assistant", "system": "system"}.get(turn.get("from", ""))
    if role is None or not isinstance(turn.get("value"), str):
        raise SampleError(f"Sample {name} must have turns with `from` (human or gpt) and `value`, got {dict(turn)}.")
    return role, _split(turn["value"], tokens) if role == "user" else [{"type": "text", "text": turn["value"]}]


def _read_message(
    message: Mapping[str, Any], name: str, tokens: Mapping[str, str]
) -> tuple[str, list[dict[str, Any]]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or content is None:
        raise SampleError(f"Sample {name} must have messages with `role` and `content`, got {dict(message)}.")
    if isinstance(content, str):
        return role, _split(content, tokens) if role == "user" else [{"type": "text", "text": content}]
    # Arrow gives all blocks the same keys and fills in None.
    blocks = [{key: value for key, value in block.items() if value is not None} for block in content]
    return role, [part for block in blocks for part in (_split(block["text"], tokens) if "text" in block else [block])]


def _split(text: str, tokens: Mapping[str, str]) -> list[dict[str, Any]]:
    """Replace each placeholder by a block before the text, which is where the chat template puts it in any case."""
    modalities = {token: modality for modality, token in tokens.items()}
    pattern = re.compile("|".join(map(re.escape, modalities)))
    blocks: list[dict[str, Any]] = [{"type": modalities[found]} for found in pattern.findall(text)]
    return [*blocks, {"type": "text", "text": pattern.sub("", text)}]


# What was said already, in this process and in those that were forked from it afterwards.
_SAID: set[str] = set()


def _say_once(kind: str, message: str) -> None:
    if kind not in _SAID:
        _SAID.add(kind)
        logger.warning(message)


def ends_with_question(sample: Mapping[str, Any]) -> bool:
    """Whether the last turn of a sample is a question, which [`to_conversation`] leaves out."""
    last = ((sample.get("messages") or sample.get("conversations")) or [{}])[-1]
    return last.get("role", last.get("from")) in ("user", "human")


def _in_turn(turns: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Make questions and answers alternate and end with an answer; two answers in a row get an empty question."""
    result: list[tuple[str, list[dict[str, Any]]]] = []
    for role, blocks in turns:
        last = result[-1][0] if result else None
        if role == "assistant" and last in (None, "system"):
            continue
        if role == "assistant" and last == "assistant":
            result.append(("user", [{"type": "text", "text": ""}]))
        if role == "user" and last == "user":
            result[-1] = ("user", [*result[-1][1], *blocks])
        else:
            result.append((role, blocks))
    while result and result[-1][0] != "assistant":
        result.pop()
    return result


__all__ = [
    "BadSamples",
    "MissingBoxes",
    "ends_with_question",
    "frames_of_a_video",
    "has_boxes",
    "labels_of",
    "longest_text",
    "sample_id",
    "sample_images",
    "sample_videos",
    "to_conversation",
    "video_token_of",
]
