import numpy as np
import pytest

from shared_core import InputError, boxes


def test_widths_and_heights_become_right_and_bottom():
    generator = np.random.default_rng(0)
    low, sides = generator.integers(0, 20, (6, 2)), generator.integers(1, 9, (6, 2))
    found = boxes.xywh_to_xyxy(np.concatenate([low, sides], axis=1))
    assert found.tolist() == np.concatenate([low, low + sides], axis=1).tolist()


def test_wrong_shapes_are_said():
    with pytest.raises(InputError, match=r"boxes: expected boxes of shape \[n, 4\] \(got \(4,\)\)"):
        boxes.xywh_to_xyxy(np.zeros(4))
    with pytest.raises(InputError, match=r"truth: expected boxes of shape \[n, 4\] \(got \(2, 3\)\)"):
        boxes.four_columns(np.zeros((2, 3)), "truth")
