"""Draw pictures with their boxes, questions and answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mgllava.visualization import draw_boxes

from .evaluation import Answer

_WIDTH, _MARGIN, _FONT_SIZE = 560, 14, 15
_INK, _RIGHT, _WRONG = (30, 30, 30), (20, 120, 50), (190, 30, 30)


def draw_answers(answers: Sequence[Answer], boxes: Mapping[str, Any], images: Path) -> Image.Image:
    """Draw pictures side by side, each with its boxes, questions and answers (right ones in green, wrong ones in red).

    `boxes` has the `boxes` and `labels` of each picture by its file name.
    """
    names = dict.fromkeys(answer.image for answer in answers)
    return draw_sheet(
        {name: draw_boxes(Image.open(images / name), boxes[name], scores=False) for name in names}, answers
    )


def draw_sheet(drawn: Mapping[str, Image.Image], answers: Sequence[Answer], width: int = _WIDTH) -> Image.Image:
    """Draw pictures side by side, each with its questions and answers (right ones in green, wrong ones in red).

    `width` is that of each picture in the drawing, in pixels.
    """
    names = list(drawn)
    pictures = [ImageOps.contain(drawn[name], (width, width)) for name in names]
    font = ImageFont.load_default(_FONT_SIZE)
    line = round(1.5 * _FONT_SIZE)
    tallest = max(picture.height for picture in pictures)
    most = max(sum(answer.image == name for answer in answers) for name in names)
    size = (len(names) * (width + _MARGIN) + _MARGIN, tallest + most * line + 3 * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        left, top = _MARGIN + column * (width + _MARGIN), _MARGIN
        sheet.paste(picture, (left, top))
        top += picture.height + _MARGIN
        for answer in (answer for answer in answers if answer.image == name):
            draw.text((left, top), answer.question, fill=_INK, font=font)
            said = answer.answer if answer.is_right else f"{answer.answer} (it is {answer.expected})"
            place = left + draw.textlength(answer.question + "  ", font=font)
            draw.text((place, top), said, fill=_RIGHT if answer.is_right else _WRONG, font=font)
            top += line
    return sheet
