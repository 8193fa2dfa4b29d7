"""Image processors of SliME (arXiv 2406.08487): a global view of each image, and tiles of 336 pixels that enlarge it.

Images are turned upright, which the original does not do, and become 8-bit RGB, without alpha as in the original.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .images_common import UprightImageProcessor, as_rgb, flat_images

# Most tiles that the area of an image asks for. The grid may have one more.
_MOST_TILES = 6


def choose_grid(height: int, width: int, tile_size: int) -> tuple[int, int]:
    """Choose the rows and columns of tiles for an image.

    As many tiles as its area fills are tried, one fewer and one more, in every arrangement. The one that shows the
    most pixels of the image wins, then the one with the least empty area, then the first.

    Args:
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        tile_size (`int`): Side of a tile in pixels.

    Returns:
        `tuple[int, int]`: Rows and columns; 2 to 7 tiles.
    """
    wanted = min(math.ceil(width * height / tile_size**2), _MOST_TILES)
    counts = (2, 3) if wanted <= 2 else (wanted - 1, wanted, wanted + 1)
    best, best_key = (1, 1), (-1, 0)
    for count in counts:
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            canvas_width, canvas_height = columns * tile_size, rows * tile_size
            scale = min(canvas_width / width, canvas_height / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            key = (shown, shown - canvas_width * canvas_height)
            if key > best_key:
                best, best_key = (rows, columns), key
    return best


def fit_size(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
    """Return the height and width of an image that is scaled to fit into a canvas, aspect ratio kept."""
    # The quotient first, in double precision: the other order changes sizes by a pixel.
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_height), canvas_width)


class SlimeImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the SliME image processors beyond those of every image processor.

    Args:
        do_tile (`bool`, *optional*, defaults to `True`):
            Whether to make a global view and 2 to 7 tiles of each image. `False`: one view, resized on its short side
            and center-cropped, which is what VLMEvalKit shows the model. `do_resize=False`, `do_center_crop=False` and
            `do_pad=True` are refused where it is `True`, since all views have the size of a tile.
    """

    do_tile: bool | None


class SlimeImageProcessorMixin(UprightImageProcessor):
    """The part of the image processors that does not depend on the backend.

    Images may come in every form that [`MGLlavaImageProcessor`] takes.
    """

    valid_kwargs = SlimeImageProcessorKwargs
    remote_classes = {
        "torchvision": "image_processing_slime.SlimeImageProcessor",
        "pil": "image_processing_slime.SlimeImageProcessorPil",
    }
    model_input_names = ["pixel_values", "image_grids"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_tile = True

    def __init__(self, **kwargs: Unpack[SlimeImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _preprocess_image_like_inputs(  # type: ignore[override]  # the options by name
        self,
        images: Any,
        *args: Any,
        do_tile: bool | None,
        return_tensors: Any,
        input_data_format: str | ChannelDimension | None,
        device: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make `pixel_values` and `image_grids` of all images."""
        do_tile = self.do_tile if do_tile is None else do_tile
        if do_tile:
            _check_tile_options(kwargs)
        crop_size = kwargs["crop_size"]
        opened = self.fetch_at_least_one(images)
        views: list[torch.Tensor] = []
        grids: list[tuple[int, int]] = []
        for index, image in enumerate(flat_images(opened)):
            rgb = as_rgb(image, input_data_format, f"images[{index}]")
            if getattr(self, "backend", None) == "pil":
                rgb = rgb.cpu()
            if do_tile:
                grid = choose_grid(rgb.shape[1], rgb.shape[2], crop_size.height)
                views += self._tile(rgb, grid, crop_size.height, kwargs["resample"])
            else:
                grid = (0, 0)
                views.append(rgb)
            grids.append(grid)
        pixels = [
            self.process_image(view, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, device=device)
            for view in views
        ]
        # Views of the size of a tile pass the resizing and the crop unchanged.
        features = self._preprocess(pixels, *args, return_tensors=None, **kwargs)
        self.check_one_shape(features["pixel_values"], return_tensors, kwargs)
        data = {"pixel_values": features["pixel_values"], "image_grids": [list(grid) for grid in grids]}
        return BatchFeature(data, tensor_type=return_tensors)

    def _tile(self, image: torch.Tensor, grid: tuple[int, int], size: int, resample: Any) -> list[torch.Tensor]:
        """Cut an image into its views: the global one, squashed to a square, and the tiles in reading order."""
        rows, columns = grid
        height, width = fit_size(image.shape[1], image.shape[2], rows * size, columns * size)
        canvas = image.new_zeros(3, rows * size, columns * size)
        top, left = (rows * size - height) // 2, (columns * size - width) // 2
        canvas[:, top : top + height, left : left + width] = self.resize_tensor(image, height, width, resample)
        tiles = canvas.unflatten(2, (columns, size)).unflatten(1, (rows, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return [self.resize_tensor(image, size, size, resample), *tiles]


def _check_tile_options(options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for options that views cannot follow: their size is that of a tile."""
    size, crop_size = options["size"], options["crop_size"]
    side = crop_size.height
    if side is None or crop_size.width != side or size.shortest_edge != side or size.longest_edge is not None:
        raise ValueError(
            "`size` and `crop_size` must be one square, the tile, where `do_tile` is True, got "
            f"{dict(size)} and {dict(crop_size)}."
        )
    for name, expected in (("do_resize", True), ("do_center_crop", True), ("do_pad", False)):
        if bool(options.get(name)) != expected:
            raise ValueError(
                f"`{name}` must be {expected} where `do_tile` is True, got {options.get(name)}: an image is resized "
                "to its tiles, which have one size and are neither cropped nor padded. Pass `do_tile=False` for one "
                "view of each image that follows this option."
            )


class SlimeImageProcessor(SlimeImageProcessorMixin, TorchvisionBackend):
    """Makes `pixel_values` and `image_grids` from images (SliME, arXiv 2406.08487, section 3.1).

    Calling it with `return_tensors="pt"` gives

    - `pixel_values`: float32 of shape `(num_views, 3, height, width)`, the size of `crop_size`, normalized: of each
      image in turn the global view and the tiles in reading order;
    - `image_grids`: int64 of shape `(num_images, 2)`, rows and columns of tiles; (0, 0) for an image of one view.

    Options: see [`SlimeImageProcessorKwargs`]; the tile is `crop_size`.
    """


class SlimeImageProcessorPil(SlimeImageProcessorMixin, PilBackend):
    """The image processor whose pixels equal the original's bit for bit; slower than [`SlimeImageProcessor`].

    Options and outputs are those of [`SlimeImageProcessor`].
    """


__all__ = ["SlimeImageProcessor", "SlimeImageProcessorKwargs", "SlimeImageProcessorPil"]
