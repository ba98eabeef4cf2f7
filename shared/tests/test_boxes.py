import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from shared_core import InputError, boxes


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    corners = generator.integers(0, 20, (count, 2, 2)).astype(float)
    low, high = corners.min(1), corners.max(1) + 1
    return np.concatenate([low, high], axis=1)


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 5))
def test_iou_is_torchvisions(seed, n, m):
    generator = np.random.default_rng(seed)
    a, b = random_boxes(generator, n), random_boxes(generator, m)
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert boxes.iou(a, b) == pytest.approx(expected)


@given(st.integers(0, 2**32 - 1))
def test_iou_with_inclusive_ends_counts_pixels(seed):
    generator = np.random.default_rng(seed)
    a, b = random_boxes(generator, 1), random_boxes(generator, 1)
    grid = np.zeros((2, 25, 25), dtype=bool)
    for canvas, (x0, y0, x1, y1) in zip(grid, np.concatenate([a, b]).astype(int), strict=True):
        canvas[y0 : y1 + 1, x0 : x1 + 1] = True
    expected = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    assert boxes.iou(a, b, offset=1)[0, 0] == pytest.approx(expected)


def test_empty_boxes_overlap_nothing():
    assert boxes.iou(np.zeros((1, 4)), np.zeros((1, 4)))[0, 0] == 0


def test_widths_and_heights_become_right_and_bottom():
    made = random_boxes(np.random.default_rng(0), 6)
    sides = np.stack([made[:, 0], made[:, 1], made[:, 2] - made[:, 0], made[:, 3] - made[:, 1]], 1)
    assert boxes.xywh_to_xyxy(sides).tolist() == made.tolist()


def test_wrong_shapes_are_said():
    with pytest.raises(InputError, match=r"a: expected boxes of shape \[n, 4\] \(got \(4,\)\)"):
        boxes.iou(np.zeros(4), np.zeros((1, 4)))
