"""Draw boxes and labels on images."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from mgllava.processing.boxes_mgllava import read_boxes_of_image
from mgllava.processing.images_common import as_rgb, load_upright

Color = tuple[int, int, int]
_Rectangle = tuple[float, float, float, float]

# Steps of the golden angle keep any number of hues apart. The first is cyan, which is rare in photographs.
_FIRST_HUE, _GOLDEN_ANGLE = 0.5, 0.381966
# An image with a smaller geometric mean of its sides, in pixels, is enlarged, since labels would cover its objects.
_LEAST_SIDE = 360
# The longer side of a frame in a strip of frames, and the distance between frames, in pixels.
_FRAME_SIDE, _GAP = 640, 8


class _Plate(NamedTuple):
    """A label and its background rectangle."""

    text: str
    place: _Rectangle


def draw_boxes(
    image: Any,
    detections: Any,
    *,
    scores: bool = True,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | None = None,
    colors: Mapping[str, Color] | None = None,
) -> Image.Image:
    """Draw boxes with their labels.

    Line width and font size depend on the image size, each label has its own color, and everything stays inside the
    image. If two labels would overlap, the one with the lower score is moved.

    Args:
        image: The original image, in any form that the processor accepts.
        detections (`Mapping` or array of shape `(num_boxes, 4)`): `{"boxes", "labels", "scores"}`, as a box
            detector returns them and box files store them (labels and scores are optional), also in a list of length
            1, or only the boxes: xyxy in pixels of the upright original image (after EXIF rotation). Parts outside
            the image are not drawn. A box outside the image raises an error if there are no scores, as in the
            processor.
        scores (`bool`): Whether to draw the scores after the labels.
        line_width (`int`, *optional*): In pixels; by default it depends on the image size.
        font_size (`int`, *optional*): In pixels; by default it depends on the image size.
        font (`str`, *optional*): Path of a TrueType file. The built-in font has only Latin letters.
        colors (`Mapping`, *optional*): Color of labels as red, green and blue from 0 to 255; others get their own.

    Returns:
        `PIL.Image.Image`: A new image, RGB and upright. It has the size of the input, or a multiple of it if the input
        is too small for labels.

    Raises:
        TypeError: If `image` is not an image, or `detections` are not boxes.
        ValueError: If the boxes do not have shape `(num_boxes, 4)`, are not xyxy or not in pixels of the image, or
            the numbers of labels or scores differ from that of boxes.
    """
    picture = to_pil_image(as_rgb(load_upright(image)))
    if isinstance(detections, list | tuple) and any(isinstance(entry, Mapping) for entry in detections):
        if len(detections) != 1:
            raise ValueError(f"`detections` must be those of one image, got {len(detections)}. Draw them one by one.")
        detections = detections[0]
    boxes, labels, values = read_boxes_of_image(detections, (picture.height, picture.width), "detections")
    enlarged = math.ceil(_LEAST_SIDE / math.sqrt(picture.width * picture.height))
    if enlarged > 1:
        picture = picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.BICUBIC)
        boxes = boxes * enlarged
    limits = boxes.new_tensor([picture.width, picture.height] * 2)
    order = ((boxes[:, 2:] >= 0) & (boxes[:, :2] < limits[:2])).all(dim=1).nonzero().flatten().tolist()
    if not order:
        return picture
    # Edges outside the image are drawn along its border.
    boxes = boxes.minimum(limits - 1).clamp(min=0)
    if values is not None:
        order.sort(key=lambda row: float(-values[row]))

    side = math.sqrt(picture.width * picture.height)
    width = line_width or max(2, round(side / 250))
    size = font_size or max(12, round(side / 32))
    letters = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    names = [str(label) for label in labels or range(len(boxes))]
    colors = {**dict(zip(dict.fromkeys(names), _colors(len(set(names))), strict=True)), **(colors or {})}

    # The box with the highest score is drawn last, on top. Black lines around the colored lines keep these visible on
    # a background of the same color.
    rim = max(1, width // 3)
    around = boxes + boxes.new_tensor([-rim, -rim, rim, rim])
    worst_first = order[::-1]
    drawn = draw_bounding_boxes(pil_to_tensor(picture), around[worst_first], colors="black", width=width + 2 * rim)
    drawn = draw_bounding_boxes(
        drawn, boxes[worst_first], colors=[colors[names[row]] for row in worst_first], width=width
    )
    picture = to_pil_image(drawn)
    draw = ImageDraw.Draw(picture)
    plates: dict[int, _Plate] = {}
    for row in order:
        parts = [] if labels is None else [names[row]]
        if scores and values is not None:
            parts.append(f"{values[row]:.2f}")
        text = " ".join(parts).strip()
        if text:
            extent = draw.textbbox((0, 0), text, font=letters)
            place = _place(
                extent, boxes[row].tolist(), picture.size, width + 1, [plate.place for plate in plates.values()]
            )
            plates[row] = _Plate(text, place)
    for row, plate in reversed(plates.items()):
        _write(draw, plate, colors[names[row]], letters)
    return picture


def draw_frames(
    frames: Any, detections: Sequence[Any] | None = None, *, columns: int = 4, **options: Any
) -> Image.Image:
    """Draw the frames of a video side by side, in lines from left to right, with their boxes.

    A label has the same color in all frames.

    Args:
        frames: A list of images in any form that the processor accepts, or an array of frames.
        detections (`Sequence`, *optional*): One entry for each frame, see [`draw_boxes`]; also a record of a box file,
            `{"frames": [...]}`. By default no boxes are drawn.
        columns (`int`, *optional*, defaults to 4): Frames in a line.
        **options: Options of [`draw_boxes`].

    Returns:
        `PIL.Image.Image`: A new image, in which the longer side of each frame has at most 640 pixels.

    Raises:
        TypeError: If something is not an image, or detections are not boxes.
        ValueError: If there are no frames, another number of detections, or boxes that [`draw_boxes`] refuses.
    """
    if isinstance(detections, Mapping):
        detections = detections.get("frames", [detections])
    pictures = list(frames)
    if not pictures or columns < 1:
        raise ValueError(f"`frames` and `columns` must be at least 1, got {len(pictures)} and {columns}.")
    entries = [[]] * len(pictures) if detections is None else list(detections)
    if len(entries) != len(pictures):
        raise ValueError(
            f"`detections` must have one entry for each of the {len(pictures)} frames, got {len(entries)}."
        )
    names = [name for entry in entries if isinstance(entry, Mapping) for name in entry.get("labels") or ()]
    shared = dict(zip(dict.fromkeys(map(str, names)), _colors(len(set(map(str, names)))), strict=True))
    options["colors"] = {**shared, **(options.get("colors") or {})}
    drawn = [
        draw_boxes(picture, [] if entry is None else entry, **options)
        for picture, entry in zip(pictures, entries, strict=True)
    ]
    for picture in drawn:
        picture.thumbnail((_FRAME_SIDE, _FRAME_SIDE), Image.Resampling.LANCZOS)
    width, height = (max(sides) + _GAP for sides in zip(*(picture.size for picture in drawn), strict=True))
    columns = min(columns, len(drawn))
    strip = Image.new("RGB", (columns * width - _GAP, -(-len(drawn) // columns) * height - _GAP), "white")
    for number, picture in enumerate(drawn):
        strip.paste(picture, (number % columns * width, number // columns * height))
    return strip


def _colors(number: int) -> list[Color]:
    """Choose bright colors of different hues."""
    chosen = []
    for index in range(number):
        red, green, blue = colorsys.hsv_to_rgb((_FIRST_HUE + index * _GOLDEN_ANGLE) % 1, 0.8, 1.0)
        chosen.append((round(255 * red), round(255 * green), round(255 * blue)))
    return chosen


def _place(
    extent: Sequence[float],
    box: Sequence[float],
    image_size: tuple[int, int],
    margin: int,
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Find a place for a label at its box, inside the image and without covering another label."""
    width, height = extent[2] - extent[0] + 2 * margin, extent[3] - extent[1] + 2 * margin
    x1, y1, x2, y2 = box
    # Above the box, inside at the top, inside at the bottom, below; on the left, then on the right.
    places = [(x, y) for x in (x1, x2 - width + 1) for y in (y1 - height, y1, y2 - height + 1, y2 + 1)]
    highest_x, highest_y = image_size[0] - width, image_size[1] - height
    for x, y in places:
        # A label may move sideways along its box, but not up or down, away from it.
        x = max(0, min(x, highest_x))
        if 0 <= y <= highest_y and not any(
            x < other[2] and other[0] < x + width and y < other[3] and other[1] < y + height for other in taken
        ):
            break
    else:
        x, y = max(0, min(x1, highest_x)), max(0, min(y1 - height, highest_y))
    return x, y, x + width, y + height


def _write(
    draw: ImageDraw.ImageDraw, plate: _Plate, color: Color, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """Write a label on its plate."""
    x1, y1, x2, y2 = plate.place
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    # The perceived brightness of the plate, with the weights of Rec. 601.
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    left, top, right, bottom = draw.textbbox((0, 0), plate.text, font=font)
    start = (x1 + x2 - left - right) / 2, (y1 + y2 - top - bottom) / 2
    draw.text(start, plate.text, font=font, fill="black" if brightness > 110 else "white")


__all__ = ["draw_boxes", "draw_frames"]
