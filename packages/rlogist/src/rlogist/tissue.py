"""Tissue segmentation on a strongly reduced level: outlines of tissue and holes, in level-0 pixels.

The steps and values are CLAM's defaults, as RLogist's released code uses them: saturation, median filter 7,
threshold 8, closing 4, outlines above an area. Areas are in units of a 512 x 512 level-0 square.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from shared_core import InputError

MAX_PIXELS = 10**8
"""A segmentation level larger than this is refused: it would take minutes and gigabytes."""

UNIT = 512**2
LARGE_SLIDE_UNITS = 10_000.0
"""Slides of this many units (2.6e9 pixels) and more get the area filters as they are; on smaller ones they
shrink in proportion, or else a small slide would have no tissue that is large enough. Ours, not CLAM's."""


@dataclass(frozen=True)
class Segmentation:
    """Settings of the segmentation.

    Args:
        downsample: The level nearest to this reduction is segmented.
        median: Side of the median filter in pixels of that level, odd.
        threshold: Saturation (0 to 255) above which a pixel is tissue; not used with `otsu`.
        closing: Side of the square that closes gaps, in pixels of that level; 0 for none.
        otsu: Take Otsu's threshold of this slide in place of the fixed one.
        tissue_area: Smallest outline that is kept, in units of 512 x 512 level-0 pixels, holes subtracted.
        hole_area: Smallest hole that is kept, in the same units.
        max_holes: The largest holes that are kept for one outline.
    """

    downsample: float = 64.0
    median: int = 7
    threshold: int = 8
    closing: int = 4
    otsu: bool = False
    tissue_area: float = 100.0
    hole_area: float = 16.0
    max_holes: int = 8

    def __post_init__(self) -> None:
        if self.median < 1 or self.median % 2 == 0:
            raise InputError("expected an odd number of pixels", field="median", value=self.median)
        if not 0 <= self.threshold <= 255:
            raise InputError("expected 0 to 255", field="threshold", value=self.threshold)
        for name in ("downsample", "closing", "tissue_area", "hole_area", "max_holes"):
            if getattr(self, name) < 0:
                raise InputError("expected 0 or more", field=name, value=getattr(self, name))


Outline = Float[np.ndarray, "_ 2"]


@dataclass(frozen=True)
class Contour:
    """One piece of tissue: its outline and the outlines of its holes, as (x, y) in level-0 pixels."""

    outline: Outline
    holes: list[Outline] = field(default_factory=list)

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge, level-0 pixels."""
        (left, top), (right, bottom) = self.outline.min(0), self.outline.max(0)
        return float(left), float(top), float(right), float(bottom)


@dataclass(frozen=True)
class Tissue:
    """What was found: contours (none where a slide has no tissue), and the reduction it was found at."""

    contours: list[Contour]
    downsample: float

    def __bool__(self) -> bool:
        return bool(self.contours)

    def area(self) -> float:
        """Level-0 pixels of tissue, without holes."""
        return sum(
            _area(contour.outline) - sum(_area(hole) for hole in contour.holes) for contour in self.contours
        )


def segment(
    image: UInt8[np.ndarray, "height width 3"],
    downsample: float,
    settings: Segmentation,
    slide_pixels: int,
) -> Tissue:
    """Outline tissue in a reduced picture of a slide.

    Args:
        image: RGB, transparent pixels painted white before.
        downsample: Level-0 pixels for one pixel of the picture.
        settings: The filters.
        slide_pixels: Width times height of level 0, which sets the area filters of small slides.
    """
    mask = tissue_mask(image, settings)
    found, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return Tissue([], downsample)
    shrink = min(1.0, slide_pixels / UNIT / LARGE_SLIDE_UNITS)
    outlines = [_level0(points, downsample) for points in found]
    links = hierarchy.reshape(-1, 4)  # next, previous, first child, parent
    contours = []
    for index in np.flatnonzero(links[:, 3] == -1):
        holes = [outlines[child] for child in np.flatnonzero(links[:, 3] == index)]
        net = _area(outlines[index]) - sum(_area(hole) for hole in holes)
        if net <= settings.tissue_area * shrink * UNIT or net == 0:
            continue
        holes = sorted(holes, key=_area, reverse=True)[: settings.max_holes]
        kept = [hole for hole in holes if _area(hole) > settings.hole_area * shrink * UNIT]
        contours.append(Contour(outlines[index], kept))
    return Tissue(contours, downsample)


def tissue_mask(
    image: UInt8[np.ndarray, "height width 3"], settings: Segmentation
) -> Bool[np.ndarray, "height width"]:
    """Which pixels are stained: saturation, median filter, threshold, closing."""
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[:, :, 1]
    smooth = cv2.medianBlur(saturation, settings.median)
    kind = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if settings.otsu else 0)
    _, mask = cv2.threshold(smooth, settings.threshold, 255, kind)
    if settings.closing:
        mask = cv2.morphologyEx(
            mask, cv2.MORPH_CLOSE, np.ones((settings.closing, settings.closing), np.uint8)
        )
    return mask > 0


def _level0(points: np.ndarray, downsample: float) -> Outline:
    return points.reshape(-1, 2).astype(np.float64) * downsample


def _area(outline: Outline) -> float:
    x, y = outline.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
