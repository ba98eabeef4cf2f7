"""Pictures of a slide with what was found drawn on it: tissue outlines, values of regions as a heat map."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from rlogist.grid import Regions
from rlogist.tissue import Contour

Picture = UInt8[np.ndarray, "_ _ 3"]

TISSUE, HOLE = (0, 114, 178), (213, 94, 0)  # blue and vermilion, told apart by colour-blind readers


def draw_outlines(picture: Picture, contours: Sequence[Contour], downsample: float) -> Picture:
    """A copy of a reduced picture with tissue outlined in blue and holes in vermilion.

    Args:
        picture: The reduced slide, RGB.
        contours: Outlines in level-0 pixels.
        downsample: Level-0 pixels for one of the picture's.
    """
    drawn = picture.copy()
    width = max(1, round(max(picture.shape) / 500))
    for contour in contours:
        for outline, colour in [(contour.outline, TISSUE), *((hole, HOLE) for hole in contour.holes)]:
            points = np.round(outline / downsample).astype(np.int32)
            cv2.polylines(drawn, [points], isClosed=True, color=colour, thickness=width)
    return drawn


def draw_heat(
    picture: Picture,
    regions: Regions,
    values: Float[np.ndarray, " regions"],
    downsample: float,
    opacity: float = 0.55,
) -> Picture:
    """A copy of a reduced picture with each region tinted by its value, dark violet (0) to yellow (1).

    Args:
        picture: The reduced slide, RGB.
        regions: The grid.
        values: One a region, from 0 to 1; regions with NaN are left as they are.
        downsample: Level-0 pixels for one of the picture's.
        opacity: Of the tint, 0 to 1.
    """
    drawn = picture.copy()
    steps = np.round(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)
    colours = cv2.applyColorMap(steps[:, None], cv2.COLORMAP_INFERNO).reshape(-1, 3)[:, ::-1]
    for box, value, colour in zip(regions.boxes() / downsample, values, colours, strict=True):
        if np.isnan(value):
            continue
        left, top, right, bottom = np.round(box).astype(int)
        part = drawn[max(top, 0) : bottom, max(left, 0) : right]
        part[:] = np.round((1 - opacity) * part + opacity * colour).astype(np.uint8)
    return drawn
