"""Turn a sample, in LLaVA's or TRL's format, into the conversation that a chat template takes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mgllava.families import FAMILIES, Family, resolve
from mgllava.processing.boxes_mgllava import flatten_boxes
from mgllava.processing.text_chunks_common import IMAGE_TOKEN

from .errors import SampleError

logger = logging.getLogger(__name__)

BadSamples = Literal["error", "skip"]
MissingBoxes = Literal["error", "empty"]
_IMAGE_BLOCKS = ("image", "image_url")


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


def has_boxes(sample: Mapping[str, Any]) -> bool:
    """Tell whether a sample itself has boxes, in `boxes` or in the blocks of its messages."""
    contents = [message.get("content") for message in sample.get("messages") or () if isinstance(message, Mapping)]
    blocks = [block for content in contents if isinstance(content, list | tuple) for block in content]
    return sample.get("boxes") is not None or any(
        isinstance(block, Mapping) and block.get("boxes") is not None for block in blocks
    )


def to_conversation(sample: Mapping[str, Any], missing_boxes: MissingBoxes | None = "error") -> list[dict[str, Any]]:
    """Turn a sample into messages, each with `role` and a list of blocks; image blocks have the image and its boxes.

    As in the original, answers before the first question and a last question without an answer are dropped, and
    several questions in a row are joined.

    Args:
        sample (`Mapping`): Either LLaVA's format, `conversations` with turns of `from` and `value`, or `messages` with
            `role` and `content`. Images are in `image` or `images`, in the order of their `<image>`, or in the blocks.
            Boxes are in `boxes` (those of the only image, or a list with one entry for each image), or in the blocks.
        missing_boxes (`str`, *optional*): How to treat an image without boxes, see [`MGLlavaDataCollator`]. `None`:
            the model takes no boxes, so boxes are an error.

    Raises:
        SampleError: If turns, images and boxes do not match, or there is no answer.
    """
    name = sample_id(sample)
    images, boxes = sample_images(sample), sample.get("boxes")
    if boxes is not None and missing_boxes is None:
        raise SampleError(_no_boxes(name))
    try:
        entries = flatten_boxes(boxes, len(images))
    except (TypeError, ValueError) as error:
        raise SampleError(f"Sample {name} must have boxes for each image: {error}") from error
    if sample.get("messages") is not None:
        turns = [_read_message(message, name) for message in sample["messages"]]
    elif sample.get("conversations") is not None:
        turns = [_read_turn(turn, name) for turn in sample["conversations"]]
    else:
        raise SampleError(
            f"Sample {name} must have `conversations` or `messages`, got {', '.join(map(str, sample)) or 'nothing'}. "
            "A trainer drops columns that the model does not take, unless `remove_unused_columns=False`."
        )

    if next((role for role, _ in turns if role != "system"), "") == "assistant":
        _say_once(
            "leading answer",
            f"Sample {name} starts with an answer, which is dropped, as in the original. Others are not named.",
        )
    turns = _in_turn(turns)
    if not turns:
        raise SampleError(f"Sample {name} has no answer to learn.")
    placeholders = sum(block["type"] == "image" and "image" not in block for _, blocks in turns for block in blocks)
    if placeholders != len(images):
        raise SampleError(_other_number(name, len(images), placeholders))
    conversation: list[dict[str, Any]] = []
    pending = iter(zip(images, entries, strict=True))
    for role, blocks in turns:
        content = []
        for block in blocks:
            if block["type"] == "image" and "image" not in block:
                image, entry = next(pending)
                if entry is not None and block.get("boxes") is not None:
                    raise SampleError(f"Sample {name} must have boxes in `boxes` or in its image blocks, got both.")
                block = {"boxes": entry, **block, "image": image}
            content.append(_with_boxes(block, missing_boxes, name) if block["type"] in _IMAGE_BLOCKS else block)
        conversation.append({"role": role, "content": content})
    return conversation


def _other_number(name: str, num_images: int, num_placeholders: int) -> str:
    advice = f"Name each image in `image`, in the order of the {IMAGE_TOKEN}, or remove {IMAGE_TOKEN} from the text."
    if num_placeholders < num_images:
        advice = f"Write {IMAGE_TOKEN} into a question that has an answer, once for each image, or remove the images."
    return (
        f"Sample {name} must have one {IMAGE_TOKEN} in its questions for each image, got {num_placeholders} "
        f"{IMAGE_TOKEN} and {num_images} images. {advice}"
    )


def _with_boxes(block: dict[str, Any], missing_boxes: MissingBoxes | None, name: str) -> dict[str, Any]:
    """Return an image block with boxes if the model takes them, and without boxes otherwise."""
    if missing_boxes is None:
        if block.get("boxes") is not None:
            raise SampleError(_no_boxes(name))
        return {key: value for key, value in block.items() if key != "boxes"}
    if block.get("boxes") is not None:
        return block
    if missing_boxes == "error":
        raise SampleError(
            f"Sample {name} has an image without boxes. Run the detector on it (`mgllava detect`), or set "
            "`missing_boxes` to empty to treat it as an image without objects. If the dataset has boxes, the trainer "
            "dropped them: pass it `remove_unused_columns=False`."
        )
    return {**block, "boxes": []}


def _no_boxes(name: str) -> str:
    return f"Sample {name} has boxes, but this model takes none. Remove `boxes` from the samples."


def _read_turn(turn: Mapping[str, Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    role = {"human": "user", "gpt": "assistant", "system": "system"}.get(turn.get("from", ""))
    if role is None or not isinstance(turn.get("value"), str):
        raise SampleError(f"Sample {name} must have turns with `from` (human or gpt) and `value`, got {dict(turn)}.")
    return role, _split(turn["value"]) if role == "user" else [{"type": "text", "text": turn["value"]}]


def _read_message(message: Mapping[str, Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or content is None:
        raise SampleError(f"Sample {name} must have messages with `role` and `content`, got {dict(message)}.")
    if isinstance(content, str):
        return role, _split(content) if role == "user" else [{"type": "text", "text": content}]
    # Arrow gives all blocks the same keys and fills in None.
    blocks = [{key: value for key, value in block.items() if value is not None} for block in content]
    return role, [part for block in blocks for part in (_split(block["text"]) if "text" in block else [block])]


def _split(text: str) -> list[dict[str, Any]]:
    """Replace each `<image>` by a block before the text, which is where the chat template puts it in any case."""
    blocks: list[dict[str, Any]] = [{"type": "image"} for _ in range(text.count(IMAGE_TOKEN))]
    return [*blocks, {"type": "text", "text": text.replace(IMAGE_TOKEN, "")}]


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
    "has_boxes",
    "labels_of",
    "longest_text",
    "sample_id",
    "sample_images",
    "to_conversation",
]
