"""Boxes of a map's connected components at many thresholds at once, compiled by Numba.

Thresholding a map and tracing contours again for each of a thousand thresholds does the same work a thousand
times. Here the pixels are added once, from the highest to the lowest, to the components of their neighbours
(union-find); what stands after each level is what thresholding there would find. Holes are the components of
ground that does not reach the border, so the same sweep upside down finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, no_type_check

import numba
import numpy as np

from shared_core import InputError

Array = np.ndarray


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call and keep the result for the next process, where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@dataclass(frozen=True)
class ComponentSweep:
    """The components at each cut, one row a component, ordered by cut.

    `boxes` are xyxy with exclusive ends; `cut` numbers the cut of each row; `first` orders the components of
    a cut by their first pixels in raster order; `net_area` is the area of the polygon through the pixels'
    centres, holes taken off (OpenCV's contourArea where there is no hole), and means something for
    8-connected components.
    """

    boxes: Array
    cut: Array
    first: Array
    net_area: Array

    def at(self, cut: int) -> Array:
        """Boxes of one cut."""
        return self.boxes[self.cut == cut]


def sweep_components(levels: Array, cuts: int, connectivity: int = 8) -> ComponentSweep:
    """Find the components of ``levels > i`` for each i of 0 to cuts - 1.

    Args:
        levels: Whole numbers 0 to cuts, shape [height, width].
        cuts: How many cuts, below 65,536.
        connectivity: 4 or 8.

    Raises:
        InputError: Shape, kind or range of `levels` is another, or the connectivity.
    """
    if connectivity not in (4, 8):
        raise InputError("expected 4 or 8", field="connectivity", value=connectivity)
    levels = _checked(levels, cuts)
    return _swept(levels, np.zeros_like(levels), cuts, connectivity)


def sweep_contours(levels: Array, cuts: int) -> tuple[ComponentSweep, ComponentSweep, ComponentSweep]:
    """What OpenCV traces at each cut: outer contours, holes, and the outer contours that lie in no hole.

    Returns:
        The 8-connected components of ``levels > i``; the 4-connected ones of ``levels <= i`` that do not
        reach the border; the 8-connected ones with holes filled, whose net area is that of the contour.

    Raises:
        InputError: As `sweep_components`.
    """
    levels = _checked(levels, cuts)
    filled, last = _fill_holes(levels), levels.dtype.type(cuts)
    inside = filled > levels
    ground = np.where(inside, last - levels, 0).astype(levels.dtype)
    # A hole ends where its ground joins that of the border: when the cut reaches the filled level.
    holes = _swept(ground, np.where(inside, last - filled, 0).astype(levels.dtype), cuts, 4)
    holes = ComponentSweep(holes.boxes, cuts - 1 - holes.cut, holes.first, holes.net_area)
    solid = sweep_components(filled, cuts)
    islands = not np.array_equal(_fill_holes(ground), ground)
    return sweep_components(levels, cuts) if islands else solid, holes, solid


def _swept(levels: Array, ends: Array, cuts: int, connectivity: int) -> ComponentSweep:
    rows = _add_pixels(levels, ends, cuts, *_neighbourhoods(connectivity))[::-1]
    return ComponentSweep(rows[:, :4], rows[:, 4], rows[:, 5], rows[:, 6] / 2)


def _checked(levels: Array, cuts: int) -> Array:
    if levels.ndim != 2 or levels.dtype.kind not in "ui" or levels.size == 0:
        raise InputError("expected whole numbers, height by width", field="levels", value=levels.shape)
    if cuts >= 2**16:
        raise InputError("expected fewer than 65,536 different cuts", field="cuts", value=cuts)
    if levels.min() < 0 or levels.max() > cuts:
        raise InputError(f"expected 0 to {cuts}", field="levels", value=int(levels.max()))
    return np.ascontiguousarray(levels, dtype=np.uint8 if cuts < 2**8 else np.uint16)


@cache
def _neighbourhoods(connectivity: int) -> tuple[Array, Array, Array]:
    """What a pixel's eight neighbours say, by which of them are there.

    Neighbours are numbered in circular order from above left, so that even ones are corners, and neighbour i
    is bit i of a code.

    Returns:
        Neighbours to ask for their component, one for each group of neighbours that touch one another around
        the pixel, shape [256, 4]; how many these are; and how many of the four 2x2 blocks around the pixel
        have three or four pixels with it. Such a block adds half a square to the polygon through the pixels'
        centres when it gets its third pixel, and half when it gets its fourth.
    """
    ask, count, blocks = (np.zeros(shape, dtype=np.uint8) for shape in ((256, 4), 256, 256))
    for code in range(256):
        there = [bool(code >> place & 1) for place in range(8)]
        sides = [place for place in (1, 3, 5, 7) if there[place]]
        if (
            connectivity == 8
        ):  # two sides touch, with or without the corner between; a corner touches its sides
            groups = [place for place in sides if not there[place - 2]]
            groups += [
                place for place in (0, 2, 4, 6) if there[place] and not (there[place - 1] or there[place + 1])
            ]
        else:
            groups = [place for place in sides if not (there[place - 1] and there[place - 2])]
        groups = groups or sides[:1]  # a closed ring has no beginning
        ask[code, : len(groups)], count[code] = groups, len(groups)
        blocks[code] = sum(there[place] + there[place - 1] + there[place + 1] >= 2 for place in (0, 2, 4, 6))
    return ask, count, blocks


@no_type_check  # a check of annotations around the function could not be compiled
@compiled
def _fill_holes(levels):
    """For each pixel the least level that a 4-connected way to the border has to climb to."""
    height, width = levels.shape
    filled = np.full_like(levels, levels.max())
    filled[0], filled[-1], filled[:, 0], filled[:, -1] = levels[0], levels[-1], levels[:, 0], levels[:, -1]
    changed = True
    while changed:  # down and up again, until nothing changes
        changed = False
        for y in range(1, height - 1):
            above, here, own = filled[y - 1], filled[y], levels[y]
            way = here[0]
            for x in range(1, width - 1):
                way = max(own[x], min(above[x], here[x], way))
                changed |= way != here[x]
                here[x] = way
        for y in range(height - 2, 0, -1):
            below, here, own = filled[y + 1], filled[y], levels[y]
            way = here[width - 1]
            for x in range(width - 2, 0, -1):
                way = max(own[x], min(below[x], here[x], way))
                changed |= way != here[x]
                here[x] = way
    return filled


@no_type_check
@compiled
def _add_pixels(levels, ends, cuts, ask, asked, blocks):
    """Rows x0, y0, x1, y1, cut, first cell, doubled net area of the components, from last cut to first.

    A component is listed while the level is above that which `ends` has for its pixels.
    """
    height, width = levels.shape
    # Pixels from the highest level to the lowest, each level in raster order: a counting sort.
    start = np.zeros(cuts + 1, np.int64)
    for y in range(height):
        for x in range(width):
            start[levels[y, x]] += 1
    total = 0
    for level in range(cuts, -1, -1):
        start[level], total = total, total + start[level]
    place, ys, xs = start.copy(), np.empty(start[0], np.uint32), np.empty(start[0], np.uint32)
    for y in range(height):
        for x in range(width):
            level = levels[y, x]
            if level > 0:
                ys[place[level]], xs[place[level]] = y, x
                place[level] += 1
    # Cells have a border, so that no neighbour is outside, and unsigned numbers: Numba need not ask whether
    # they count from the end.
    one, stride = np.uint32(1), np.uint32(width + 2)
    cells = (height + 2) * (width + 2)
    ring = np.array([0, 1, 2, stride + 2, 2 * stride + 2, 2 * stride + 1, 2 * stride, stride], np.uint32)
    there, root, area = np.zeros(cells, np.uint8), np.empty(cells, np.uint32), np.zeros(cells, np.int32)
    box = np.empty((cells, 5), np.uint32)  # of roots: x0, y0, x1, y1, first cell
    live, alive = np.empty(start[0], np.uint32), 0
    rows, made = np.empty((4096, 7), np.int32), 0
    for level in range(cuts, 0, -1):
        for k in range(start[level], start[level - 1]):
            y, x = ys[k], xs[k]
            corner = y * stride + x
            code = np.uint32(0)
            for bit in range(8):
                code |= np.uint32(there[corner + ring[bit]]) << np.uint32(bit)
            p = corner + stride + one
            there[p] = 1
            if asked[code] == 0:
                here = p
                box[p, 0], box[p, 1], box[p, 2], box[p, 3], box[p, 4] = x, y, x + one, y + one, p
                live[alive] = p
                alive += 1
            else:
                here = corner + ring[ask[code, 0]]
                while root[here] != here:
                    root[here] = root[root[here]]
                    here = np.uint64(root[here])
                if x < box[here, 0]:
                    box[here, 0] = x
                if y < box[here, 1]:
                    box[here, 1] = y
                if x >= box[here, 2]:
                    box[here, 2] = x + one
                if y >= box[here, 3]:
                    box[here, 3] = y + one
                if p < box[here, 4]:
                    box[here, 4] = p
            root[p] = here
            for j in range(1, asked[code]):
                other = corner + ring[ask[code, j]]
                while root[other] != other:
                    root[other] = root[root[other]]
                    other = np.uint64(root[other])
                if other != here:
                    root[other] = here
                    area[here] += area[other]
                    for side in (0, 1, 4):
                        box[here, side] = min(box[here, side], box[other, side])
                    for side in (2, 3):
                        box[here, side] = max(box[here, side], box[other, side])
            area[here] += blocks[code]
        if made + alive > len(rows):
            longer = np.empty((2 * (made + alive), 7), np.int32)
            longer[:made] = rows[:made]
            rows = longer
        roots = 0
        for k in range(alive):
            cell = live[k]
            x0, y0, x1, y1, first = box[cell]
            if root[cell] == cell and level > ends[first // stride - 1, first % stride - 1]:
                live[roots] = cell
                roots += 1
                row = rows[made]
                row[0], row[1], row[2], row[3] = x0, y0, x1, y1
                row[4], row[5], row[6] = level - 1, first, area[cell]
                made += 1
        alive = roots
    return rows[:made]
