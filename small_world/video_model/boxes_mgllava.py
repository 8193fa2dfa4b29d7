"""Boxes: from those of a detector or a user to the model's `boxes` input (MG-LLaVA, arXiv 2406.17770, section 3.2).

Two frames occur, both with boxes as xyxy in pixels: the *original image* (after its EXIF orientation is applied) and
the *model input*, the square that the vision towers see (768 × 768 for the published models). The original code works
in float32 on the CPU; so does this module, whatever the model's dtype is. Boxes in the model's frame are whole numbers
and are returned as int64: trainers and serving engines cast every floating point input to the model's dtype, and
bfloat16 turns 259 into 260.
"""

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal

import torch
from torchvision.ops import nms
from transformers.utils import logging

# The keys of a mapping of boxes.
_KEYS = ("boxes", "scores", "labels")

logger = logging.get_logger(__name__)

BoxLimitMode = Literal["per_category", "per_image"]
Label = Hashable

# Private-use characters around the boxes of an image that a rendered conversation holds after its placeholder.
_START, _END = "\U000ff4e0", "\U000ff4e1"
BOX_MARKS = re.compile(f"[{_START}{_END}]")

# How many boxes the original keeps when a limit applies.
_PER_CATEGORY = 20
_PER_CATEGORY_SMALL_LIMIT = 5  # ... when the limit is below _SMALL_LIMIT
_SMALL_LIMIT = 50
_PER_CATEGORY_LONG_TEXT = 1  # ... when the text leaves little room
_PER_IMAGE_LONG_TEXT = 20


def prepare_boxes(
    entry: Any,
    image_size: tuple[int, int],
    *,
    resize_to: int | None,
    crop_to: tuple[int, int] | None,
    pad_to_square: bool,
    iou_threshold: float = 0.2,
    limit_mode: BoxLimitMode = "per_category",
    limit: int | None = 100,
    close_to_max_length: bool = False,
    per_category: int | None = None,
    name: str = "boxes",
) -> tuple[torch.Tensor, list[Label]]:
    """Turn the boxes of one image into rows of the model's `boxes` input.

    Example:
        A 200 × 100 image (width × height) is padded to 200 × 200 with 50 rows above and scaled by 768 / 200 = 3.84, so
        `[[10, 20, 110, 70]]` becomes `[[38, 269, 422, 461]]`.

    Args:
        entry (`Mapping`, array of shape `(num_boxes, 4)` or `None`):
            xyxy in pixels of the original image. A mapping with `boxes`, `scores` and (optional) `labels` is detector
            output: it goes through NMS and the limit, and comes back best first (regrouped by label where the limit
            per category applied); boxes outside the image are dropped, as in the original. A bare array, or a mapping
            without `scores`, is the user's own choice of regions: their order and number are kept; see
            [`read_boxes_of_image`] for what is refused. `None`: no boxes.
        image_size (`tuple[int, int]`): `(height, width)` of the original image.
        resize_to (`int`, *optional*): Length of the short side after resizing; `None` if images are not resized.
        crop_to (`tuple[int, int]`, *optional*): `(height, width)` of the center crop; `None` if nothing is cropped.
        pad_to_square (`bool`): Whether the image is padded to a square before resizing.
        iou_threshold (`float`): See [`nms_per_label`].
        limit_mode (`str`): `"per_category"` or `"per_image"`, see [`limit_boxes`].
        limit (`int`, *optional*): Number of boxes above which the limit applies; `None` for no limit.
        close_to_max_length (`bool`): Whether the text leaves little room, see [`limit_boxes`].
        per_category (`int`, *optional*): Number of boxes per label if the limit applies, see [`limit_boxes`].
        name (`str`): Name of the entry in error messages.

    Returns:
        `tuple[torch.Tensor, list]`: int64 boxes of shape `(n, 4)`, n >= 1, xyxy in pixels of the model input; and
        their labels (empty if none were given). If no box is left it is the single box `[0, 0, 0, 0]` without a
        label, from which the model still pools a feature.

    Raises:
        TypeError: If the entry is neither a mapping nor an array.
        ValueError: If shapes, values or lengths are wrong, a region does not lie in the image, or `limit_mode` is
            unknown.
    """
    boxes, objects = select_objects(
        entry,
        image_size,
        resize_to=resize_to,
        crop_to=crop_to,
        pad_to_square=pad_to_square,
        iou_threshold=iou_threshold,
        limit_mode=limit_mode,
        limit=limit,
        close_to_max_length=close_to_max_length,
        per_category=per_category,
        name=name,
    )
    return (boxes, objects.get("labels", [])) if len(boxes) else (torch.zeros(1, 4, dtype=torch.int64), [])


