"""The region grid: squares over tissue at scan magnification, and the deep patches that each of them owns.

The grid starts at each outline's bounding box, not at the slide's corner. Positions are top-left corners in
level-0 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Int64

from rlogist.tissue import Contour, Outline


@dataclass(frozen=True)
class Regions:
    """The N regions of a slide.

    Attributes:
        xy: Top-left corners, level-0 pixels.
        contour: Which piece of tissue a region lies in.
        footprint: Side of a region, level-0 pixels.
        side: A region holds `side` x `side` deep patches.
    """

    xy: Int64[np.ndarray, "regions 2"]
    contour: Int64[np.ndarray, " regions"]
    footprint: int
    side: int

    def __len__(self) -> int:
        return len(self.xy)

    def deep_xy(self, region: int) -> Int64[np.ndarray, "patches 2"]:
        """Corners of a region's K deep patches, row by row: (x + i*step, y + j*step), i running first."""
        step = self.footprint // self.side
        i, j = np.meshgrid(np.arange(self.side), np.arange(self.side))
        return self.xy[region] + np.stack([i.ravel(), j.ravel()], axis=1).astype(np.int64) * step

    def boxes(self) -> Int64[np.ndarray, "regions 4"]:
        """Left, top, right, bottom of each region, level-0 pixels."""
        return np.concatenate([self.xy, self.xy + self.footprint], axis=1)


def region_grid(contours: Sequence[Contour], footprint: int, side: int) -> Regions:
    """Lay a grid over each contour and keep the squares that pass the four-point test.

    A square stays where any of four points, its centre plus or minus a quarter of its side in x and y, lies
    in the outline or on it, and its centre lies in no hole (CLAM's `four_pt`).

    Args:
        contours: Pieces of tissue, level-0 pixels.
        footprint: Side of a region and step of the grid, level-0 pixels.
        side: Deep patches along a region's side.
    """
    corners, owners = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    for index, contour in enumerate(contours):
        left, top, right, bottom = contour.bounds()
        x = np.arange(round(left), round(right) + 1, footprint)
        y = np.arange(round(top), round(bottom) + 1, footprint)
        grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.int64)
        grid = grid[_four_points(grid, contour, footprint)]
        corners.append(grid)
        owners.append(np.full(len(grid), index, np.int64))
    return Regions(np.concatenate(corners), np.concatenate(owners), footprint, side)


def _four_points(
    grid: Int64[np.ndarray, "squares 2"], contour: Contour, footprint: int
) -> Bool[np.ndarray, " squares"]:
    centres, quarter = grid + footprint / 2, footprint / 4
    kept = np.zeros(len(grid), bool)
    for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        rest = np.flatnonzero(~kept)
        kept[rest] = _distance_sign(contour.outline, centres[rest] + (dx * quarter, dy * quarter)) >= 0
    for hole in contour.holes:
        rest = np.flatnonzero(kept)
        kept[rest] = _distance_sign(hole, centres[rest]) <= 0
    return kept


def _distance_sign(outline: Outline, points: np.ndarray) -> np.ndarray:
    """1 inside, 0 on the outline, -1 outside."""
    polygon = outline.astype(np.float32).reshape(-1, 1, 2)
    return np.array([cv2.pointPolygonTest(polygon, (float(x), float(y)), False) for x, y in points])
