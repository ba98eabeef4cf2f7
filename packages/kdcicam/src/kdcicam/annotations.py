"""Boxes that people drew: known to be boxes of their image, and moved along with it."""

from __future__ import annotations

import numpy as np

from shared_core import InputError
from shared_core.boxes import four_columns

Array = np.ndarray
Number = float | int


def check_boxes(boxes: Array, width: Number, height: Number, *, name: str = "", slack: Number = 1) -> Array:
    """Return boxes as float64 [n, 4] once each is known to be one inside its image.

    Args:
        boxes: Boxes xyxy.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        name: What the boxes belong to, for the error: a file or an image's id.
        slack: Pixels that a box may stand over the image's edge: annotations count from 0 or from 1.

    Raises:
        InputError: A box is empty or inverted (the error says so where xywh would explain it), not finite, or
            reaches outside the image.
    """
    boxes = four_columns(boxes, "boxes")
    where = {"file": name} if name else {}
    for row in boxes:
        if not np.isfinite(row).all():
            raise InputError("expected finite numbers", **where, field="box", value=row.tolist())
        x0, y0, x1, y1 = row
        if x1 <= x0 or y1 <= y0:
            fits = x1 > 0 and y1 > 0 and x0 + x1 <= width + slack and y0 + y1 <= height + slack
            hint = "; it looks like x, y, width, height: use xywh_to_xyxy" if fits else ""
            raise InputError(f"expected x0 < x1 and y0 < y1{hint}", **where, field="box", value=row.tolist())
        if x0 < -slack or y0 < -slack or x1 > width + slack or y1 > height + slack:
            raise InputError(
                f"reaches outside the image of {width:g}x{height:g}",
                **where,
                field="box",
                value=row.tolist(),
            )
    return boxes


def scale_boxes(boxes: Array, old: tuple[Number, Number], new: tuple[Number, Number]) -> Array:
    """Boxes of an image that was resized from `old` to `new`, both (width, height).

    >>> scale_boxes(np.array([[1, 2, 3, 4]]), (10, 10), (20, 5)).tolist()
    [[2.0, 1.0, 6.0, 2.0]]
    """
    x, y = new[0] / old[0], new[1] / old[1]
    return four_columns(boxes, "boxes") * np.array([x, y, x, y])