def select_objects(
    entry: Any,
    image_size: tuple[int, int],
    *,
    resize_to: int | None,
    crop_to: tuple[int, int] | None,
    pad_to_square: bool,
    iou_threshold: float,
    limit_mode: BoxLimitMode,
    limit: int | None,
    close_to_max_length: bool = False,
    per_category: int | None = None,
    name: str = "boxes",
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Select the boxes that the model gets; arguments and errors are those of [`prepare_boxes`].

    Returns int64 boxes of shape `(n, 4)` in pixels of the model input, n >= 0; and of the same boxes `boxes` (float32,
    in pixels of the original image), and `labels` and `scores` if they were given.
    """
    given, labels, scores = read_boxes_of_image(entry, image_size, name)
    boxes, kept = given, list(range(len(given)))
    if pad_to_square:
        boxes = boxes + padding_offset(image_size)
        image_size = (max(image_size), max(image_size))
    if scores is not None:
        names = labels or [None] * len(boxes)
        kept = nms_per_label(boxes, scores, names, iou_threshold)
        chosen = limit_boxes([names[row] for row in kept], limit_mode, limit, close_to_max_length, per_category)
        kept = [kept[row] for row in chosen]
    boxes, inside = to_model_frame(boxes[kept], image_size, resize_to=resize_to, crop_to=crop_to)
    if scores is None and (index := _first(~inside)) is not None:
        raise ValueError(
            f"`{name}` must lie where the model looks, got {given[index].tolist()} at index {index}, which the crop "
            "of the center cuts off. Remove it, or pass `do_pad=True` to show the model the whole image."
        )
    kept = [row for row, is_inside in zip(kept, inside.tolist(), strict=True) if is_inside]
    objects: dict[str, Any] = {"boxes": given[kept]}
    if labels is not None:
        objects["labels"] = [labels[row] for row in kept]
    if scores is not None:
        objects["scores"] = scores[kept]
    return boxes, objects


def read_boxes_of_image(
    entry: Any, image_size: tuple[int, int], name: str = "boxes"
) -> tuple[torch.Tensor, list[Label] | None, torch.Tensor | None]:
    """Read the boxes of one image like [`read_boxes`], and check that they are in pixels of that image.

    The boxes of a detector (with scores) are kept unchanged, as in the original. Regions that a user chose must lie in
    the image (`image_size` is `(height, width)`): a box that crosses its edge by a pixel or more is clipped with a
    warning. Integers may lie in the first pixel, but fractions between 0 and 1 there mean relative coordinates. The
    box [0, 0, 0, 0] means "no object" and is kept.
    """
    boxes, labels, scores = read_boxes(entry, name)
    if scores is None:
        rows = entry["boxes"] if isinstance(entry, Mapping) else entry
        boxes = _check_regions(boxes, image_size, name, _are_integers(rows))
    elif len(boxes) and max(image_size) > 2 and _look_relative(boxes, are_integers=True).all():
        logger.warning_once(
            f"All boxes of `{name}` lie within the first pixel of an image of {_size(image_size)} pixels, so they "
            "seem to be relative to its size: multiply x by the width and y by the height."
        )
    return boxes, labels, scores


def _check_regions(boxes: torch.Tensor, image_size: tuple[int, int], name: str, are_integers: bool) -> torch.Tensor:
    """Check regions that a user chose, and clip them to the image."""
    if len(boxes) == 0:
        return boxes
    height, width = image_size
    size = _size(image_size)
    if max(image_size) > 2 and (index := _first(_look_relative(boxes, are_integers))) is not None:
        raise ValueError(
            f"`{name}` must be x1, y1, x2, y2 in pixels of the upright image ({size}, width x height), got "
            f"{boxes[index].tolist()} at index {index}, which looks relative to its size. Multiply x by the width and "
            "y by the height. If the first pixel is meant, pass integers."
        )
    edges = boxes.new_tensor([width, height, width, height])
    is_nothing = (boxes == 0).all(dim=1)
    outside = ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= edges[:2])).any(dim=1) & ~is_nothing
    if (index := _first(outside)) is not None:
        raise ValueError(
            f"`{name}` must lie in the upright image ({size}, width x height), got {boxes[index].tolist()} at index "
            f"{index}, which is outside of it ({int(outside.sum())} such boxes). Pass pixels of the image that is "
            "given here, after its EXIF orientation is applied and before any resizing; remove boxes outside of it."
        )
    clipped = boxes.clamp(min=0).minimum(edges)
    over = ((boxes - clipped).abs() >= 1).any(dim=1)
    if (index := _first(over)) is not None:
        logger.warning_once(
            f"`{name}` reach over the edge of the image ({size}, width x height) and are clipped to it: "
            f"{boxes[index].tolist()} at index {index} ({int(over.sum())} such boxes)."
        )
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(dim=1) & ~is_nothing
    if (index := _first(empty)) is not None:
        logger.warning_once(
            f"`{name}` have no area, so that the model sees a line or a point: {boxes[index].tolist()} at index "
            f"{index} ({int(empty.sum())} such boxes)."
        )
    return clipped


def _first(rows: torch.Tensor) -> int | None:
    """Return the index of the first row that is true, if there is one."""
    indices = rows.nonzero()
    return int(indices[0]) if len(indices) else None


def _size(image_size: tuple[int, int]) -> str:
    """Format a `(height, width)` for an error."""
    return f"{image_size[1]} x {image_size[0]}"


def _look_relative(boxes: torch.Tensor, are_integers: bool) -> torch.Tensor:
    """Tell which boxes seem to lie in the first pixel by mistake: those with fractions, or all if they are floats."""
    in_first_pixel = ((boxes > -0.5) & (boxes < 1.5)).all(dim=1)
    has_fraction = (boxes != boxes.round()).any(dim=1)
    if are_integers or not bool(in_first_pixel.all()) or not bool((boxes != 0).any()):
        return in_first_pixel & has_fraction
    return in_first_pixel


def _are_integers(rows: Any) -> bool:
    """Tell whether coordinates were given as integers."""
    if isinstance(rows, torch.Tensor):
        return not rows.is_floating_point()
    if hasattr(rows, "dtype"):
        return bool(rows.dtype.kind in "biu")
    if isinstance(rows, list | tuple):
        return all(_are_integers(row) for row in rows)
    return isinstance(rows, int) or rows is None


def flatten_boxes(boxes: Any, num_images: int, group_sizes: Sequence[int] | None = None) -> list[Any]:
    """List one entry (see [`prepare_boxes`]) per image, in the order of the images, however `boxes` are nested.

    They may be one entry, a list of one entry per image, an array of shape `(num_images, num_boxes, 4)`, or such lists
    nested per prompt; `group_sizes` says how many images each prompt has. An empty list, at any level, means that the
    images at its place have no boxes. In the result, `None` means that the boxes of an image are not given.
    """
    if boxes is None:
        return [None] * num_images
    boxes = as_lists(boxes)
    levels = _entry_levels(boxes)
    level = max(levels, default=None)
    if level is None:
        entries = _flatten_empty(boxes, num_images, group_sizes)
    elif level < 0:
        raise ValueError(
            f"`boxes` must hold lists of boxes, one list per image, got the numbers {_cut(boxes)}. Wrap them: one box "
            "in one image is boxes=[[[x1, y1, x2, y2]]]."
        )
    elif min(levels) < level:
        odd = next(index for index, item in enumerate(boxes) if min(_entry_levels(item, 1), default=level) < level)
        raise ValueError(
            f"`boxes` must be nested alike for all images, got {_cut(boxes[odd])} at index {odd}, which has fewer "
            "levels than others. Wrap it: each image has a list of boxes, and each box is x1, y1, x2, y2."
        )
    elif level > 2:
        raise ValueError(f"`boxes` must have at most one list per prompt and image, got {_cut(boxes)}: more levels.")
    elif level == 0:
        entries = [boxes]
    elif level == 1:
        entries = list(boxes)
    else:
        entries = _join_groups(boxes, group_sizes)
    if len(entries) != num_images:
        hint = " Put the boxes of each image into a list of their own." if level == 0 else ""
        raise ValueError(
            f"`boxes` must have one entry per image, got {len(entries)} entries for {num_images} images.{hint} "
            "Pass None or [] for an image without boxes."
        )
    return [[] if isinstance(entry, list | tuple) and not _entry_levels(entry) else entry for entry in entries]


def flatten_video_boxes(
    boxes: Any, frame_counts: Sequence[int], group_sizes: Sequence[int] | None = None
) -> list[list[Any]]:
    """List one entry (see [`prepare_boxes`]) per frame of each video, however `boxes` are nested.

    They may be the list of one video, a list of such lists, or these nested per prompt; `frame_counts` says how many
    frames of each video are sampled, `group_sizes` how many videos each prompt has. A mapping with `frames` stands for
    the list of a video; `None` or an empty list in its place means that its boxes are not given, or that it has none.
    """
    if boxes is None:
        return [[None] * count for count in frame_counts]
    boxes = _as_frame_lists(as_lists(boxes))
    level = max(_entry_levels(boxes), default=None)
    if level is not None and level < 1:
        raise ValueError(
            f"`video_boxes` must hold a list with one entry per frame for each video, got {_cut(boxes)}. Wrap it: one "
            "box in the only frame of one video is video_boxes=[[[[x1, y1, x2, y2]]]]."
        )
    if level is None:
        level = _level_of_empty(boxes, frame_counts, group_sizes)
    if level == 1:
        videos = [boxes]
    elif level == 2:
        videos = list(boxes) if len(boxes) or not frame_counts else [[]] * len(frame_counts)
    elif level == 3:
        videos = []
        for index, group in enumerate(boxes):
            sizes = group_sizes if group_sizes is not None and len(group_sizes) == len(boxes) else None
            size = sizes[index] if sizes else len(group or [])
            videos += list(group) if group else [group] * size
    else:
        raise ValueError(f"`video_boxes` must have at most one list per prompt, video and frame, got {_cut(boxes)}.")
    if len(videos) != len(frame_counts):
        raise ValueError(
            f"`video_boxes` must have one list per video, got {len(videos)} lists for {len(frame_counts)} videos."
        )
    return [
        _entries_of_video(video, count, index)
        for index, (video, count) in enumerate(zip(videos, frame_counts, strict=True))
    ]


def _as_frame_lists(boxes: Any) -> Any:
    """Replace the records of videos, mappings with `frames`, by their lists of entries."""
    if isinstance(boxes, Mapping) and "frames" in boxes:
        return as_lists(boxes["frames"])
    return [_as_frame_lists(item) for item in boxes] if isinstance(boxes, list | tuple) else boxes


def _level_of_empty(boxes: Any, frame_counts: Sequence[int], group_sizes: Sequence[int] | None) -> int:
    """Tell what lists without any box are lists of: frames (1), videos (2) or prompts (3)."""
    is_one_level = all(item is None or len(item) == 0 for item in boxes)
    if len(frame_counts) == 1 and len(boxes) == frame_counts[0] and is_one_level:
        return 1
    is_grouped = group_sizes is not None and len(group_sizes) == len(boxes)
    if len(boxes) == len(frame_counts) and not (is_grouped and group_sizes != [1] * len(boxes)):
        nested = [item for item in boxes if item]
        fits = all(len(item) == count for item, count in zip(boxes, frame_counts, strict=True) if item)
        return 2 if not nested or fits else 3
    return 3 if is_grouped else 2


def _entries_of_video(video: Any, count: int, index: int) -> list[Any]:
    """List the entries of the sampled frames of one video."""
    if video is None or len(video) == 0:
        return [None if video is None else []] * count
    if len(video) != count:
        raise ValueError(
            f"`video_boxes[{index}]` must have one entry for each of the {count} sampled frames, got {len(video)}. "
            "Find boxes on the frames that are sampled (`processor.detect(videos=...)`, `mgllava detect`), pass "
            f"`num_frames={len(video)}` if they were found on as many frames, or `do_sample_frames=False` if they are "
            "those of all frames."
        )
    return [[] if isinstance(entry, list | tuple) and not _entry_levels(entry) else entry for entry in video]


def boxes_of_video_block(boxes: Any) -> Any:
    """Check that the `boxes` of a video block of a conversation are one list of entries, and return them."""
    boxes = _as_frame_lists(as_lists(boxes))
    if levels := _entry_levels(boxes) - {1}:
        advice = "Give each frame a list of boxes." if min(levels) < 1 else "Remove lists, or give each video a block."
        raise ValueError(
            f"`boxes` of a video block must be a list with one entry per sampled frame, got {_cut(boxes)}. {advice}"
        )
    return boxes


def boxes_of_block(boxes: Any) -> Any:
    """Check that the `boxes` of an image block of a conversation are those of one image, and return them."""
    boxes = as_lists(boxes)
    if levels := _entry_levels(boxes) - {0}:
        advice = "Wrap it: [[x1, y1, x2, y2]]." if min(levels) < 0 else "Remove lists, or give each image a block."
        raise ValueError(
            f"`boxes` of an image block must be a list of boxes x1, y1, x2, y2, or a mapping, got {_cut(boxes)}. "
            + advice
        )
    return boxes


def as_lists(boxes: Any) -> Any:
    """Turn containers of boxes, such as generators and arrays of objects, into lists; arrays of numbers stay."""
    if str(getattr(boxes, "dtype", None)) == "object":
        boxes = boxes.tolist()
    if isinstance(boxes, str | bytes):
        raise TypeError(f"`boxes` must hold numbers, got {type(boxes).__name__} {boxes[:60]!r}.")
    if boxes is None or isinstance(boxes, Mapping | Real) or hasattr(boxes, "ndim"):
        return boxes
    if not isinstance(boxes, Iterable):
        raise TypeError(f"`boxes` must hold numbers, got {type(boxes).__name__}.")
    return [as_lists(item) for item in boxes]


def _entry_levels(value: Any, level: int = 0) -> set[int]:
    """Collect how deeply the entries of images are nested; an entry is a list of lists of numbers."""
    if value is None:
        return set()
    if isinstance(value, Mapping):
        return {level}
    if hasattr(value, "ndim"):
        return set() if value.ndim == 1 and len(value) == 0 else {level + value.ndim - 2}
    if isinstance(value, list | tuple):
        return set().union(*(_entry_levels(item, level + 1) for item in value))
    return {level - 2}


def _flatten_empty(boxes: Any, num_images: int, group_sizes: Sequence[int] | None) -> list[Any]:
    """List the entries if there are only empty lists and None."""
    if len(boxes) == 0:
        return [[]] * num_images
    groups = [[group] if group is None else list(group) for group in boxes]
    sizes = group_sizes if group_sizes is not None and len(group_sizes) == len(boxes) else []
    if sizes and all(group == [None] or len(group) in (0, size) for group, size in zip(groups, sizes, strict=True)):
        return _join_groups(boxes, group_sizes)
    is_per_prompt = None not in boxes and sum(map(len, groups)) == num_images
    if is_per_prompt and (len(boxes) != num_images or any(entry is None for group in groups for entry in group)):
        return [entry for group in groups for entry in group]
    return list(boxes)


def _join_groups(groups: Any, group_sizes: Sequence[int] | None) -> list[Any]:
    """List the entries of all prompts' images; None and an empty list hold for all images of a prompt."""
    is_known = group_sizes is not None and len(group_sizes) == len(groups)
    entries: list[Any] = []
    for index, group in enumerate(groups):
        given = [] if group is None else list(group)
        size = group_sizes[index] if is_known and group_sizes is not None else int(group is None) or len(given)
        if len(given) not in (0, size):
            raise ValueError(
                f"`boxes[{index}]` must have one entry per image of `images[{index}]`, got {len(given)} entries for "
                f"{size} images. Pass None or [] for an image without boxes."
            )
        entries += given or [None if group is None else []] * size
    return entries


def _cut(value: Any) -> str:
    """Shorten a value for an error."""
    text = repr(value.tolist() if hasattr(value, "tolist") else value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_boxes(entry: Any, name: str = "boxes") -> tuple[torch.Tensor, list[Label] | None, torch.Tensor | None]:
    """Read and check the boxes of one image, see [`prepare_boxes`].

    Returns float32 boxes of shape `(n, 4)`, a list of n labels and float32 scores of shape `(n,)`; the last two are
    `None` if they were not given.
    """
    labels: list[Label] | None = None
    scores = None
    if isinstance(entry, Mapping):
        if "boxes" not in entry:
            raise ValueError(
                f"`{name}` must have a key 'boxes' (and 'scores', 'labels' if a detector gave them), "
                f"got the keys {sorted(map(str, entry))}."
            )
        for key in map(str, set(entry) - set(_KEYS)):
            # Detectors return other keys too, but a misspelled key would change what happens to the boxes.
            if meant := get_close_matches(key, [known for known in _KEYS if known not in entry], cutoff=0.8):
                raise ValueError(f"`{name}` has a key {key!r}. Did you mean {meant[0]!r}?")
        boxes = _as_corners(entry["boxes"], f"{name}['boxes']")
        if entry.get("scores") is not None:
            scores = _as_float_tensor(entry["scores"], f"{name}['scores']")
        if entry.get("labels") is not None:
            given = entry["labels"]
            if isinstance(given, str | bytes):
                raise TypeError(f"`{name}` must have a list of labels, one per box, got the string {given[:60]!r}.")
            labels = (
                given.tolist() if hasattr(given, "tolist") else list(given) if isinstance(given, Iterable) else given
            )
    else:
        boxes = _as_corners([] if entry is None else entry, name)

    if boxes.numel() == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"`{name}` must have shape (num_boxes, 4), got {tuple(boxes.shape)}. "
            + (
                f"Wrap it: one box is [{boxes.tolist()}]."
                if boxes.shape == (4,)
                else "Pass x1, y1, x2, y2 in pixels of the original image."
            )
        )
    _check_corners(boxes, name)
    are_flat = {
        "scores": scores is None or scores.ndim == 1,
        "labels": labels is None or (isinstance(labels, list) and not any(isinstance(item, list) for item in labels)),
    }
    for key, values in (("scores", scores), ("labels", labels)):
        if not are_flat[key]:
            raise ValueError(f"`{name}['{key}']` must be a flat list, one for each box, got {entry[key]!r}.")
        if values is not None and len(values) != len(boxes):
            raise ValueError(
                f"`{name}` must have as many {key} as boxes, got {len(values)} {key} for {len(boxes)} boxes."
            )
    if scores is not None and (index := _first(~torch.isfinite(scores))) is not None:
        raise ValueError(f"`{name}` must have finite scores, got {scores[index].item()} at index {index}.")
    return boxes, labels, scores


def _as_corners(values: Any, name: str) -> torch.Tensor:
    """Read coordinates, and warn if their dtype has rounded them."""
    rows = values if isinstance(values, list | tuple) else [values]
    dtypes = {str(row.dtype).removeprefix("torch.") for row in rows if hasattr(row, "dtype")}
    for dtype in sorted(dtypes & {"bfloat16", "float16"}):
        logger.warning_once(
            f"`{name}` are {dtype}, which rounds whole numbers above {256 if dtype == 'bfloat16' else 2048}: corners "
            "may be pixels off. Let the detector compute boxes in float32."
        )
    return _as_float_tensor(values, name)


def _as_float_tensor(values: Any, name: str) -> torch.Tensor:
    """Read numbers as float32."""
    if isinstance(values, list | tuple):  # of arrays or tensors, which torch reads slowly or not at all
        values = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    try:
        return torch.as_tensor(values, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` must be an array of numbers, got {type(values).__name__} ({error}). "
            "Pass one row x1, y1, x2, y2 per box, and one score per box."
        ) from error


def _check_corners(boxes: torch.Tensor, name: str) -> None:
    """Refuse corners that are not finite, or swapped."""
    if (index := _first(~torch.isfinite(boxes).all(dim=1))) is not None:
        raise ValueError(
            f"`{name}` must hold finite numbers, got {boxes[index].tolist()} at index {index}. "
            "Remove boxes with NaN or infinite corners."
        )
    swapped = (boxes[:, :2] > boxes[:, 2:]).any(dim=1)
    if (index := _first(swapped)) is not None:
        raise ValueError(
            f"`{name}` must hold x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {boxes[index].tolist()} at index "
            f"{index} ({int(swapped.sum())} such boxes). Swap the corners, or convert from x, y, width, height."
        )


def padding_offset(image_size: tuple[int, int]) -> torch.Tensor:
    """Return the shift (x, y, x, y) of boxes in pixels when the image is padded to a square around its center."""
    height, width = image_size
    side = max(height, width)
    return torch.tensor([(side - width) // 2, (side - height) // 2] * 2, dtype=torch.float32)


def nms_per_label(
    boxes: torch.Tensor, scores: torch.Tensor, labels: Sequence[Label], iou_threshold: float
) -> list[int]:
    """Suppress boxes within each label; return the indices of the others, best first, equal scores in input order.

    Each label runs on its own: shifting labels apart to run once, as `batched_nms` does, lets the labels of fully
    negative boxes collide, and the shift rounds IoUs. At the default threshold an IoU of exactly 0.2 is suppressed,
    because its float32 value is above the double 0.2 that it is compared with.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked, ranked_scores = boxes[order], scores[order]
    ranks_of: dict[Label, list[int]] = {}
    for rank, index in enumerate(order.tolist()):
        ranks_of.setdefault(labels[index], []).append(rank)

    kept_ranks: list[int] = []
    for ranks in ranks_of.values():
        kept_ranks += [ranks[i] for i in nms(ranked[ranks], ranked_scores[ranks], iou_threshold).tolist()]
    return order[sorted(kept_ranks)].tolist()


def limit_boxes(
    labels: Sequence[Label],
    mode: BoxLimitMode,
    limit: int | None,
    close_to_max_length: bool = False,
    per_category: int | None = None,
) -> list[int]:
    """Return the indices of the boxes to keep, given the labels of all boxes with the best box first.

    `"per_category"`: only if more than `limit` boxes are given, at most `per_category` per label are kept, by default
    20 (5 if `limit` < 50),
    regrouped by label with the labels in the order of their first box; the total may still exceed `limit`.
    `"per_image"`: the best `limit` boxes are kept. When the text is close to its maximum length (in training: within
    50 tokens of its limit), the limit always applies: 1 per label, or 20 per image. (The original raises for a limit
    of exactly 50 and, close to the maximum length, for no limit; here 50 keeps 20 per label and "no limit" means that
    only the length limits.)
    """
    if mode not in ("per_category", "per_image"):
        raise ValueError(f"`box_limit_mode` must be 'per_category' or 'per_image', got {mode!r}.")
    everything = list(range(len(labels)))
    if mode == "per_image":
        return everything[: _PER_IMAGE_LONG_TEXT if close_to_max_length else limit]
    if not close_to_max_length and (limit is None or len(labels) <= limit):
        return everything

    if close_to_max_length:
        per_label = _PER_CATEGORY_LONG_TEXT
    elif per_category is not None:
        per_label = per_category
    else:
        per_label = _PER_CATEGORY_SMALL_LIMIT if limit is not None and limit < _SMALL_LIMIT else _PER_CATEGORY
    groups: dict[Label, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return [index for group in groups.values() for index in group[:per_label]]


def to_model_frame(
    boxes: torch.Tensor, image_size: tuple[int, int], *, resize_to: int | None, crop_to: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform boxes like an image whose short side is resized and whose center is cropped.

    The original computes the resized side as `int(side * (768 / side))` in double precision, which is 767 for 211 of
    the sides below 5000 (47, 94, 147, 173, ...): its crop offset is then -1, and every box moves by +1 px although no
    pixel does. This is reproduced, because the model was trained with it.

    `image_size` is `(height, width)`. Returns the boxes that are not strictly outside, int64 of shape `(m, 4)`,
    clamped to the model input (those that only touch its border stay, with zero size); and a bool mask of shape `(n,)`
    that tells which they are.
    """
    height, width = image_size
    scale = 1.0 if resize_to is None else resize_to / min(height, width)
    resized = int(height * scale), int(width * scale)
    crop_height, crop_width = crop_to or resized

    boxes = torch.round(boxes * scale)
    shift = [(resized[1] - crop_width) // 2, (resized[0] - crop_height) // 2]
    boxes = boxes - boxes.new_tensor(shift * 2)
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    inside = (x2 >= 0) & (y2 >= 0) & (x1 <= crop_width) & (y1 <= crop_height)
    low = boxes.new_zeros(4)
    high = boxes.new_tensor([math.inf, math.inf, crop_width, crop_height])
    return boxes[inside].clamp(min=low, max=high).long(), inside


def write_boxes_into_text(text: str, placeholder: re.Pattern[str], entries: Sequence[Any]) -> str:
    """Put the boxes of each image after its placeholder in a rendered conversation.

    So they reach the processor even if the caller passes on only images and text. `None` writes nothing.
    """
    num_images = len(placeholder.findall(text))
    if num_images != len(entries):
        raise ValueError(
            f"`boxes` in the image blocks need one block per image, got {len(entries)} image blocks and {num_images} "
            "placeholders in the rendered text. Write image blocks instead of placeholders in the text."
        )
    written = iter("" if entry is None else _START + json.dumps(plain_boxes(entry)) + _END for entry in entries)
    return placeholder.sub(lambda match: match.group() + next(written), text)


def take_boxes_from_text(text: str, placeholder: re.Pattern[str]) -> tuple[str, list[Any]]:
    """Undo [`write_boxes_into_text`]: return the text, and one entry per placeholder (`None` without boxes)."""
    entries: list[Any] = []

    def take(match: re.Match[str]) -> str:
        written = match.group("boxes")
        try:
            entries.append(None if written is None else json.loads(written))
        except ValueError as error:
            raise ValueError(
                f"`text` must hold boxes as `apply_chat_template` writes them after an image, got {written!r}. Do not "
                "change a rendered conversation there."
            ) from error
        return match.group("image")

    boxes = f"{_START}(?P<boxes>[^{_START}{_END}]*){_END}"
    return re.sub(f"(?P<image>{placeholder.pattern})(?:{boxes})?", take, text), entries


def plain_boxes(value: Any) -> Any:
    """Turn an entry (see [`prepare_boxes`]) into lists, dictionaries and numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain_boxes(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain_boxes(item) for item in value] if isinstance(value, list | tuple) else value


__all__ = [
    "BOX_MARKS",
    "BoxLimitMode",
    "as_lists",
    "boxes_of_block",
    "boxes_of_video_block",
    "flatten_boxes",
    "flatten_video_boxes",
    "limit_boxes",
    "nms_per_label",
    "padding_offset",
    "plain_boxes",
    "prepare_boxes",
    "read_boxes",
    "read_boxes_of_image",
    "select_objects",
    "take_boxes_from_text",
    "to_model_frame",
    "write_boxes_into_text",
]
