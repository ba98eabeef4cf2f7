"""Boxes of a map's connected components at many thresholds at once.

Thresholding a map and tracing contours again for each of a thousand thresholds does the same work a thousand
times. Here every pixel climbs to the top of its hill once (steepest ascent with pointer doubling); the hills'
passes, in order of height, say which of them are joined at each threshold, and the rows and columns that a
hill reaches at each threshold follow from running maxima. All steps are array operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared_core import InputError

Array = np.ndarray


@dataclass(frozen=True)
class ComponentSweep:
    """The components at each cut, one row a component, ordered by cut.

    `boxes` are xyxy with exclusive ends; `cut` numbers the cut of each row; `net_area` is the area of the
    polygon through the pixels' centres, holes taken off (OpenCV's contourArea where there is no hole).
    """

    cuts: int
    boxes: Array
    cut: Array
    net_area: Array

    def at(self, cut: int) -> Array:
        """Boxes of one cut."""
        return self.boxes[self.cut == cut]


def levels_of(values: Array, cuts: Array) -> Array:
    """For each value, how many of the ascending `cuts` it is above: strictly, so a value at a cut is not."""
    kind = np.uint8 if len(cuts) < 2**8 else np.uint16
    return np.searchsorted(cuts, values.ravel(), side="left").reshape(values.shape).astype(kind)


def sweep_components(
    levels: Array, cuts: int, connectivity: int = 8, *, areas: bool = False
) -> ComponentSweep:
    """Find the components of ``levels > i`` for each i of 0 to cuts - 1.

    Args:
        levels: Whole numbers 0 to cuts, shape [height, width].
        cuts: How many cuts.
        connectivity: 4 or 8.
        areas: Fill in `net_area`, else it is zeros.

    Raises:
        InputError: Shape, kind or range of `levels` is another.
    """
    if levels.ndim != 2 or levels.dtype.kind not in "ui" or levels.size == 0:
        raise InputError("expected whole numbers, height by width", field="levels", value=levels.shape)
    if levels.min() < 0 or levels.max() > cuts:
        raise InputError(f"expected 0 to {cuts}", field="levels", value=int(levels.max()))
    hill, peaks = _hills(levels, connectivity)
    heights = levels.ravel()[peaks]
    alive = heights > 0
    if not alive.any():
        empty = np.empty(0, dtype=np.int64)
        return ComponentSweep(cuts, np.empty((0, 4), dtype=np.int64), empty, np.empty(0))
    order, joins = _dendrogram(hill, levels, len(peaks), connectivity)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    hill = place[hill]  # hills are now numbered so that each component is a run of neighbours
    return _components(levels, hill, heights[order], joins, cuts, areas)


def _hills(levels: Array, connectivity: int) -> tuple[Array, Array]:
    """The hill that each pixel is on, and the raster index of each hill's top."""
    height, width = levels.shape
    bits = max(1, (levels.size - 1).bit_length())
    kind = np.int32 if (int(levels.max()) + 1) << bits < 2**31 else np.int64
    # Value and place in one number: equal values are climbed in raster order, so a plateau has a way up too.
    # It begins at the plateau's first pixel: places count backwards.
    place = np.arange(levels.size - 1, -1, -1, dtype=kind)
    key = (levels.ravel().astype(kind) << bits) | place
    key = key.reshape(height, width)
    up = key.copy()
    np.maximum(up[:, 1:], key[:, :-1], out=up[:, 1:])
    np.maximum(up[:, :-1], key[:, 1:], out=up[:, :-1])
    side = up.copy() if connectivity == 8 else key
    np.maximum(up[1:], side[:-1], out=up[1:])
    np.maximum(up[:-1], side[1:], out=up[:-1])
    parent = (levels.size - 1 - (up.ravel() & ((1 << bits) - 1))).astype(np.intp)
    for _ in range(4):  # no map is done earlier
        parent = parent[parent]
    while not np.array_equal(higher := parent[parent], parent):
        parent = higher
    peaks = np.flatnonzero(parent == np.arange(levels.size))
    number = np.empty(levels.size, dtype=np.intp)
    number[peaks] = np.arange(len(peaks))
    return number[parent], peaks


def _passes(hill: Array, levels: Array, count: int, connectivity: int) -> tuple[Array, Array, Array]:
    """Pairs of touching hills with the height of the highest pass between them, highest first."""
    height, width = levels.shape
    flat, grid = levels.ravel(), hill.astype(np.int16 if count < 2**15 else np.int32).reshape(height, width)
    steps = [(np.s_[:, :-1], np.s_[:, 1:], 1), (np.s_[:-1], np.s_[1:], width)]
    if connectivity == 8:
        steps.append((np.s_[:-1, :-1], np.s_[1:, 1:], width + 1))
        steps.append((np.s_[:-1, 1:], np.s_[1:, :-1], width - 1))
    keys, passes = [], []
    for one, other, step in steps:
        differs = np.zeros((height, width), dtype=bool)
        np.not_equal(grid[one], grid[other], out=differs[one])
        here = np.flatnonzero(differs)
        a, b = hill[here], hill[here + step]
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        passes.append(np.minimum(flat[here], flat[here + step]))
    key, value = _highest(np.concatenate(keys), np.concatenate(passes), count * count)
    order = np.argsort(-value, kind="stable")
    return key[order] // count, key[order] % count, value[order]


