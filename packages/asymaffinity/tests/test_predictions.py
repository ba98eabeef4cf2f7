"""Pictures of predictions."""

import numpy as np

from asymaffinity.predictions import overlay


def test_a_box_narrower_than_a_pixel_is_drawn_and_one_without_area_is_not():
    blank = np.zeros((20, 20, 3), dtype=np.uint8)
    mask = np.zeros((20, 20), dtype=bool)
    thin = np.asarray(overlay(blank, [mask], [(5.0, 2.0, 5.4, 12.0)]))
    assert thin[4, 5].any()
    assert not thin[:, 8:].any()
    assert not np.asarray(overlay(blank, [mask], [(5.0, 2.0, 5.0, 12.0)])).any()
