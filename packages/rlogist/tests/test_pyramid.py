from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlogist.pyramid import geometry, levels_of
from shared_core import InputError


def levels(mpp, *factors, size=100_000):
    return levels_of([(size // f, size // f) for f in factors], [size / (size // f) for f in factors], mpp)


def test_camelyon_reads_levels_1_and_3():
    """CAMELYON16: 0.243 microns per pixel, factors of 2 (SASHA's released code reads levels 3 and 1)."""
    found = geometry(levels(0.243, 1, 2, 4, 8, 16, 32), 2.0, 0.5, 256)
    assert (found.deep.level, found.scan.level, found.patches_per_region) == (1, 3, 16)
    assert (found.deep.read, found.scan.read) == (256, 256)
    assert (found.deep.footprint, found.scan.footprint) == (512, 2048)


def test_tcga_at_40x_has_no_level_of_20x_or_5x_and_is_reduced_from_finer_ones():
    found = geometry(levels(0.25, 1, 4, 16, 32), 2.0, 0.5, 256)
    assert (found.deep.level, found.deep.read) == (0, 512)
    assert (found.scan.level, found.scan.read) == (1, 512)
    assert found.scan.footprint == 2048


def test_reported_factors_that_rounding_put_off_are_put_right():
    assert [level.downsample for level in levels_of([(2220, 2967), (555, 741)], [1.0, 4.00202], 0.5)] == [
        1,
        4,
    ]


@given(
    mpp=st.floats(0.1, 0.5),
    patch=st.integers(16, 512),
    side=st.integers(1, 8),
    deep=st.sampled_from([0.5, 0.53, 0.75, 1.0]),
)
def test_a_region_holds_whole_deep_patches(mpp, patch, side, deep):
    found = geometry(levels(mpp, 1, 2, 4, 8, 16, 32, 64, 128), deep * side, deep, patch)
    assert found.scan.footprint == side * found.deep.footprint
    assert found.deep.mpp == pytest.approx(deep, rel=0.06 + 0.5 / patch)
    for plane in (found.deep, found.scan):
        assert plane.read == pytest.approx(plane.footprint / 2**plane.level, abs=1)
        assert plane.read > 0.93 * patch - 1  # never made from a coarser level


def test_resolutions_must_be_whole_multiples():
    with pytest.raises(InputError, match=r"scan_mpp: expected a whole multiple of deep_mpp 0\.5.*got 1\.2"):
        geometry(levels(0.5, 1, 4), 1.2, 0.5, 256)
    with pytest.raises(InputError, match="patch: expected at least 1 pixel"):
        geometry(levels(0.5, 1, 4), 2.0, 0.5, 0)
