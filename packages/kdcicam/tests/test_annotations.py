"""Boxes that people drew."""

from __future__ import annotations

import numpy as np
import pytest

from kdcicam.annotations import check_boxes
from shared_core import InputError


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([30, 40, 10, 12], "looks like x, y, width, height"),
        ([30, 40, 10, 39], r"x0 < x1 and y0 < y1 \(got"),
        ([3, 4, 3, 9], "x0 < x1"),
        ([0, 0, 60, 9], "outside the image of 50x60"),
        ([-5, 0, 6, 9], "outside the image"),
        ([0, 0, float("nan"), 9], "finite"),
    ],
)
def test_a_box_that_is_none_is_named(box, words):
    with pytest.raises(InputError, match=rf"^duck\.jpg: box: .*({words})"):
        check_boxes(np.array([box]), 50, 60, name="duck.jpg")


def test_good_boxes_pass():
    assert check_boxes(np.array([[0, 0, 50, 60]]), 50, 60).tolist() == [[0, 0, 50, 60]]
    assert check_boxes(np.zeros((0, 4)), 5, 5).shape == (0, 4)
