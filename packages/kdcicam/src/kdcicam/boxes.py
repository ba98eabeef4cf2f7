"""From a map to a box: the authors' two-threshold extractor and the plain one by contours.

Each is there for one threshold, and for many in one pass over the map.

Boxes are xyxy in pixels of the map. The contour extractor gives them as the reference evaluation of Choe
et al. (CVPR 2020) does: one past the last pixel, but at most the last pixel of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from shared_core import InputError
from shared_core.errors import needs_extra

if TYPE_CHECKING:
    from kdcicam.box_sweep import ComponentSweep

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

    Row i of `boxes` belongs to the distinct cut ``cut[i]``, in no order, and threshold t to the cut
    ``cut_of[t]``; a cut without contours has no row. `largest` is the one box a threshold of MaxBoxAcc.
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
    if not _shows_something(values, mode):
        return MapBox((0, 0, width, height), False)
    if mode == "contour":
        gray = _gray(values)
        box = _largest_contour(gray > int(threshold * int(gray.max())))
    else:
        swept = official_boxes(values, thresholds)
        box = swept.boxes[0] if swept.found[0] else None
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
    if not _shows_something(values, "official"):
        return nothing
    with needs_extra("images", "kdcicam"):
        from kdcicam.box_sweep import sweep_components
    exact = values.astype(np.float64)
    cuts, cut_of = np.unique(_official_cuts(exact, thresholds), return_inverse=True)
    sweep = sweep_components(_levels_of(exact, cuts), len(cuts), 4)
    sides = sweep.boxes[:, 2:] - sweep.boxes[:, :2]
    row, _ = _best_of_cuts(sweep, sides[:, 0].astype(np.int64) * sides[:, 1], len(cuts))
    boxes, found = _boxes_of(sweep, row, values.shape)
    return BoxesByThreshold(boxes[cut_of], found[cut_of])


def contour_boxes(values: Array, thresholds: Array) -> ContoursByThreshold:
    """The boxes of all contours at each threshold, those around holes too, and of the largest one.

    The reference thresholds an 8-bit map, so at most 255 of the thresholds differ; the contours of these come
    out of a sweep over the map's components instead of tracing.

    Args:
        values: The map, [height, width].
        thresholds: Shares of the maximum, in any order.
    """
    thresholds = _checked(values, thresholds)
    if not _shows_something(values, "contour"):
        empty = np.empty((0, 4), dtype=np.int64)
        nothing = _nothing(values, len(thresholds))
        cut_of = np.zeros(len(thresholds), dtype=np.int64)
        return ContoursByThreshold(empty, np.empty(0, dtype=np.int64), cut_of, 1, nothing)
    with needs_extra("images", "kdcicam"):
        from kdcicam.box_sweep import sweep_contours
    gray = _gray(values)
    cuts, cut_of = np.unique((thresholds * int(gray.max())).astype(np.int64), return_inverse=True)
    levels = _levels_of(np.arange(256), cuts).take(gray)
    outer, holes, solid = sweep_contours(levels, len(cuts))
    # The contour of a hole runs over the pixels around it: its box is one pixel larger on each side.
    boxes = np.concatenate([outer.boxes, holes.boxes + np.array([-1, -1, 1, 1], dtype=np.int32)])
    last = np.array([values.shape[1] - 1, values.shape[0] - 1], dtype=np.int32)
    np.minimum(boxes[:, 2:], last, out=boxes[:, 2:])
    row, tied = _best_of_cuts(solid, solid.net_area, len(cuts))
    largest, found = _boxes_of(solid, row, values.shape)
    largest[found, 2:] = np.minimum(largest[found, 2:], last)
    for one in np.flatnonzero(tied):  # which of equals comes first is OpenCV's to say
        largest[one] = _largest_contour(levels > one)
    cut = np.concatenate([outer.cut, holes.cut])
    return ContoursByThreshold(
        boxes, cut, cut_of, len(cuts), BoxesByThreshold(largest[cut_of], found[cut_of])
    )


def _best_of_cuts(sweep: ComponentSweep, score: Array, cuts: int) -> tuple[Array, Array]:
    """For each cut the row with the greatest score, of equals the first in raster order; are there equals?

    A cut without components has row -1.
    """
    row, tied = np.full(cuts, -1, dtype=np.int64), np.zeros(cuts, dtype=bool)
    if len(score):
        here, starts, counts = np.unique(sweep.cut, return_index=True, return_counts=True)
        best = np.flatnonzero(score == np.repeat(np.maximum.reduceat(score, starts), counts))
        best = best[np.lexsort((sweep.first[best], sweep.cut[best]))]
        _, places, equals = np.unique(sweep.cut[best], return_index=True, return_counts=True)
        row[here], tied[here] = best[places], equals > 1
    return row, tied


def _boxes_of(sweep: ComponentSweep, row: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    boxes = np.tile(np.array([0, 0, shape[1], shape[0]], dtype=np.int64), (len(row), 1))
    found = row >= 0
    boxes[found] = sweep.boxes[row[found]]
    return boxes, found


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
    level = _levels_of(values, first[order])
    sums = np.bincount(level.ravel(), weights=values.ravel(), minlength=len(first) + 1)
    kept_means = np.empty(len(first))
    kept_means[order] = np.cumsum(sums[::-1])[::-1][1:] / values.size
    return np.maximum(first, kept_means)


def _gray(values: Array) -> Array:
    exact = values.astype(np.float64)
    low = exact.min()
    return ((exact - low) / (exact.max() - low) * 255).astype(np.uint8)


def _shows_something(values: Array, mode: Extractor) -> bool:
    """Whether the map is finite and not the same all over; for the official cut, with a maximum above 0."""
    least = max(values.min(), 0) if mode == "official" else values.min()
    return bool(np.isfinite(values).all() and values.max() > least)


def _nothing(values: Array, count: int) -> BoxesByThreshold:
    whole = np.array([0, 0, values.shape[1], values.shape[0]], dtype=np.int64)
    return BoxesByThreshold(np.tile(whole, (count, 1)), np.zeros(count, dtype=bool))


def _levels_of(values: Array, cuts: Array) -> Array:
    """For each value, how many of the ascending `cuts` it is above: strictly, so a value at a cut is not."""
    kind = np.uint8 if len(cuts) < 2**8 else np.uint16
    return np.searchsorted(cuts, values.ravel(), side="left").reshape(values.shape).astype(kind)


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
