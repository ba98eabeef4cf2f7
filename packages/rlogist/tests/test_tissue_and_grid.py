from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from rlogist.grid import region_grid
from rlogist.tissue import UNIT, Contour, Segmentation, segment, tissue_mask
from shared_core import InputError

LARGE = 10**12  # level-0 pixels of a slide on which the filters act as they stand
STAIN = (180, 60, 150)


def picture(*boxes, size=400, holes=()):
    image = np.full((size, size, 3), 255, np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = STAIN
    for left, top, right, bottom in holes:
        image[top:bottom, left:right] = 255
    return image


def test_an_outline_is_in_level_0_pixels():
    tissue = segment(picture((100, 50, 300, 250)), 64.0, Segmentation(), LARGE)
    (contour,) = tissue.contours
    assert contour.bounds() == pytest.approx((100 * 64, 50 * 64, 300 * 64, 250 * 64), abs=4 * 64)
    assert tissue.area() == pytest.approx(200 * 200 * 64**2, rel=0.03)


def test_pieces_and_holes_below_their_areas_are_dropped():
    # at 1/64 one unit of 512 x 512 level-0 pixels is 8 x 8 pixels: 100 units are 80 x 80, 16 are 32 x 32
    image = picture(
        (10, 10, 200, 200),
        (220, 10, 290, 80),
        (220, 120, 310, 210),
        holes=[(30, 30, 70, 70), (100, 100, 120, 120)],
    )
    tissue = segment(image, 64.0, Segmentation(), LARGE)
    assert len(tissue.contours) == 2
    assert sorted(len(contour.holes) for contour in tissue.contours) == [0, 1]


def test_at_most_so_many_holes_are_kept_and_the_largest_ones():
    holes = [(20 + 45 * i, 20 + 45 * j, 54 + 45 * i + i, 54 + 45 * j) for i in range(8) for j in range(2)]
    tissue = segment(picture((5, 5, 395, 395), holes=holes), 64.0, Segmentation(max_holes=3), LARGE)
    (contour,) = tissue.contours
    widths = sorted(np.ptp(hole[:, 0]) / 64 for hole in contour.holes)
    assert len(widths) == 3
    assert min(widths) > 38


def test_area_filters_shrink_with_small_slides():
    image = picture((100, 100, 150, 150))  # 39 units; the filter of a slide of 2500 units is 25
    assert not segment(image, 64.0, Segmentation(), LARGE)
    assert segment(image, 64.0, Segmentation(), 400 * 400 * 64**2)


def test_otsu_finds_stain_that_is_paler_than_the_fixed_threshold():
    image = np.full((200, 200, 3), 250, np.uint8)
    image[50:150, 50:150] = (250, 245, 250)  # saturation 5
    assert not tissue_mask(image, Segmentation()).any()
    assert tissue_mask(image, Segmentation(otsu=True))[60:140, 60:140].all()


def test_settings_are_checked():
    with pytest.raises(InputError, match=r"median: expected an odd number of pixels \(got 6\)"):
        Segmentation(median=6)
    with pytest.raises(InputError, match=r"hole_area: expected 0 or more \(got -1\)"):
        Segmentation(hole_area=-1)


def four_points_by_shapely(contour: Contour, footprint: int) -> set[tuple[int, int]]:
    """CLAM's `four_pt`, square by square."""
    outline = shapely.Polygon(contour.outline)
    left, top, right, bottom = (round(v) for v in outline.bounds)
    kept = set()
    for x in range(left, right + 1, footprint):
        for y in range(top, bottom + 1, footprint):
            cx, cy, quarter = x + footprint / 2, y + footprint / 2, footprint / 4
            points = [shapely.Point(cx + a * quarter, cy + b * quarter) for a in (-1, 1) for b in (-1, 1)]
            in_hole = any(shapely.Polygon(hole).contains(shapely.Point(cx, cy)) for hole in contour.holes)
            if any(outline.covers(point) for point in points) and not in_hole:
                kept.add((x, y))
    return kept


@given(seed=st.integers(0, 10_000), footprint=st.sampled_from([64, 100, 256]))
def test_the_grid_is_the_four_point_rule(seed, footprint):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 24))
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    outline = np.round(1000 + ring * rng.uniform(300, 900, (24, 1)))
    hole = np.round(1000 + ring * rng.uniform(50, 250))
    contour = Contour(outline, [hole])
    regions = region_grid([contour], footprint, 4)
    assert {tuple(xy) for xy in regions.xy.tolist()} == four_points_by_shapely(contour, footprint)


def test_a_region_owns_deep_patches_row_by_row():
    square = np.array([(100, 40), (1124, 40), (1124, 552), (100, 552)], float)
    regions = region_grid([Contour(square)], 512, 2)
    assert regions.xy[0].tolist() == [100, 40]  # the outline's corner, not 0, 0
    assert regions.deep_xy(0).tolist() == [[100, 40], [356, 40], [100, 296], [356, 296]]
    assert regions.boxes()[0].tolist() == [100, 40, 612, 552]


def test_each_piece_of_tissue_has_its_own_grid():
    a = np.array([(0, 0), (256, 0), (256, 256), (0, 256)], float)
    regions = region_grid([Contour(a), Contour(a + 1030)], 256, 4)
    assert {tuple(xy) for xy in regions.xy[regions.contour == 1].tolist()} >= {(1030, 1030)}


def test_no_tissue_gives_an_empty_grid():
    assert region_grid([], 256, 4).xy.shape == (0, 2)


def test_one_unit_is_512_pixels_squared():
    assert UNIT == 512 * 512
