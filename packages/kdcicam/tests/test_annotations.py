"""Boxes that people drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kdcicam.annotations import check_boxes, iou
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


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    corners = generator.integers(0, 20, (count, 2, 2)).astype(float)
    low, high = corners.min(1), corners.max(1) + 1
    return np.concatenate([low, high], axis=1)


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 5))
def test_iou_is_torchvisions(seed, n, m):
    generator = np.random.default_rng(seed)
    a, b = random_boxes(generator, n), random_boxes(generator, m)
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert iou(a, b) == pytest.approx(expected)


@given(st.integers(0, 2**32 - 1))
def test_iou_with_inclusive_ends_counts_pixels(seed):
    generator = np.random.default_rng(seed)
    a, b = random_boxes(generator, 1), random_boxes(generator, 1)
    grid = np.zeros((2, 25, 25), dtype=bool)
    for canvas, (x0, y0, x1, y1) in zip(grid, np.concatenate([a, b]).astype(int), strict=True):
        canvas[y0 : y1 + 1, x0 : x1 + 1] = True
    expected = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    assert iou(a, b, offset=1)[0, 0] == pytest.approx(expected)


def test_empty_boxes_overlap_nothing():
    assert iou(np.zeros((1, 4)), np.zeros((1, 4)))[0, 0] == 0


def test_overlap_of_what_is_no_box_is_refused():
    with pytest.raises(InputError, match=r"a: expected boxes of shape \[n, 4\] \(got \(4,\)\)"):
        iou(np.zeros(4), np.zeros((1, 4)))
