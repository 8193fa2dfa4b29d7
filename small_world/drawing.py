"""Draw scenes, and find the boxes of their objects."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import COLORS, Scene, SceneObject

SUPERSAMPLING = 4
INK = (15, 15, 15)


def draw_scene(scene: Scene) -> tuple[Image.Image, list[list[float]]]:
    """Draw a scene, and return the picture (RGB) and the boxes of its objects (xyxy in pixels of the picture).

    A box encloses the whole outline, including parts that another object hides.
    """
    return draw_frames([scene])[0]


def draw_frames(scenes: Sequence[Scene]) -> list[tuple[Image.Image, list[list[float]]]]:
    """Draw the frames of a video like [`draw_scene`], on the background and with the noise of the first one."""
    first = scenes[0]
    background = _background(first)
    rng = np.random.default_rng(random.Random(f"{first.id}/noise").getrandbits(32))
    noise = 4 * rng.standard_normal((first.height, first.width, 3), dtype=np.float32)
    frames = []
    for scene in scenes:
        picture = background.copy()
        boxes = []
        for item in scene.objects:
            corner, sprite, mask = _sprite(item, scene.side / 256, scene.character_height)
            picture.paste(sprite, corner, mask)
            left, top, right, bottom = mask.point(lambda value: 255 * (value > 127)).getbbox()
            boxes.append(
                [float(left + corner[0]), float(top + corner[1]), float(right + corner[0]), float(bottom + corner[1])]
            )
        noisy = np.asarray(picture) + noise
        frames.append((Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)), boxes))
    return frames


def _background(scene: Scene) -> Image.Image:
    """Draw a pale gradient with lines and blots of low contrast, which cannot be mistaken for objects."""
    rng = random.Random(f"{scene.id}/background")
    corners = np.array([[[rng.uniform(150, 245) for _ in range(3)] for _ in range(2)] for _ in range(2)])
    corners = 0.35 * corners + 0.65 * corners.mean(-1, keepdims=True)
    # Four pixels, stretched so that their centers are in the corners.
    small = Image.fromarray(corners.round().astype(np.uint8))
    picture = small.resize((scene.width, scene.height), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(rng.randint(0, 14)):
        shade = (*(rng.randint(90, 255) for _ in range(3)), rng.randint(15, 60))
        (x, y), end = [(rng.uniform(0, scene.width), rng.uniform(0, scene.height)) for _ in range(2)]
        if rng.random() < 0.6:
            draw.line([(x, y), end], fill=shade, width=rng.randint(1, 4))
        else:
            radius = rng.uniform(4, 40)
            draw.ellipse([x - radius, y - 0.6 * radius, x + radius, y + 0.6 * radius], fill=shade)
    return picture


# Most objects of a video are the same in all frames.
@lru_cache(maxsize=64)
def _sprite(
    item: SceneObject, unit: float, character_height: float
) -> tuple[tuple[int, int], Image.Image, Image.Image]:
    """Return the left upper corner of an object in the picture, its colors, and its coverage mask.

    `unit` is a pixel of a picture whose long side is 256, in pixels of this picture.
    """
    left, top = (math.floor(value - item.size / 2) - 1 for value in item.center)
    side = math.ceil(item.size) + 3
    full = (side * SUPERSAMPLING, side * SUPERSAMPLING)
    cx, cy = ((value - corner) * SUPERSAMPLING for value, corner in zip(item.center, (left, top), strict=True))
    mask = Image.new("L", full, 0)
    _outline(ImageDraw.Draw(mask), item.shape, cx, cy, item.size * SUPERSAMPLING / 2, math.radians(item.angle))
    sprite = Image.new("RGB", full, COLORS[item.color])
    draw = ImageDraw.Draw(sprite)
    _texture(draw, item, cx, cy, SUPERSAMPLING * unit)
    if item.character:
        # The height of capitals is 0.7 of this font's size.
        font = _font(round(character_height * unit * SUPERSAMPLING / 0.7))
        draw.text((cx, cy), item.character, fill=INK, font=font, anchor="mm", stroke_width=1)
    return (left, top), sprite.reduce(SUPERSAMPLING), mask.reduce(SUPERSAMPLING)


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _texture(draw: ImageDraw.ImageDraw, item: SceneObject, cx: float, cy: float, unit: float) -> None:
    """Draw stripes or dots of a lighter tone, eight pixels apart."""
    if item.texture == "plain":
        return
    light = tuple(round(value + 0.75 * (255 - value)) for value in COLORS[item.color])
    angle, step = math.radians(item.angle + 45), 8 * unit
    c, s = math.cos(angle), math.sin(angle)
    reach = math.ceil(item.size / 2 * SUPERSAMPLING / step) + 1
    for i in range(-reach, reach + 1):
        if item.texture == "striped":
            x, y, far = cx + i * step * c, cy + i * step * s, reach * step
            draw.line([x - far * s, y + far * c, x + far * s, y - far * c], fill=light, width=round(3 * unit))
            continue
        for j in range(-reach, reach + 1):
            x, y, r = cx + step * (i * c - j * s), cy + step * (i * s + j * c), 2.2 * unit
            draw.ellipse([x - r, y - r, x + r, y + r], fill=light)


def _outline(draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, angle: float) -> None:
    """Fill the outline of a shape of radius `r`, turned by `angle` (radians)."""

    def polygon(points: list[tuple[float, float]], fill: int = 255) -> None:
        c, s = math.cos(angle), math.sin(angle)
        draw.polygon([(cx + r * (c * x + s * y), cy + r * (c * y - s * x)) for x, y in points], fill=fill)

    def regular(corners: int, radius: float = 1.0, start: float = -90.0) -> list[tuple[float, float]]:
        turns = [math.radians(start + 360 * i / corners) for i in range(corners)]
        return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        c, s = math.cos(angle), math.sin(angle)
        x, y = cx + r * (c * x + s * y), cy + r * (c * y - s * x)
        draw.ellipse([x - radius * r, y - radius * r, x + radius * r, y + radius * r], fill=fill)

    if shape == "circle":
        disc(0, 0, 0.94, 255)
    elif shape == "square":
        polygon(regular(4, 1.0, 45))
    elif shape == "triangle":
        polygon(regular(3))
    elif shape == "star":
        outer, inner = regular(5), regular(5, 0.42, -54)
        polygon([point for pair in zip(outer, inner, strict=True) for point in pair])
    elif shape == "cross":
        a, b = 0.3, 0.92
        quarter = [(-a, -b), (a, -b), (a, -a)]  # the others follow by rotations
        polygon([(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter])
    elif shape == "ring":
        disc(0, 0, 0.96, 255)
        disc(0, 0, 0.55, 0)
    elif shape == "diamond":
        polygon([(0, -1), (0.62, 0), (0, 1), (-0.62, 0)])
    elif shape == "hexagon":
        polygon(regular(6))
    elif shape == "heart":
        t = [math.radians(degree) for degree in range(0, 360, 8)]
        heights = [13 * math.cos(v) - 5 * math.cos(2 * v) - 2 * math.cos(3 * v) - math.cos(4 * v) for v in t]
        polygon([(math.sin(v) ** 3, -height / 16.5) for v, height in zip(t, heights, strict=True)])
    elif shape == "moon":
        disc(0, 0, 0.96, 255)
        disc(0.42, -0.1, 0.72, 0)
