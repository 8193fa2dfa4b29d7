"""Objectives of the towers: predict the attributes of objects from their boxes and from the cells of a grid."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from small_world.frames import cells_of_centers
from small_world.pictures import ATTRIBUTES, CHARACTERS
from small_world.scenes import COLORS, SHAPES

# The labels of a cell of the grid: shapes, colors, characters.
CELL_LABELS = len(SHAPES) + len(COLORS) + len(CHARACTERS)


def count_right(right: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return the numbers of right answers and of questions, of shape `(1, 2)`, for Trainer to concatenate."""
    return torch.stack([right.sum(), asked.sum()]).unsqueeze(0)


class BoxAttributes(nn.Module):
    """Predicts the attributes of objects from `width` features each, with a linear layer for each attribute."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in ATTRIBUTES.items()})

    def forward(
        self, features: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of the cross-entropies, and the counts of [`count_right`] for each attribute.

        `features` are of shape `(num_images, num_boxes, width)`, `attributes` of shape `(num_images, num_boxes, 4)`
        with -1 for padding.
        """
        loss, counts = features.new_zeros(()), {}
        for index, (name, head) in enumerate(self.heads.items()):
            wanted = attributes[..., index]
            logits = head(features)
            loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-1)
            # Objects without a character do not count: their size gives the answer away.
            asked = wanted > 0 if name == "character" else wanted >= 0
            counts[name] = count_right((logits.argmax(-1) == wanted) & asked, asked)
        return loss, counts


def features_at_centers(feature_map: torch.Tensor, boxes: torch.Tensor, image_size: int) -> torch.Tensor:
    """Return the features of the cells that contain the centers of boxes, of shape `(num_images, num_boxes, width)`.

    `feature_map` is of shape `(num_images, width, side, side)`, `boxes` of shape `(num_images, num_boxes, 4)`, xyxy in
    pixels of a square of `image_size`.
    """
    index = cells_of_centers(boxes, feature_map.shape[-1], image_size)
    return feature_map.flatten(2).transpose(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, feature_map.shape[1]))


class CenterAttributes(nn.ModuleList):
    """Predicts the attributes of objects from the cells that contain their centers, for each of several maps.

    `widths` has the number of features of each map; boxes are in pixels of a square of `image_size`.
    """

    def __init__(self, widths: Iterable[int], image_size: int):
        super().__init__(BoxAttributes(width) for width in widths)
        self.image_size = image_size

    def forward(
        self, feature_maps: Iterable[torch.Tensor], boxes: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum over maps of the loss of [`BoxAttributes`], and the counts of the last map."""
        loss, counts = boxes.new_zeros(()), {}
        for feature_map, heads in zip(feature_maps, self, strict=True):
            map_loss, counts = heads(features_at_centers(feature_map, boxes, self.image_size), attributes)
            loss = loss + map_loss
        return loss, counts


class CellContents(nn.Module):
    """Predicts from each token of a grid the `CELL_LABELS` of the objects whose centers are in its cell."""

    def __init__(self, width: int, grid: int, image_size: int):
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.head = nn.Linear(width, CELL_LABELS)

    def forward(
        self, tokens: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the binary cross-entropy, summed over labels and averaged over cells, and counts of characters.

        `tokens` are of shape `(num_images, grid * grid, width)`, row by row. Only cells with one character count.
        """
        wanted = self._targets(boxes, attributes)
        logits = self.head(tokens).float()
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / wanted.shape[:2].numel()
        first = len(SHAPES) + len(COLORS)
        single = wanted[..., first:].sum(-1) == 1
        right = logits[..., first:].argmax(-1) == wanted[..., first:].argmax(-1)
        return loss, count_right(right & single, single)

    def _targets(self, boxes: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """Return the labels of each cell, zeros and ones of shape `(num_images, grid * grid, CELL_LABELS)`."""
        index = cells_of_centers(boxes, self.grid, self.image_size)
        shape, color, _, character = attributes.unbind(-1)
        # An additional column, dropped at the end, is for padding and for objects without a character.
        nothing = CELL_LABELS
        columns = [
            shape,
            len(SHAPES) + color,
            torch.where(character > 0, len(SHAPES) + len(COLORS) + character - 1, nothing),
        ]
        targets = boxes.new_zeros(len(boxes), self.grid**2, CELL_LABELS + 1)
        images = torch.arange(len(boxes), device=boxes.device).unsqueeze(1).expand_as(index)
        for column in columns:
            targets[images, index, torch.where(shape >= 0, column, nothing)] = 1
        return targets[..., :-1]


class CellPlace(nn.Module):
    """Predicts from each token of a grid the row and column of its cell."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.row, self.column = nn.Linear(width, grid), nn.Linear(width, grid)
        numbers = torch.arange(grid)
        self.register_buffer("rows", numbers.repeat_interleave(grid), persistent=False)
        self.register_buffer("columns", numbers.repeat(grid), persistent=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of two cross-entropies, and the counts of tokens for which both predictions are right.

        `tokens` are of shape `(num_images, grid * grid, width)`, row by row.
        """
        rows, columns = self.row(tokens).float(), self.column(tokens).float()
        wanted_rows, wanted_columns = (index.expand(len(tokens), -1) for index in (self.rows, self.columns))
        loss = F.cross_entropy(rows.flatten(0, 1), wanted_rows.flatten())
        loss = loss + F.cross_entropy(columns.flatten(0, 1), wanted_columns.flatten())
        right = (rows.argmax(-1) == wanted_rows) & (columns.argmax(-1) == wanted_columns)
        return loss, count_right(right, torch.ones_like(right))
