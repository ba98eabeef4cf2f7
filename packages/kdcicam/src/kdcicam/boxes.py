"""From a map to a box: the authors' two-threshold extractor and the plain one by contours.

Each is there for one threshold, and for many in one pass over the map.

Boxes are xyxy in pixels of the map. The contour extractor gives them as the reference evaluation of Choe
et al. (CVPR 2020) does: one past the last pixel, but at most the last pixel of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kdcicam.box_sweep import ComponentSweep, levels_of, sweep_components
from shared_core import InputError
from shared_core.boxes import component_boxes
from shared_core.errors import needs_extra

Array = np.ndarray
Extractor = Literal["official", "contour"]


@dataclass(frozen=True)
class MapBox:
    """A box, and whether the map gave it: a map that is constant or not finite gives the whole image."""

    box: tuple[int, int, int, int]
    found: bool


@dataclass(frozen=True)
class BoxesByThreshold:
    """One box a threshold: `boxes` [thresholds, 4]; `found` says which the map gave (see `MapBox`)."""

    boxes: Array
    found: Array


@dataclass(frozen=True)
class ContoursByThreshold:
    """The boxes of all contours at each threshold.

    Row i of `boxes` belongs to the distinct cut ``cut[i]``, and threshold t to the cut ``cut_of[t]``; a cut
    without contours has no row. `largest` is the one box a threshold of MaxBoxAcc.
    """

    boxes: Array
    cut: Array
    cut_of: Array
    cuts: int
    largest: BoxesByThreshold

    def at(self, threshold: int) -> Array:
        """All boxes of a threshold, by its number."""
        return self.boxes[self.cut == self.cut_of[threshold]]


def boxes_from_map(values: Array, threshold: float, mode: Extractor = "official") -> MapBox:
    """Box one map.

    ``official`` (the authors' evaluation): what is above threshold * max is kept and the rest set to zero;
    the mask is what is above the *mean* of that (the second threshold, which binds where the first is
    small); of the 4-connected components the one whose bounding box is largest gives the box.
    ``contour`` (the field's evaluation): the map scaled to 0..255 in whole numbers, what is above
    int(threshold * max), the 8-connected contour of the largest polygon area.

    Args:
        values: The map at the image's size, [height, width].
        threshold: 0 to below 1, as a share of the largest value.
        mode: The extractor.

    Raises:
        InputError: The threshold or the mode is none, or the map has another shape.

    >>> values = np.zeros((6, 6)); values[1:4, 2:5] = 1.0
    >>> boxes_from_map(values, 0.2).box
    (2, 1, 5, 4)
    >>> boxes_from_map(np.ones((6, 6)), 0.2)
    MapBox(box=(0, 0, 6, 6), found=False)
    """
    thresholds = _checked(values, np.array([threshold], dtype=np.float64))
    if mode not in get_args(Extractor):
        raise InputError(f"expected one of {', '.join(get_args(Extractor))}", field="mode", value=mode)
    height, width = values.shape
    if not _shows_something(values):
        return MapBox((0, 0, width, height), False)
    if mode == "contour":
        gray = _gray(values)
        box = _largest_contour(gray > int(threshold * int(gray.max())))
    else:
        exact = values.astype(np.float64)
        found = component_boxes(exact > _official_cuts(exact, thresholds)[0], 4)
        box = found[_bounding_area(found).argmax()] if len(found) else None
    if box is None:
        return MapBox((0, 0, width, height), False)
    x0, y0, x1, y1 = (int(side) for side in box)
    return MapBox((x0, y0, x1, y1), True)


def official_boxes(values: Array, thresholds: Array) -> BoxesByThreshold:
    """The official box at each threshold, in one pass over the map; the same as `boxes_from_map` for each.

    Args:
        values: The map, [height, width].
        thresholds: Shares of the maximum, in any order.
    """
    thresholds = _checked(values, thresholds)
    nothing = _nothing(values, len(thresholds))
    if not _shows_something(values):
        return nothing
    exact = values.astype(np.float64)
    cuts, cut_of = np.unique(_official_cuts(exact, thresholds), return_inverse=True)
    levels = levels_of(exact, cuts)
    sweep = sweep_components(levels, len(cuts), 4)
    best = _BestOfCut(sweep, _bounding_area(sweep.boxes))
    boxes, found = _per_cut(sweep, best.row, values.shape)
    for cut in np.flatnonzero(best.tied & found):  # then the first in raster order
        candidates = component_boxes(levels > cut, 4)
        boxes[cut] = candidates[_bounding_area(candidates).argmax()]
    return BoxesByThreshold(boxes[cut_of], found[cut_of])


def contour_boxes(values: Array, thresholds: Array, *, holes: bool = True) -> ContoursByThreshold:
    """The boxes of all contours at each threshold, and of the largest one, in one pass over the map.

    The reference thresholds an 8-bit map, so at most 255 of the thresholds differ; the contours of these come
    out of a sweep over the map's components instead of tracing.

    Args:
        values: The map, [height, width].
        thresholds: Shares of the maximum, in any order.
        holes: The reference lists the inner contours of holes too, and so does this where true.
    """
    thresholds = _checked(values, thresholds)
    if not _shows_something(values):
        empty = np.empty((0, 4), dtype=np.int64)
        nothing = _nothing(values, len(thresholds))
        cut_of = np.zeros(len(thresholds), dtype=np.int64)
        return ContoursByThreshold(empty, np.empty(0, dtype=np.int64), cut_of, 1, nothing)
    gray = _gray(values)
    at = (thresholds * int(gray.max())).astype(np.int64)
    cuts, cut_of = np.unique(at, return_inverse=True)
    levels = levels_of(np.arange(256), cuts)[gray]
    sweep = sweep_components(levels, len(cuts), 8, areas=True)
    inner, inner_cut = (
        _holes(levels, len(cuts)) if holes else (np.empty((0, 4), np.int64), np.empty(0, np.int64))
    )
    rows = _largest_contours(sweep, levels, np.unique(inner_cut) if holes else None)
    boxes, cut = np.concatenate([sweep.boxes, inner]), np.concatenate([sweep.cut, inner_cut])
    last = np.array([values.shape[1] - 1, values.shape[0] - 1])
    boxes[:, 2:] = np.minimum(boxes[:, 2:], last)
    largest, found = rows
    largest[found, 2:] = np.minimum(largest[found, 2:], last)
    order = np.argsort(cut, kind="stable")
    by_threshold = BoxesByThreshold(largest[cut_of], found[cut_of])
    return ContoursByThreshold(boxes[order], cut[order], cut_of, len(cuts), by_threshold)


class _BestOfCut:
    """For each cut the row of the sweep with the greatest score, and whether another has the same."""

    def __init__(self, sweep: ComponentSweep, score: Array) -> None:
        self.row = np.full(sweep.cuts, -1, dtype=np.int64)
        order = np.lexsort((-score, sweep.cut))
        first = np.ones(len(order), dtype=bool)
        first[1:] = sweep.cut[order[1:]] != sweep.cut[order[:-1]]
        self.row[sweep.cut[order[first]]] = order[first]
        self.tied = np.zeros(sweep.cuts, dtype=bool)
        second = np.flatnonzero(first) + 1
        second = second[second < len(order)]
        second = second[~first[second]]
        same = score[order[second]] == score[order[second - 1]]
        self.tied[sweep.cut[order[second[same]]]] = True


def _per_cut(sweep: ComponentSweep, row: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    boxes = np.tile(np.array([0, 0, shape[1], shape[0]], dtype=np.int64), (sweep.cuts, 1))
    found = row >= 0
    boxes[found] = sweep.boxes[row[found]]
    return boxes, found


def _largest_contours(sweep: ComponentSweep, levels: Array, with_holes: Array | None) -> tuple[Array, Array]:
    """The box of the contour of the largest area at each cut.

    Net areas decide where no component has a hole. With holes the polygon's area lies between the net area
    and that of the bounding box, which decides most cuts; OpenCV is asked for the rest and for ties.
    """
    sizes = sweep.boxes[:, 2:] - sweep.boxes[:, :2] - 1
    bound = np.prod(sizes, axis=1).astype(np.float64)
    best = _BestOfCut(sweep, sweep.net_area)
    boxes, found = _per_cut(sweep, best.row, levels.shape)
    rival = bound.copy()
    rival[best.row[best.row >= 0]] = -1
    highest = np.full(sweep.cuts, -1.0)
    np.maximum.at(highest, sweep.cut, rival)
    clear = np.zeros(sweep.cuts, dtype=bool)
    clear[found] = sweep.net_area[best.row[found]] > highest[found]
    if with_holes is not None:
        whole = np.ones(sweep.cuts, dtype=bool)
        whole[with_holes] = False
        clear |= whole & ~best.tied
    for cut in np.flatnonzero(found & ~clear):
        boxes[cut] = _largest_contour(levels > cut)
    return boxes, found


def _holes(levels: Array, cuts: int) -> tuple[Array, Array]:
    """Boxes of the contours around holes, and their cuts: a 4-connected ground that does not reach the edge.

    Such a contour runs over the pixels around the hole, so its box is one pixel larger on each side.
    """
    ground = np.full((levels.shape[0] + 2, levels.shape[1] + 2), cuts, dtype=levels.dtype)
    np.subtract(levels.dtype.type(cuts), levels, out=ground[1:-1, 1:-1])
    sweep = sweep_components(ground, cuts, 4)
    inside = sweep.boxes[:, 0] > 0
    boxes = sweep.boxes[inside] + np.array([-2, -2, 0, 0])
    return boxes, cuts - 1 - sweep.cut[inside]


def _largest_contour(mask: Array) -> Array | None:
    with needs_extra("images", "kdcicam"):
        import cv2
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return None
    x, y, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    x1, y1 = min(x + width, mask.shape[1] - 1), min(y + height, mask.shape[0] - 1)
    return np.array([x, y, x1, y1], dtype=np.int64)


def _official_cuts(values: Array, thresholds: Array) -> Array:
    """The value that pixels of the mask are above, for each threshold: the greater of the two."""
    first = thresholds * values.max()
    order = np.argsort(first)
    level = levels_of(values, first[order])
    sums = np.bincount(level.ravel(), weights=values.ravel(), minlength=len(first) + 1)
    kept_means = np.empty(len(first))
    kept_means[order] = np.cumsum(sums[::-1])[::-1][1:] / values.size
    return np.maximum(first, kept_means)


def _gray(values: Array) -> Array:
    exact = values.astype(np.float64)
    low = exact.min()
    return ((exact - low) / (exact.max() - low) * 255).astype(np.uint8)


def _shows_something(values: Array) -> bool:
    return bool(np.isfinite(values).all() and values.max() > max(values.min(), 0))


def _nothing(values: Array, count: int) -> BoxesByThreshold:
    whole = np.array([0, 0, values.shape[1], values.shape[0]], dtype=np.int64)
    return BoxesByThreshold(np.tile(whole, (count, 1)), np.zeros(count, dtype=bool))


def _bounding_area(boxes: Array) -> Array:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _checked(values: Array, thresholds: Array) -> Array:
    if values.ndim != 2 or values.size == 0:
        raise InputError("expected one map, height by width", field="values", value=values.shape)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    wrong = thresholds[~((thresholds >= 0) & (thresholds < 1))]
    if thresholds.ndim != 1 or len(thresholds) == 0 or len(wrong):
        raise InputError(
            "expected shares of the maximum, 0 to below 1",
            field="threshold",
            value=float(wrong[0]) if len(wrong) else thresholds.shape,
        )
    return thresholds
