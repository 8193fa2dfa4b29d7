"""What the towers learn: to tell the attributes of objects, from their boxes and from the grid."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from small_world.frames import cells_of_centers
from small_world.pictures import ATTRIBUTES, CHARACTERS
from small_world.scenes import COLORS, SHAPES

# What a cell of the grid can hold: shapes, colors, characters.
CELL_LABELS = len(SHAPES) + len(COLORS) + len(CHARACTERS)


def count_right(right: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Count what is right and what was asked, as one row of a table that grows by batches."""
    return torch.stack([right.sum(), asked.sum()]).unsqueeze(0)


class BoxAttributes(nn.Module):
    """Tells the attributes of an object from the features of its box, with one linear layer each.

    Args:
        width (`int`): Number of features.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in ATTRIBUTES.items()})

    def forward(
        self, features: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss.

        Args:
            features (`torch.Tensor` of shape `(num_images, num_boxes, width)`): Features of boxes.
            attributes (`torch.LongTensor` of shape `(num_images, num_boxes, 4)`): Indices, -1 for padding.

        Returns:
            The sum of the cross-entropies, and for each attribute how many are right and how many there are, each of
            shape `(1, 2)`.
        """
        loss, counts = features.new_zeros(()), {}
        for index, (name, head) in enumerate(self.heads.items()):
            wanted = attributes[..., index]
            logits = head(features)
            loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-1)
            # Whether there is no character is told by its size; reading is what counts.
            asked = wanted > 0 if name == "character" else wanted >= 0
            counts[name] = count_right((logits.argmax(-1) == wanted) & asked, asked)
        return loss, counts


def features_at_centers(feature_map: torch.Tensor, boxes: torch.Tensor, image_size: int) -> torch.Tensor:
    """Take from a map the features of the cells that the centers of boxes lie in.

    Args:
        feature_map (`torch.Tensor` of shape `(num_images, width, side, side)`): The map.
        boxes (`torch.Tensor` of shape `(num_images, num_boxes, 4)`): x1, y1, x2, y2 in pixels of the square.
        image_size (`int`): Side of that square.

    Returns:
        `torch.Tensor` of shape `(num_images, num_boxes, width)`.
    """
    index = cells_of_centers(boxes, feature_map.shape[-1], image_size)
    return feature_map.flatten(2).transpose(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, feature_map.shape[1]))


class CenterAttributes(nn.ModuleList):
    """Tells the attributes of objects from the cells of several maps that their centers lie in, map by map.

    Args:
        widths (`Iterable[int]`): Number of features of each map.
        image_size (`int`): Side of the square that boxes refer to, in pixels.
    """

    def __init__(self, widths: Iterable[int], image_size: int):
        super().__init__(BoxAttributes(width) for width in widths)
        self.image_size = image_size

    def forward(
        self, feature_maps: Iterable[torch.Tensor], boxes: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss.

        Args:
            feature_maps (`Iterable[torch.Tensor]`): The maps, each of shape `(num_images, width, side, side)`.
            boxes (`torch.Tensor` of shape `(num_images, num_boxes, 4)`): x1, y1, x2, y2 in pixels of the square.
            attributes (`torch.LongTensor` of shape `(num_images, num_boxes, 4)`): Indices, -1 for padding.

        Returns:
            The sum over maps of the loss of [`BoxAttributes`], and the counts of the last map.
        """
        loss, counts = boxes.new_zeros(()), {}
        for feature_map, heads in zip(feature_maps, self, strict=True):
            map_loss, counts = heads(features_at_centers(feature_map, boxes, self.image_size), attributes)
            loss = loss + map_loss
        return loss, counts


class CellContents(nn.Module):
    """Tells from each token of the grid what the objects centered in its cell are.

    Args:
        width (`int`): Number of features of a token.
        grid (`int`): Side of the grid.
        image_size (`int`): Side of the square that boxes refer to, in pixels.
    """

    def __init__(self, width: int, grid: int, image_size: int):
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.head = nn.Linear(width, CELL_LABELS)

    def forward(
        self, tokens: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss.

        Args:
            tokens (`torch.Tensor` of shape `(num_images, grid * grid, width)`): Tokens, row by row.
            boxes (`torch.Tensor` of shape `(num_images, num_boxes, 4)`): x1, y1, x2, y2 in pixels of the square.
            attributes (`torch.LongTensor` of shape `(num_images, num_boxes, 4)`): Indices, -1 for padding.

        Returns:
            Binary cross-entropy, summed over labels and averaged over cells; and of the cells with one character how
            many are read and how many there are, of shape `(1, 2)`.
        """
        wanted = self._targets(boxes, attributes)
        logits = self.head(tokens).float()
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / wanted.shape[:2].numel()
        first = len(SHAPES) + len(COLORS)
        single = wanted[..., first:].sum(-1) == 1
        right = logits[..., first:].argmax(-1) == wanted[..., first:].argmax(-1)
        return loss, count_right(right & single, single)

    def _targets(self, boxes: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """What each cell holds, `(num_images, grid * grid, CELL_LABELS)` of zeros and ones."""
        index = cells_of_centers(boxes, self.grid, self.image_size)
        shape, color, _, character = attributes.unbind(-1)
        # One column more takes what is not there: padding, and objects without a character.
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
    """Tells from each token of the grid which row and column it is in.

    Args:
        width (`int`): Number of features of a token.
        grid (`int`): Side of the grid.
    """

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.row, self.column = nn.Linear(width, grid), nn.Linear(width, grid)
        numbers = torch.arange(grid)
        self.register_buffer("rows", numbers.repeat_interleave(grid), persistent=False)
        self.register_buffer("columns", numbers.repeat(grid), persistent=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss.

        Args:
            tokens (`torch.Tensor` of shape `(num_images, grid * grid, width)`): Tokens, row by row.

        Returns:
            The sum of two cross-entropies, and how many tokens have both right and how many there are, of shape
            `(1, 2)`.
        """
        rows, columns = self.row(tokens).float(), self.column(tokens).float()
        wanted_rows, wanted_columns = (index.expand(len(tokens), -1) for index in (self.rows, self.columns))
        loss = F.cross_entropy(rows.flatten(0, 1), wanted_rows.flatten())
        loss = loss + F.cross_entropy(columns.flatten(0, 1), wanted_columns.flatten())
        right = (rows.argmax(-1) == wanted_rows) & (columns.argmax(-1) == wanted_columns)
        return loss, count_right(right, torch.ones_like(right))
