"""Boxes of objects in images: conventions, checks, overlap, and the boxes of connected components.

A box is ``x0, y0, x1, y1`` in pixels, x to the right, y down; x1 and y1 are *exclusive* (one past the last
pixel), so that its width is x1 - x0 and a crop is ``image[y0:y1, x0:x1]``.
"""

from typing import Literal

import numpy as np

from shared_core.errors import InputError, needs_extra

Array = np.ndarray
Number = float | int


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
    a, b = _four_columns(a, "a"), _four_columns(b, "b")
    left_top = np.maximum(a[:, None, :2], b[None, :, :2])
    right_bottom = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.clip(right_bottom - left_top + offset, 0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2] + offset, 0, None), axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def xywh_to_xyxy(boxes: Array) -> Array:
    """Left, top, width, height to left, top, right, bottom.

    >>> xywh_to_xyxy(np.array([[1, 2, 3, 4]])).tolist()
    [[1.0, 2.0, 4.0, 6.0]]
    """
    boxes = _four_columns(boxes, "boxes")
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


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
    boxes = _four_columns(boxes, "boxes")
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


def clip_boxes(boxes: Array, width: Number, height: Number) -> Array:
    """Cut boxes at the image's edges; one that lies outside becomes empty at the edge.

    >>> clip_boxes(np.array([[-2, 1, 9, 3]]), 5, 5).tolist()
    [[0.0, 1.0, 5.0, 3.0]]
    """
    boxes = _four_columns(boxes, "boxes")
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))


def scale_boxes(boxes: Array, old: tuple[Number, Number], new: tuple[Number, Number]) -> Array:
    """Boxes of an image that was resized from `old` to `new`, both (width, height).

    >>> scale_boxes(np.array([[1, 2, 3, 4]]), (10, 10), (20, 5)).tolist()
    [[2.0, 1.0, 6.0, 2.0]]
    """
    x, y = new[0] / old[0], new[1] / old[1]
    return _four_columns(boxes, "boxes") * np.array([x, y, x, y])


def component_boxes(mask: Array, connectivity: Literal[4, 8] = 4) -> Array:
    """Bounding boxes of a mask's connected components, in the raster order of their first pixels.

    Needs ``pip install 'shared-core[vision]'``.

    Args:
        mask: Booleans (or zero and other numbers), shape [height, width].
        connectivity: 4 joins pixels that share a side; 8 also those that share a corner.

    Returns:
        Integer boxes xyxy with exclusive ends, shape [components, 4].

    >>> component_boxes(np.array([[1, 0, 0], [0, 1, 1]])).tolist()
    [[0, 0, 1, 1], [1, 1, 3, 2]]
    >>> component_boxes(np.array([[1, 0, 0], [0, 1, 1]]), connectivity=8).tolist()
    [[0, 0, 3, 2]]
    """
    if mask.ndim != 2:
        raise InputError("expected a mask of height by width", field="mask", value=mask.shape)
    if connectivity not in (4, 8):
        raise InputError("expected 4 or 8", field="connectivity", value=connectivity)
    with needs_extra("vision"):
        from skimage.measure import label
    labels = np.asarray(label(mask != 0, connectivity=1 if connectivity == 4 else 2), dtype=np.int64)
    count = int(labels.max(initial=0))
    boxes = np.empty((count, 4), dtype=np.int64)
    boxes[:, :2] = mask.size
    boxes[:, 2:] = 0
    rows, columns = np.nonzero(labels)
    numbers = labels[rows, columns] - 1
    np.minimum.at(boxes[:, 0], numbers, columns)
    np.minimum.at(boxes[:, 1], numbers, rows)
    np.maximum.at(boxes[:, 2], numbers, columns + 1)
    np.maximum.at(boxes[:, 3], numbers, rows + 1)
    return boxes


def _four_columns(boxes: Array, name: str) -> Array:
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError("expected boxes of shape [n, 4]", field=name, value=boxes.shape)
    return boxes
