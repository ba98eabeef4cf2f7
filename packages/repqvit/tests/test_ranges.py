from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repqvit.ranges import (
    RangeSearch,
    affine_parameters,
    affine_parameters_with_zero,
    fake_quantize,
    fit_affine,
    percentile_ranges,
    symmetric_parameters,
)

PERCENTILES = (0.999, 0.9999, 1.0, 0.75)


@given(st.integers(1, 3000), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_percentiles_of_chunks_are_numpys_percentiles_of_their_concatenation(samples, channels, parts, seed):
    x = torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed))
    low, high = percentile_ranges([c for c in x.chunk(parts) if len(c)], PERCENTILES)
    for i, p in enumerate(PERCENTILES):
        np.testing.assert_allclose(high[i], np.percentile(x.double(), 100 * p, axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            low[i], np.percentile(x.double(), 100 - 100 * p, axis=0), rtol=1e-5, atol=1e-6
        )


def _official_search(column: np.ndarray, bits: int) -> tuple[float, float]:
    """The paper's search for one channel, in float64 numpy: three percentiles, the first of the least
    errors."""
    best = None
    for p in (0.999, 0.9999, 0.99999):
        high, low = np.percentile(column, 100 * p), np.percentile(column, 100 * (1 - p))
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        codes = np.clip(np.round(column / scale) + zero, 0, 2**bits - 1)
        error = np.mean((scale * (codes - zero) - column) ** 2)
        if best is None or error < best[0]:
            best = (error, scale, zero)
    return best[1], best[2]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_vectorized_search_finds_what_a_loop_over_channels_finds(bits, rng):
    spread = torch.tensor([0.01, 1.0, 30.0, 5.0, 0.5])
    x = torch.randn(4000, 5, generator=rng) * spread + torch.tensor([0.0, 2.0, -40.0, 0.0, 0.4])
    x[0] = 50 * spread  # an outlier, so that the percentiles differ
    fitted = fit_affine([x], bits, RangeSearch())
    for j in range(5):
        scale, zero = _official_search(x[:, j].double().numpy(), bits)
        assert fitted.scale[j].item() == pytest.approx(scale, rel=1e-4)
        assert fitted.zero_point[j].item() == zero
        mse = (fake_quantize(x[:, j], fitted.scale[j], fitted.zero_point[j], bits) - x[:, j]).square().mean()
        assert fitted.mse[j].item() == pytest.approx(mse.item(), rel=1e-4)


def test_grid_search_is_no_worse_than_minmax_and_beats_it_with_an_outlier(rng):
    x = torch.randn(5000, 1, generator=rng)
    x[0] = 15
    grid, minmax = (fit_affine([x], 4, RangeSearch(kind)).mse.item() for kind in ("mse", "minmax"))
    assert grid < 0.5 * minmax


def test_minmax_covers_the_extremes(rng):
    x = torch.randn(100, 3, generator=rng)
    fitted = fit_affine([x], 8, RangeSearch("minmax"))
    torch.testing.assert_close(fitted.scale * 255, x.amax(0) - x.amin(0))


@pytest.mark.parametrize("value", [0.0, 3.5, -2.25, 1e-30, -1e6])
def test_a_constant_channel_is_represented_exactly(value):
    x = torch.full((50, 1), value)
    fitted = fit_affine([x], 4, RangeSearch())
    assert torch.isfinite(fitted.scale).all()
    assert (fitted.scale > 0).all()
    torch.testing.assert_close(fake_quantize(x, fitted.scale, fitted.zero_point, 4), x, rtol=1e-6, atol=1e-20)


def test_a_nearly_constant_channel_far_from_zero_does_not_overflow_its_zero_point(rng):
    x = 1 + 1e-8 * torch.randn(50, 1, generator=rng)
    fitted = fit_affine([x], 4, RangeSearch())
    torch.testing.assert_close(fake_quantize(x, fitted.scale, fitted.zero_point, 4), x, rtol=1e-6, atol=0)


def test_range_that_must_hold_zero_has_a_legal_zero_point():
    scale, zero = affine_parameters_with_zero(torch.tensor([2.0, -3.0]), torch.tensor([3.0, -1.0]), 4)
    assert zero.tolist() == [0, 15]
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2]))
    assert affine_parameters(torch.tensor([2.0]), torch.tensor([3.0]), 4)[1].item() == -30


def test_symmetric_parameters_put_zero_in_the_middle():
    scale, zero = symmetric_parameters(torch.tensor([-1.0]), torch.tensor([7.0]), 4)
    assert (scale.item(), zero.item()) == (1.0, 8.0)


def test_percentiles_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"percentiles must lie in \(0.5, 1\]"):
        RangeSearch(percentiles=(99.9,))