def _highest(key: Array, value: Array, keys: int) -> tuple[Array, Array]:
    """The distinct keys, each with its highest value (values are above -1)."""
    if keys <= 2**20:  # a table is faster than sorting, while it is small
        table = np.full(keys, -1, dtype=np.int64)
        np.maximum.at(table, key, value.astype(np.int64))
        key = np.flatnonzero(table >= 0)
        return key, table[key]
    scale = int(value.max(initial=0)) + 1
    both = np.sort(key * scale + value)
    key = both // scale
    last = np.ones(len(key), dtype=bool)
    last[:-1] = key[1:] != key[:-1]
    return key[last], both[last] % scale


def _dendrogram(hill: Array, levels: Array, count: int, connectivity: int) -> tuple[Array, Array]:
    """An order of the hills in which every component is a run, and the height that joins each to the next."""
    leader, tail, follows = list(range(count)), list(range(count)), [-1] * count
    joined = [0] * count

    def root(node: int) -> int:
        while leader[node] != node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for a, b, value in zip(
        *(part.tolist() for part in _passes(hill, levels, count, connectivity)), strict=True
    ):
        one, other = root(a), root(b)
        if one != other:
            follows[tail[one]] = other  # a leader is the first of its run
            joined[tail[one]] = value
            tail[one] = tail[other]
            leader[other] = one
    order, node = np.empty(count, dtype=np.intp), root(0)
    for index in range(count):
        order[index] = node
        node = follows[node]
    return order, np.array(joined)[order]


def _components(
    levels: Array, hill: Array, heights: Array, joins: Array, cuts: int, areas: bool
) -> ComponentSweep:
    height, width = levels.shape
    count = len(heights)
    first_row, last_row = _reach(hill.reshape(height, width), levels, count, cuts)
    first_column, last_column = _reach(hill.reshape(height, width).T, levels.T, count, cuts)
    area = _areas(levels, hill, count, cuts) if areas else np.zeros((cuts, count))
    # Cells are (cut, hill), cut by cut; a component is a run of hills that are joined above the cut.
    cut_numbers = np.arange(cuts)[:, None]
    alive = heights[None, :] > cut_numbers
    begins = np.empty((cuts, count), dtype=bool)
    begins[:, 0] = True
    begins[:, 1:] = joins[None, :-1] <= cut_numbers
    begins = np.flatnonzero(begins & alive)  # hills below the cut stand alone: their passes are lower still
    cells = np.flatnonzero(alive)
    starts = np.searchsorted(cells, begins)
    x0, y0 = (np.minimum.reduceat(reach.ravel()[cells], starts) for reach in (first_column, first_row))
    x1, y1 = (np.maximum.reduceat(reach.ravel()[cells], starts) for reach in (last_column, last_row))
    return ComponentSweep(
        cuts,
        np.stack([x0, y0, x1, y1], axis=1),
        begins // count,
        np.add.reduceat(area.ravel()[cells], starts),
    )


def _reach(grid: Array, levels: Array, count: int, cuts: int) -> tuple[Array, Array]:
    """First and last (exclusive) row that each hill reaches at each cut, shape [cuts, hills]."""
    lines, length = levels.shape
    grid = np.ascontiguousarray(grid)
    changes = np.empty((lines, length), dtype=bool)
    changes[:, 0] = True
    np.not_equal(grid[:, 1:], grid[:, :-1], out=changes[:, 1:])
    runs = np.flatnonzero(changes)
    tops = np.maximum.reduceat(np.ascontiguousarray(levels).ravel(), runs).astype(np.int64)
    top = np.zeros(count * lines, dtype=np.int64)
    np.maximum.at(top, grid.ravel()[runs] * lines + runs // length, tops)
    top = top.reshape(count, lines)
    ends = []
    for reading in (top, top[:, ::-1]):
        rising = np.maximum.accumulate(reading, axis=1)
        # How many lines from this side stay at or below each cut: those of rising <= cut.
        table = np.bincount(
            (np.arange(count)[:, None] * (cuts + 1) + rising).ravel(), minlength=count * (cuts + 1)
        ).reshape(count, cuts + 1)
        ends.append(np.cumsum(table, axis=1)[:, :cuts].T)
    return ends[0], lines - ends[1]


def _areas(levels: Array, hill: Array, count: int, cuts: int) -> Array:
    """Net polygon area of each hill at each cut, [cuts, hills].

    A 2x2 block with three pixels above the cut adds half a square and one with four a whole one. Three of a
    block always belong together, so the hill of any of them is right.
    """
    grid = hill.reshape(levels.shape)
    a, b, c, d = levels[:-1, :-1], levels[:-1, 1:], levels[1:, :-1], levels[1:, 1:]
    low, high = np.minimum(a, b), np.maximum(a, b)
    other_low, other_high = np.minimum(c, d), np.maximum(c, d)
    fourth = np.minimum(low, other_low)
    third = np.minimum(np.maximum(low, other_low), np.minimum(high, other_high))
    base = np.where(a >= b, grid[:-1, :-1], grid[:-1, 1:]).ravel() * (cuts + 1)
    size = count * (cuts + 1)
    table = np.bincount(base + third.ravel(), minlength=size) + np.bincount(
        base + fourth.ravel(), minlength=size
    )
    above = np.cumsum(table.reshape(count, cuts + 1)[:, ::-1], axis=1)[:, ::-1]
    return above[:, 1:].T / 2
