"""Boxes of objects in images, and their conventions.

A box is ``x0, y0, x1, y1`` in pixels, x to the right, y down; x1 and y1 are *exclusive* (one past the last
pixel), so that its width is x1 - x0 and a crop is ``image[y0:y1, x0:x1]``.
"""

import numpy as np

from shared_core.errors import InputError

Array = np.ndarray
Number = float | int


def xywh_to_xyxy(boxes: Array) -> Array:
    """Left, top, width, height to left, top, right, bottom.

    >>> xywh_to_xyxy(np.array([[1, 2, 3, 4]])).tolist()
    [[1.0, 2.0, 4.0, 6.0]]
    """
    boxes = four_columns(boxes, "boxes")
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def clip_boxes(boxes: Array, width: Number, height: Number) -> Array:
    """Cut boxes at the image's edges; one that lies outside becomes empty at the edge.

    >>> clip_boxes(np.array([[-2, 1, 9, 3]]), 5, 5).tolist()
    [[0.0, 1.0, 5.0, 3.0]]
    """
    boxes = four_columns(boxes, "boxes")
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))


def four_columns(boxes: Array, name: str) -> Array:
    """Return boxes as float64 [n, 4].

    Args:
        boxes: What shall be boxes.
        name: What they are called in the error.

    Raises:
        InputError: Their shape is another.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError("expected boxes of shape [n, 4]", field=name, value=boxes.shape)
    return boxes
