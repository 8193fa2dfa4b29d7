"""Show which parts of an image the router of SliME keeps for a question."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image

from mgllava.processing.image_processing_slime import fit_size
from mgllava.processing.images_common import as_rgb, load_upright

# How much of the brightness of a part stays that is not kept.
_DIMMED = 0.25
_BORDER = (255, 255, 255)


def kept_tokens(image: Any, outputs: Mapping[str, Any], *, index: int = 0) -> Image.Image:
    """Dim the parts of an image whose tokens the language model does not see, and draw the borders of the tiles.

    Only tokens of tiles are shown; those of the global view, which shows the whole image small, are always kept.

    Args:
        image: The original image, in any form that the processor accepts.
        outputs (`ModelOutput` or `Mapping`): What `forward` returned, or `generate` with
            `return_dict_in_generate=True`: its `kept_tokens` and `image_outputs` are read.
        index (`int`, *optional*, defaults to 0): Which of the images of `outputs` it is.

    Returns:
        `PIL.Image.Image`: A new image, RGB and upright, of the size of the input.

    Raises:
        TypeError: If `image` is not an image.
        ValueError: If `outputs` do not say what was kept, or the image has no tiles.
    """
    picture = to_pil_image(as_rgb(load_upright(image)))
    kept, rows, columns = kept_cells(outputs, index)
    # Where the image lies on the canvas of tiles; 336 is the side of a tile, of which only the ratio matters.
    canvas_height, canvas_width = rows * 336, columns * 336
    height, width = fit_size(picture.height, picture.width, canvas_height, canvas_width)
    top, left = (canvas_height - height) // 2, (canvas_width - width) // 2

    def cells(number: int, start: int, length: int, canvas: int, side: int) -> np.ndarray:
        """Cell of each row or column of pixels."""
        places = start + (np.arange(side) + 0.5) * length / side
        return np.minimum((places * number / canvas).astype(int), number - 1)

    row_of = cells(kept.shape[0], top, height, canvas_height, picture.height)
    column_of = cells(kept.shape[1], left, width, canvas_width, picture.width)
    is_kept = kept[row_of][:, column_of]
    pixels = np.asarray(picture).astype(np.float32)
    pixels[~is_kept] *= _DIMMED
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    line = max(1, round(math.sqrt(picture.width * picture.height) / 400))
    for column in range(1, columns):
        x = (column * 336 - left) * picture.width / width
        draw.line([(x, 0), (x, picture.height)], fill=_BORDER, width=line)
    for row in range(1, rows):
        y = (row * 336 - top) * picture.height / height
        draw.line([(0, y), (picture.width, y)], fill=_BORDER, width=line)
    return drawn


def kept_cells(outputs: Mapping[str, Any], index: int) -> tuple[np.ndarray, int, int]:
    """Return which tokens of an image's tiles are kept, line by line over all tiles, and the numbers of tiles.

    Args:
        outputs (`ModelOutput` or `Mapping`): See [`kept_tokens`].
        index (`int`): Which of the images of `outputs` it is.

    Returns:
        `tuple[np.ndarray, int, int]`: A boolean array of shape `(rows * side, columns * side)`, rows and columns.

    Raises:
        ValueError: If `outputs` do not say what was kept, or the image has no tiles.
    """
    images, kept = outputs.get("image_outputs"), outputs.get("kept_tokens")
    if images is None or kept is None:
        raise ValueError(
            "`outputs` must have `kept_tokens` and `image_outputs`, got "
            f"{', '.join(outputs.keys()) or 'nothing'}. Pass what a SliME model returned for an image; with "
            "`generate`, set `return_dict_in_generate=True`."
        )
    lengths = [len(tokens) for tokens in images["pooler_output"]]
    if not 0 <= index < len(lengths):
        raise ValueError(f"`index` must be from 0 to {len(lengths) - 1} ({len(lengths)} images), got {index}.")
    rows, columns = images["image_grids"][index].tolist()
    if not rows * columns:
        raise ValueError(f"Image {index} of `outputs` has no tiles (`do_tile=False`): all of its tokens are kept.")
    num_local = lengths[index] - images["last_hidden_state"].shape[1]
    side = math.isqrt(num_local // (rows * columns))
    end = sum(lengths[: index + 1])
    local = kept[end - rows * columns * side**2 : end].cpu().numpy()
    if images["local_order"] == "flat":
        local = local.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
    return local.reshape(rows * side, columns * side), rows, columns


__all__ = ["kept_cells", "kept_tokens"]
