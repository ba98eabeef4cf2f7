"""Box extraction against scipy.ndimage, and against OpenCV's contours traced again for each threshold."""

from __future__ import annotations

import cv2
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kdcicam.box_sweep import compiled, sweep_components
from kdcicam.boxes import boxes_from_map, contour_boxes, official_boxes
from shared_core import InputError

SEEDS = st.integers(0, 2**32 - 1)


def random_map(seed: int, size: int = 40) -> np.ndarray:
    """Smooth or rough, sometimes with plateaus and a dark ground."""
    generator = np.random.default_rng(seed)
    grid = generator.random((int(generator.integers(2, 16)),) * 2).astype(np.float32)
    values = cv2.resize(grid, (size, size - 7), interpolation=cv2.INTER_LINEAR)
    values = np.clip(values - generator.choice([0, 0.4]), 0, None)
    return np.round(values * 6) / 6 if generator.random() < 0.3 else values


def scipy_boxes(mask: np.ndarray, connectivity: int) -> list[tuple[int, ...]]:
    labels, _ = ndimage.label(mask, np.ones((3, 3)) if connectivity == 8 else None)
    return [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]


def area(box: tuple[int, ...]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def literal_official(values: np.ndarray, threshold: float) -> tuple[int, ...]:
    kept = np.where(values > threshold * values.max(), values, 0)
    boxes = scipy_boxes(kept > kept.mean(), 4)
    return max(boxes, key=area)


def literal_contours(values: np.ndarray, threshold: float) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """All boxes and the largest contour's, as the reference evaluation takes them from OpenCV."""
    scaled = (values - values.min()) / (values.max() - values.min())
    gray = (scaled * 255).astype(np.uint8)
    _, binary = cv2.threshold(gray, int(threshold * gray.max()), 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    height, width = values.shape

    def box(contour) -> tuple[int, ...]:
        x, y, w, h = cv2.boundingRect(contour)
        return x, y, min(x + w, width - 1), min(y + h, height - 1)

    return sorted(map(box, contours)), box(max(contours, key=cv2.contourArea))


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.sampled_from([4, 8]))
def test_the_sweep_finds_scipys_components_at_every_cut(seed, height, width, cuts, connectivity):
    levels = np.random.default_rng(seed).integers(0, cuts + 1, (height, width)).astype(np.uint8)
    sweep = sweep_components(levels, cuts, connectivity)
    for cut in range(cuts):
        assert sorted(map(tuple, sweep.at(cut).tolist())) == sorted(scipy_boxes(levels > cut, connectivity))


def test_the_sweep_finds_them_in_maps_of_many_hills():
    levels = np.random.default_rng(0).integers(0, 6, (130, 120)).astype(np.uint8)
    sweep = sweep_components(levels, 5, 4)
    assert len(sweep.cut) > 4096  # more than the rows that the sweep begins with
    for cut in range(5):
        assert sorted(map(tuple, sweep.at(cut).tolist())) == sorted(scipy_boxes(levels > cut, 4))


@given(SEEDS)
def test_net_areas_are_opencvs_where_nothing_has_a_hole(seed):
    levels = (np.random.default_rng(seed).random((9, 9)) < 0.5).astype(np.uint8)
    levels = ndimage.binary_fill_holes(levels).astype(np.uint8)  # 4-connected ground, as OpenCV's holes
    contours = cv2.findContours(levels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]
    sweep = sweep_components(levels, 1, 8)
    assert sorted(sweep.net_area.tolist()) == sorted(map(cv2.contourArea, contours))


@given(SEEDS)
def test_official_boxes_of_all_thresholds_are_those_of_each(seed):
    values, thresholds = random_map(seed), np.arange(0, 0.95, 0.05)
    swept = official_boxes(values, thresholds)
    assert swept.found.all()
    for threshold, box in zip(thresholds, swept.boxes.tolist(), strict=True):
        single = boxes_from_map(values, threshold)
        assert single.found
        assert tuple(box) == single.box == literal_official(values.astype(np.float64), threshold)


@given(SEEDS)
def test_contour_boxes_of_all_thresholds_are_opencvs(seed):
    values, thresholds = random_map(seed), np.arange(0, 1, 0.02)
    swept = contour_boxes(values, thresholds)
    for number, threshold in enumerate(thresholds):
        every, largest = literal_contours(values.astype(np.float64), threshold)
        assert sorted(map(tuple, swept.at(number).tolist())) == every
        assert tuple(swept.largest.boxes[number].tolist()) == largest
        assert boxes_from_map(values, threshold, "contour").box == largest


@pytest.mark.parametrize(
    ("levels", "cuts", "words"),
    [
        (np.zeros(3, np.uint8), 1, "levels: expected whole numbers, height by width"),
        (np.zeros((0, 3), np.uint8), 1, "levels: expected whole numbers"),
        (np.zeros((2, 2)), 1, "levels: expected whole numbers"),
        (np.full((2, 2), 3), 2, "levels: expected 0 to 2"),
        (np.full((2, 2), -1), 2, "levels: expected 0 to 2"),
        (np.zeros((2, 2), int), 2**16, "cuts: expected fewer"),
    ],
)
def test_a_sweep_says_what_it_cannot_take(levels, cuts, words):
    with pytest.raises(InputError, match=words):
        sweep_components(levels, cuts)
    with pytest.raises(InputError, match=r"connectivity: expected 4 or 8 \(got 6\)"):
        sweep_components(np.zeros((2, 2), np.uint8), 1, 6)


def test_contours_of_islands_in_holes_and_of_the_largest_around_them():
    values = np.zeros((33, 40))
    for ring, height in enumerate((1.0, 0.2, 0.8, 0.1, 0.9)):  # lakes on islands in lakes
        values[3 + 3 * ring : 30 - 3 * ring, 3 + 3 * ring : 37 - 3 * ring] = height
    values[8:12, 20:24] = 0.5
    thresholds = np.arange(0, 1, 0.05)
    swept = contour_boxes(values, thresholds)
    counts = set()
    for number, threshold in enumerate(thresholds):
        every, largest = literal_contours(values, threshold)
        assert sorted(map(tuple, swept.at(number).tolist())) == every
        assert tuple(swept.largest.boxes[number].tolist()) == largest
        counts.add(len(every))
    assert max(counts) >= 5


def test_rough_maps_have_opencvs_contours():
    values = np.random.default_rng(1).random((60, 70))
    thresholds = np.array([0.2, 0.4, 0.6, 0.9])
    swept = contour_boxes(values, thresholds)
    for number, threshold in enumerate(thresholds):
        every, largest = literal_contours(values, threshold)
        assert len(every) > 50
        assert sorted(map(tuple, swept.at(number).tolist())) == every
        assert tuple(swept.largest.boxes[number].tolist()) == largest


def test_a_sweep_that_can_be_kept_in_no_folder_is_compiled_all_the_same(monkeypatch):
    njit = numba.njit

    def nowhere(*, nogil, cache=False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(nogil=nogil)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert compiled(lambda number: number + 1)(1) == 2


def two_blobs() -> np.ndarray:
    """A wide thin frame of few pixels, and a full square of more pixels whose bounding box is smaller."""
    values = np.zeros((20, 30))
    values[2:14, 2] = values[13, 2:14] = 1.0  # an L: 23 pixels in a box of 12x12
    values[2:10, 18:26] = 1.0  # 64 pixels in a box of 8x8
    return values


def test_official_takes_the_largest_bounding_box_and_not_the_most_pixels():
    assert boxes_from_map(two_blobs(), 0.1).box == (2, 2, 14, 14)
    assert boxes_from_map(two_blobs(), 0.1, "contour").box == (18, 2, 26, 10)


def test_official_is_4_connected_and_contour_8_connected():
    values = np.zeros((12, 12))
    values[1:5, 1:5] = values[5:8, 5:8] = 1.0
    assert boxes_from_map(values, 0.1).box == (1, 1, 5, 5)
    assert boxes_from_map(values, 0.1, "contour").box == (1, 1, 8, 8)


def test_official_has_a_second_threshold_at_the_mean_of_what_is_kept():
    values = np.full((10, 10), 0.2)
    values[3:6, 4:8] = 1.0  # the mean is 0.296: the ground is above 0.1 * max, and below the mean
    assert boxes_from_map(values, 0.1).box == (4, 3, 8, 6)
    above = np.argwhere(values > 0.1)
    assert above.min() == 0  # one threshold alone would give the whole image
    assert above.max() == 9


@pytest.mark.parametrize("mode", ["official", "contour"])
@pytest.mark.parametrize("value", [0.0, 3.0, -1.0, np.nan, np.inf])
def test_a_map_that_shows_nothing_gives_the_whole_image_and_says_so(mode, value):
    values = np.full((5, 8), value)
    assert boxes_from_map(values, 0.2, mode) == boxes_from_map(values, 0.5, mode)
    assert boxes_from_map(values, 0.2, mode).box == (0, 0, 8, 5)
    assert not boxes_from_map(values, 0.2, mode).found
    thresholds = np.array([0.1, 0.5])
    swept = (
        official_boxes(values, thresholds)
        if mode == "official"
        else contour_boxes(values, thresholds).largest
    )
    assert swept.boxes.tolist() == [[0, 0, 8, 5]] * 2
    assert not swept.found.any()


def test_a_contour_is_found_in_a_map_without_positive_values_and_an_official_box_is_not():
    values = np.where(two_blobs() > 0, -0.1, -1.0)
    assert boxes_from_map(values, 0.1, "contour") == boxes_from_map(two_blobs(), 0.1, "contour")
    assert contour_boxes(values, np.array([0.1])).largest.found.all()
    assert not boxes_from_map(values, 0.1).found
    assert not official_boxes(values, np.array([0.1])).found.any()


def test_one_pixel_that_is_not_finite_spoils_the_map():
    values = two_blobs()
    values[0, 0] = np.nan
    assert not boxes_from_map(values, 0.1).found


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(InputError, match="threshold: expected shares of the maximum, 0 to below 1"):
        boxes_from_map(two_blobs(), threshold)
