"""The grid that masks live on, and what a box covers of it.

Masks are predicted on a grid of one cell every `stride` image pixels. A cell stands for the pixel in its
middle: cell c for pixel ``stride // 2 + stride * c`` (BoxInst, section 3.3: offset 2, step 4).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_core import InputError


def grid_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Cells of a grid over an image: those whose middle pixel lies in it.

    >>> grid_size(64, 66, 4), grid_size(3, 67, 4)
    ((16, 16), (1, 17))
    """
    offset = stride // 2
    return max(1, -(-(height - offset) // stride)), max(1, -(-(width - offset) // stride))


def box_cells(
    boxes: Float[Tensor, "instances 4"], grid: tuple[int, int], stride: int = 4
) -> tuple[Int[Tensor, "instances 4"], int]:
    """The rectangle of cells that each box covers.

    Args:
        boxes: x0, y0, x1, y1 in pixels of the image. A pixel belongs to the box if it lies between the whole
            parts of both ends, ends included, as in BoxInst.
        grid: Height and width of the grid in cells.
        stride: Pixels a cell.

    Returns:
        x0, y0, x1, y1 in cells, ends exclusive, never empty: a box between two cells, or beyond the image,
        keeps the nearest cell. And how many boxes had to be widened so.

    Raises:
        InputError: A box is not finite or inverted.

    >>> box_cells(torch.tensor([[0.0, 0, 9, 5], [3, 3, 4, 4]]), (4, 4))
    (tensor([[0, 0, 2, 1],
            [0, 0, 1, 1]]), 1)
    """
    _check(boxes)
    offset = stride // 2
    height, width = grid
    limit = torch.tensor([width, height], device=boxes.device)
    whole = boxes.detach().double().trunc().long()
    first = -((offset - whole[:, :2]) // stride)  # the first cell whose pixel is not before the box
    last = (whole[:, 2:] - offset) // stride + 1
    first, last = first.clamp(min=0), last.clamp(min=0).minimum(limit)
    empty = (last <= first).any(1)
    middle = ((boxes[:, :2] + boxes[:, 2:]).double() / 2 - offset) / stride
    nearest = middle.round().long().clamp(min=0).minimum(limit - 1)
    narrow = last <= first
    first = torch.where(narrow, nearest, first)
    last = torch.where(narrow, nearest + 1, last)
    return torch.cat([first, last], 1), int(empty.sum())


def _check(boxes: Tensor) -> None:
    finite = boxes.isfinite().all(1)
    if not bool(finite.all()):
        raise InputError("expected finite numbers", field="boxes", value=boxes[~finite][0].tolist())
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bool(inverted.any()):
        raise InputError(
            "expected x0 <= x1 and y0 <= y1; for x, y, width, height use shared_core.boxes.xywh_to_xyxy",
            field="boxes",
            value=boxes[inverted][0].tolist(),
        )


def cell_masks(cells: Int[Tensor, "instances 4"], grid: tuple[int, int]) -> Bool[Tensor, "instances h w"]:
    """Rectangles of cells as masks."""
    y = torch.arange(grid[0], device=cells.device)
    x = torch.arange(grid[1], device=cells.device)
    x0, y0, x1, y1 = (cells[:, i, None] for i in range(4))
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
    return rows[:, :, None] & columns[:, None, :]


def box_masks(
    boxes: Float[Tensor, "instances 4"], grid: tuple[int, int], stride: int = 4
) -> Bool[Tensor, "instances h w"]:
    """Boxes as masks on the grid. Arguments and errors as for `box_cells`."""
    return cell_masks(box_cells(boxes, grid, stride)[0], grid)


def to_grid(values: Float[Tensor, "*batch h w"], stride: int) -> Float[Tensor, "*batch gh gw"]:
    """Mean of the pixels around each cell, over those that lie in the image.

    >>> to_grid(torch.arange(8.0).reshape(1, 8), 4)
    tensor([[1.5000, 5.5000]])
    """
    height, width = values.shape[-2:]
    rows, columns = grid_size(height, width, stride)
    flat = values.reshape(-1, 1, height, width)
    whole = (rows * stride, columns * stride)
    if whole != (height, width):
        flat = torch.nn.functional.pad(
            flat, (0, max(0, whole[1] - width), 0, max(0, whole[0] - height)), mode="replicate"
        )[..., : whole[0], : whole[1]]
    # As two products: several times as fast on a CPU as a pooling of few channels.
    mean = flat.new_full((1, stride), 1 / stride)
    down = (mean @ flat.reshape(-1, rows, stride, whole[1])).reshape(-1, rows, columns, stride)
    return (down @ mean[0]).reshape(*values.shape[:-2], rows, columns)
