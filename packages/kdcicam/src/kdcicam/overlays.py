"""Pictures of maps over their images, with boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray
FOUND, TRUTH = (255, 255, 255), (0, 158, 115)

# Black to red to yellow to white: brightness grows all the way, so it reads without colours too.
_STOPS = np.array(
    [[0, 0, 0], [150, 20, 10], [240, 120, 10], [255, 225, 80], [255, 255, 230]], dtype=np.float64
)


def overlay(
    image: Image.Image, values: Array, boxes: Sequence[Array], truth: Sequence[Array] = ()
) -> Image.Image:
    """Return the image with a map over it, found boxes in white and true ones in green.

    Args:
        image: RGB.
        values: The map; stretched to the image.
        boxes: xyxy in the image's pixels.
        truth: True boxes, where known.
    """
    low, high = float(values.min()), float(values.max())
    flat = not np.isfinite(values).all() or high <= low
    scaled = np.zeros_like(values, dtype=np.float64) if flat else (values - low) / (high - low)
    grey = Image.fromarray((scaled * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    share = np.asarray(grey, dtype=np.float64) / 255
    places = np.linspace(0, 1, len(_STOPS))
    heat = np.stack([np.interp(share, places, _STOPS[:, channel]) for channel in range(3)], axis=2)
    mixed = 0.55 * np.asarray(image, dtype=np.float64) + 0.45 * heat
    made = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(made)
    width = max(1, round(min(image.size) / 120))
    for colour, group in ((TRUTH, truth), (FOUND, boxes)):
        for x0, y0, x1, y1 in group:
            if x1 > x0 and y1 > y0:
                draw.rectangle(
                    (float(x0), float(y0), float(x1) - 1, float(y1) - 1), outline=colour, width=width
                )
    return made
