"""Train the vision tower of the small SliME, which starts from the low-resolution tower, to read in views of SliME."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionModel

from mgllava import SlimeImageProcessor
from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes
from mgllava.processing.image_processing_slime import choose_grid, fit_size
from small_world.pictures import ATTRIBUTES, object_attributes
from small_world.scenes import make_scene

from .architecture import LOW_RES_IMAGE_SIZE
from .objectives import CellContents, CellPlace, CenterAttributes
from .towers import Normalize

_SIZE = LOW_RES_IMAGE_SIZE


def slime_image_processor(**options: Any) -> SlimeImageProcessor:
    """Return an image processor with tiles of the tower's size."""
    side = {"height": _SIZE, "width": _SIZE}
    return SlimeImageProcessor(size={"shortest_edge": _SIZE}, crop_size=side, **options)


class Views(Dataset):
    """The global views and tiles of the pictures of a data set; pixels are cached in its folder.

    Items have `pixel_values` (uint8, `(3, 112, 112)`), `boxes` (`(num_objects, 4)`: xyxy in pixels of the view) of the
    objects whose centers are in the view, and their `attributes` (see [`object_attributes`]).
    """

    def __init__(self, folder: Path):
        views: list[tuple[torch.Tensor, torch.Tensor]] = []
        files = []
        for key, record in read_boxes(folder / "boxes.json").items():
            split, number = str(key).split("/")
            scene = make_scene(split, int(number))  # type: ignore[arg-type]
            files.append(folder / "images" / f"{int(number):06d}.jpg")
            boxes = torch.tensor(record["boxes"], dtype=torch.float32).view(-1, 4)
            attributes = object_attributes(scene.objects).view(-1, len(ATTRIBUTES))
            for view in _boxes_in_views(boxes, scene.width, scene.height):
                centers = (view[:, :2] + view[:, 2:]) / 2
                inside = ((centers >= 0) & (centers < _SIZE)).all(1)
                views.append((view[inside], attributes[inside]))
        self.views = views
        cache = folder / f"views-{_SIZE}.npy"
        shape = (len(views), 3, _SIZE, _SIZE)
        if not cache.exists() or np.load(cache, mmap_mode="r").shape != shape:
            processor = slime_image_processor(do_rescale=False, do_normalize=False)
            with replacing(cache) as partial:
                pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                first = 0
                for file in track(files, f"Preparing {folder}"):
                    with Image.open(file) as picture:
                        of_picture = processor(picture, return_tensors="pt")["pixel_values"]
                    pixels[first : first + len(of_picture)] = of_picture.round().clamp(0, 255).to(torch.uint8).numpy()
                    first += len(of_picture)
                pixels.flush()
        self.pixels = np.load(cache, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        boxes, attributes = self.views[index]
        return {
            "pixel_values": torch.from_numpy(self.pixels[index].copy()),
            "boxes": boxes,
            "attributes": attributes,
        }


def _boxes_in_views(boxes: torch.Tensor, width: int, height: int) -> list[torch.Tensor]:
    """Return the boxes of a picture (xyxy in its pixels) in pixels of each of its views."""
    rows, columns = choose_grid(height, width, _SIZE)
    new_height, new_width = fit_size(height, width, rows * _SIZE, columns * _SIZE)
    left, top = (columns * _SIZE - new_width) // 2, (rows * _SIZE - new_height) // 2
    on_canvas = boxes * torch.tensor([new_width / width, new_height / height] * 2) + torch.tensor([left, top] * 2)
    tiles = [
        on_canvas - _SIZE * torch.tensor([column, row] * 2, dtype=torch.float32)
        for row in range(rows)
        for column in range(columns)
    ]
    return [boxes * torch.tensor([_SIZE / width, _SIZE / height] * 2), *tiles]


class TileTowerTraining(nn.Module):
    """Trains a CLIP tower to predict the contents and the place of each cell of its grid in views of SliME.

    The grid is taken from the last but one layer, as in the model. Attributes are predicted from the cells at the
    centers of objects too, which teaches it characters.
    """

    def __init__(self, start: Path):
        super().__init__()
        self.normalize = Normalize()
        self.tower = CLIPVisionModel.from_pretrained(start, dtype=torch.float32)
        config = self.tower.config
        grid = config.image_size // config.patch_size
        self.cell_contents = CellContents(config.hidden_size, grid, _SIZE)
        self.center_attributes = CenterAttributes([config.hidden_size], _SIZE)
        self.place = CellPlace(config.hidden_size, grid)
        self.grid = grid

    def forward(self, pixel_values: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of `Views`."""
        hidden = self.tower(self.normalize(pixel_values), output_hidden_states=True).hidden_states
        tokens = hidden[-2][:, 1:]
        loss, counts = tokens.new_zeros(()), {}
        if boxes.shape[1]:
            loss, counts["reading from the grid"] = self.cell_contents(tokens, boxes, attributes)
            maps = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            center_loss, center_counts = self.center_attributes([maps], boxes, attributes)
            loss, counts = loss + center_loss, counts | center_counts
        place_loss, counts["places of cells"] = self.place(tokens)
        return {"loss": loss + place_loss, "counts": counts}

    def save(self, folder: Path) -> None:
        """Save the tower as transformers does."""
        self.tower.save_pretrained(folder)


__all__ = ["TileTowerTraining", "Views", "slime_image_processor"]
