"""Boxes that people drew: checked, moved along with their image, and overlapped with others."""

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


def iou(a: Array, b: Array, *, offset: Number = 0) -> Array:
    """Intersection over union of each box of `a` with each of `b`.

    Args:
        a: Boxes xyxy, shape [n, 4].
        b: Boxes xyxy, shape [m, 4].
        offset: Added to each width and height. 0 for boxes with exclusive ends; 1 for the convention of
            PASCAL VOC and of most localization benchmarks, where x1 is the last pixel.

    Returns:
        Shape [n, m], float64; 0 where both boxes are empty.

    >>> iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [0, 0, 2, 2]])).round(3).tolist()
    [[0.333, 1.0]]
    """
    a, b = four_columns(a, "a"), four_columns(b, "b")
    left_top = np.maximum(a[:, None, :2], b[None, :, :2])
    right_bottom = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.clip(right_bottom - left_top + offset, 0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2] + offset, 0, None), axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
