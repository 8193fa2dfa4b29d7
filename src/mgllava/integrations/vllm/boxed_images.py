"""An image with its boxes as one item, so that caches and hashes of vLLM never separate them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from mgllava.processing.boxes_mgllava import boxes_of_block, flatten_boxes, plain_boxes

# Keys of an image block that hold the image, as transformers and this package write them.
_IMAGE_KEYS = ("image", "url", "path", "base64")


@dataclass(frozen=True)
class BoxedImage:
    """An image and its boxes.

    Attributes:
        image: The image in any form; `None` if vLLM has it in its cache, and the user names it by a uuid.
        boxes: Its boxes, as lists and numbers; `None` if they are not given.
        is_complete: Whether missing boxes have been looked for.
        text_ids: If the tokens of the image depend on the text: all ids of its prompt that are not placeholders.
    """

    image: Any
    boxes: Any = None
    is_complete: bool = False
    text_ids: tuple[int, ...] | None = None

    def company(self) -> str:
        """Write what belongs to the image, its boxes and the text, as a text that is equal if and only if they are."""
        return json.dumps(self.boxes if self.text_ids is None else [self.boxes, self.text_ids], sort_keys=True)

    def with_boxes(self, boxes: Any) -> "BoxedImage":
        """Return the image with boxes that were found, or `None`."""
        return replace(self, boxes=None if boxes is None else plain_boxes(boxes), is_complete=True)


def boxed_images(images: Any, boxes: Any = None) -> list[BoxedImage]:
    """List the images of a prompt with their boxes.

    Args:
        images: An image or a list of images, each also as a mapping `{"image": ..., "boxes": ...}`, or `None` in the
            list for an image that is named by a uuid.
        boxes: Their boxes in any form that the processor takes, one entry per image.

    Returns:
        `list[BoxedImage]`: The images.

    Raises:
        ValueError: If boxes are given twice, or their number is wrong.
    """
    rows = [_boxed(image) for image in _as_list(images)]
    if boxes is None:
        return rows
    entries = flatten_boxes(boxes, len(rows))
    for index, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        if entry is None:
            continue
        if row.boxes is not None and not row.is_complete:
            raise ValueError(f"`boxes[{index}]` must be None: image {index} has boxes already.")
        if not row.is_complete:
            rows[index] = BoxedImage(row.image, plain_boxes(entry))
    return rows


def _as_list(images: Any) -> Sequence[Any]:
    if isinstance(images, list | tuple):
        return images
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _boxed(image: Any) -> BoxedImage:
    if isinstance(image, BoxedImage):
        return image
    if isinstance(image, Mapping):
        if "image" not in image or set(image) - {"image", "boxes"}:
            raise ValueError(f"An image with boxes must have the keys 'image' and 'boxes', got {sorted(image)!r}.")
        boxes = boxes_of_block(image.get("boxes"))
        return BoxedImage(image["image"], None if boxes is None else plain_boxes(boxes))
    return BoxedImage(image)


def digest(image: Any) -> str:
    """Return a digest of an image, equal for equal files or equal pixels.

    Args:
        image: A Pillow image, array or tensor, or an object whose `original_bytes` are the file.

    Returns:
        `str`: The digest.
    """
    found = hashlib.sha256()
    data = getattr(image, "original_bytes", None)
    if data is not None:
        found.update(b"file" + data)
    elif isinstance(image, PIL.Image.Image):
        # The orientation and the palette change the image without changing its bytes.
        described = (image.mode, image.size, image.getexif().get(0x0112), image.info.get("transparency"))
        found.update(repr((described, image.getpalette())).encode())
        found.update(image.tobytes())
    else:
        array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
        array = np.ascontiguousarray(array.float().numpy() if isinstance(array, torch.Tensor) else array)
        found.update(repr((str(getattr(image, "dtype", "")), array.shape)).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def as_parts(messages: list[Any]) -> list[Any]:
    """Bring the image blocks of transformers and boxes inside `image_url` into the form that vLLM reads.

    Args:
        messages (`list`): Messages whose content may have blocks `{"type": "image", "image": ..., "boxes": ...}` (or
            `url`, `path`, `base64`) and parts `{"type": "image_url", "image_url": {"url": ...}, "boxes": ...}`.

    Returns:
        `list`: Messages in which all images are parts of vLLM, with `boxes` next to the image.

    Raises:
        ValueError: If a block has no image, or boxes twice.
    """
    return [
        {**message, "content": [_as_part(part) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def _as_part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "image":
        given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(given) != 1:
            raise ValueError(f"An image block must have one of {', '.join(_IMAGE_KEYS)}, got {given or 'none'}.")
        rest = {key: value for key, value in part.items() if key not in ("type", *_IMAGE_KEYS, "mime_type")}
        value = part[given[0]]
        if given[0] == "base64":
            value = f"data:{part.get('mime_type', 'image/png')};base64,{value}"
        elif given[0] == "path":
            value = PIL.Image.open(value)
        if isinstance(value, str):
            return {"type": "image_url", "image_url": {"url": value}, **rest}
        return {"type": "image_pil", "image_pil": value, **rest}
    inner = part.get("image_url")
    if isinstance(inner, Mapping) and inner.get("boxes") is not None:
        if part.get("boxes") is not None:
            raise ValueError("`boxes` must be next to `image_url` or inside it, got both.")
        return {**part, "image_url": {key: inner[key] for key in inner if key != "boxes"}, "boxes": inner["boxes"]}
    return part


def boxes_in_parts(messages: list[Any]) -> list[Any]:
    """List the boxes of the images of messages, `None` where they are not given.

    Args:
        messages (`list`): Messages with parts of vLLM, as [`as_parts`] returns them.

    Returns:
        `list`: One entry per image.

    Raises:
        ValueError: If boxes are somewhere else.
    """
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if not isinstance(part, Mapping):
                continue
            if "image_url" in part or "image_pil" in part:
                found.append(boxes_of_block(part.get("boxes")))
            elif part.get("boxes") is not None:
                raise ValueError(f"`boxes` must be next to an image, got them in a part of type {part.get('type')!r}.")
    return found


def run_lengths(ids: Sequence[int], image_token_id: int, lengths: Sequence[int]) -> list[int]:
    """Return ids in which each image is one placeholder, whether or not its run was written already.

    Args:
        ids (`list[int]`): Ids of a prompt, with one placeholder per image, or with the runs that the processor writes.
        image_token_id (`int`): The placeholder.
        lengths (`list[int]`): Numbers of placeholders of the images, in order.

    Returns:
        `list[int]`: The ids with one placeholder per image.

    Raises:
        ValueError: If the prompt has other numbers of placeholders.
    """
    count = list(ids).count(image_token_id)
    if count == len(lengths):
        return list(ids)
    if count == sum(lengths):
        kept, runs, left = [], iter(lengths), 0
        for token in ids:
            if token != image_token_id:
                if left:
                    break
                kept.append(token)
                continue
            if not left:
                kept.append(token)
                left = next(runs)
            left -= 1
        else:
            return kept
    raise ValueError(
        f"The prompt must have one placeholder (id {image_token_id}) per image, or the runs of {list(lengths)} that "
        f"the processor writes, got {count} placeholders for {len(lengths)} images."
    )


__all__ = ["BoxedImage", "as_parts", "boxed_images", "boxes_in_parts", "digest", "run_lengths"]
