import math

import numpy as np
import pytest

from shared_core import InputError
from smm_dp import seeded_source
from smm_dp.baselines import (
    RoundedMechanism,
    analytic_gaussian_delta,
    analytic_gaussian_sd,
    baseline_guarantee,
    calibrate_baseline,
    conditional_round,
    cpsgd_epsilon,
    discrete_gaussian_rdp,
    gaussian_rdp,
    rounded_l1_bound,
    rounded_norm_bound,
    skellam_rdp,
)
from smm_dp.divergence import renyi_divergence
from smm_dp.skellam import log_pmf

SUM = {"l2_norm": 1.0, "dim": 65536, "participants": 100}


def test_googles_numbers():
    """Toy trap 13: B for γ=64, d=65536, β=e^−½ and τ(8) at V=2000."""
    bound = rounded_norm_bound(64.0, 65536)
    assert round(bound, 4) == 143.7776
    assert round(skellam_rdp(8, bound, rounded_l1_bound(bound, 65536), 2000.0), 6) == 41.371132


@pytest.mark.parametrize("scale", [3.0, 64.0, 1000.0])
def test_skellam_bound_is_corollary_4_1_in_the_vectors_own_units(scale):
    """As its authors' code states it: μ the variance in own units, s the scale, sensitivities unscaled."""
    l2, l1, mu = 1.7, 21.0, 0.6
    for a in (2, 5, 40):
        stated = a * l2**2 / (2 * mu) + min(
            ((2 * a - 1) * scale * l2**2 + 6 * l1) / (4 * scale**3 * mu**2), 3 * l1 / (2 * scale * mu)
        )
        ours = skellam_rdp(a, scale * l2, scale * l1, scale**2 * mu)
        assert ours == pytest.approx(stated, rel=1e-12)
    many = skellam_rdp(np.array([2, 5, 40]), scale * l2, scale * l1, scale**2 * mu)
    assert many[2] == pytest.approx(stated, rel=1e-12)


def test_skellam_formula_takes_the_smaller_of_its_two_terms():
    """By hand: α=8, B=B₁=V=1: 8/2 + min(21/4, 3/2); V=10: 8/20 + min(21/400, 3/20)."""
    assert skellam_rdp(8, 1.0, 1.0, 1.0) == 5.5
    assert skellam_rdp(8, 1.0, 1.0, 10.0) == pytest.approx(0.4 + 0.0525)


@pytest.mark.parametrize(
    ("scale", "skellam"), [(16.0, 26.70), (64.0, 2.055), (256.0, 0.5114), (1024.0, 0.4140)]
)
def test_variance_of_a_sum_at_epsilon_8(scale, skellam):
    for kind in ("skellam", "ddgauss"):
        variance = calibrate_baseline(kind, 8, 1e-5, scale=scale, **SUM) / scale**2
        assert variance == pytest.approx(skellam, rel=1e-3)


@pytest.mark.parametrize(("epsilon", "variance"), [(1, 16.3651), (2, 4.6211), (4, 1.3404), (8, 0.4072)])
def test_central_gaussian_by_the_same_route(epsilon, variance):
    assert round(calibrate_baseline("gaussian", epsilon, 1e-5, scale=1, **SUM), 4) == variance


def test_gaussian_of_the_mnist_setting():
    variance = calibrate_baseline("gaussian", 3, 1e-5, scale=1, l2_norm=1, dim=63610, participants=240,
                                  sampling_rate=0.004, rounds=1000)  # fmt: skip
    assert variance == pytest.approx(0.479, abs=5e-4)


@pytest.mark.parametrize("shift", [1, 3, 10])
@pytest.mark.parametrize("variance", [20.0, 500.0])
def test_skellam_bound_is_above_the_exact_divergence(shift, variance):
    table = log_pmf(variance / 2, 3000)
    z = np.arange(-1200, 1201)
    for order in (2, 4, 16):
        exact = renyi_divergence(table[np.abs(z - shift)], table[np.abs(z)], order)
        assert exact <= skellam_rdp(order, shift, shift, variance) * (1 + 1e-12)


@pytest.mark.parametrize(("shift", "each", "n"), [(1, 0.3, 20), (5, 4.0, 10)])
def test_sum_of_discrete_gaussians_is_within_its_bound(shift, each, n):
    z = np.arange(-60, 61)
    one = np.exp(-(z**2) / (2 * each))
    one /= one.sum()
    law = np.array([1.0])
    for _ in range(n):
        law = np.convolve(law, one)
    law = law[len(law) // 2 - 90 : len(law) // 2 + 91]
    with np.errstate(divide="ignore"):
        log_law = np.log(law)
    exact = renyi_divergence(log_law[shift:], log_law[:-shift], 4)
    assert exact <= discrete_gaussian_rdp(4, shift, shift, each, n, 1) * (1 + 1e-6)


def test_binomial_theorem_is_above_the_exact_delta():
    """Exact hockey-stick divergence of Bin(N, 1/2) moved by one, d = 1."""
    n, delta = 4000, 1e-3
    z = np.arange(n + 1)
    from scipy.stats import binom

    pmf = binom.pmf(z, n, 0.5)
    epsilon = cpsgd_epsilon(n, delta, 1, 1.0, 1.0, 1.0)
    assert math.isfinite(epsilon)
    assert np.maximum(pmf[:-1] - math.exp(epsilon) * pmf[1:], 0).sum() <= delta
    assert cpsgd_epsilon(100, delta, 1, 1.0, 1.0, 1.0) == math.inf


@pytest.mark.parametrize("shift", [(1, 1), (3, 1), (-2, 4)])
@pytest.mark.parametrize(("n", "delta"), [(1600, 1e-3), (1600, 1e-6), (8000, 1e-5)])
def test_binomial_theorem_covers_exact_sums_in_two_dimensions(shift, n, delta):
    from scipy.stats import binom

    log_pmf_ = binom.logpmf(np.arange(n // 2 - 400, n // 2 + 401), n, 0.5)
    moved = [np.roll(log_pmf_, s)[10:-10] for s in shift]
    log_p = np.add.outer(*moved)
    log_q = np.add.outer(log_pmf_[10:-10], log_pmf_[10:-10])
    sizes = np.abs(shift)
    epsilon = cpsgd_epsilon(n, delta, 2, float(np.hypot(*shift)), float(sizes.sum()), float(sizes.max()))
    assert math.isfinite(epsilon)
    for p, q in ((log_p, log_q), (log_q, log_p)):
        assert np.maximum(np.exp(p) - np.exp(epsilon + q), 0).sum() <= delta


def test_cpsgd_needs_more_noise_than_the_others():
    others = calibrate_baseline("skellam", 8, 1e-5, scale=64.0, **SUM)
    assert calibrate_baseline("cpsgd", 8, 1e-5, scale=64.0, **SUM) > 1.5 * others
    assert math.isinf(baseline_guarantee("cpsgd", 10.0, 1e-5, scale=64.0, **SUM).epsilon)
    one = baseline_guarantee("cpsgd", 1e6, 1e-5, scale=64.0, **SUM).epsilon
    many = baseline_guarantee("cpsgd", 1e6, 1e-5, scale=64.0, rounds=50, sampling_rate=0.1, **SUM).epsilon
    assert many != one


def test_analytic_gaussian_is_tight_and_below_the_renyi_route():
    sd = analytic_gaussian_sd(1.0, 1e-5, 1.0)
    assert analytic_gaussian_delta(1.0, 1.0, sd) <= 1e-5
    assert analytic_gaussian_delta(1.0, 1.0, sd * (1 - 1e-6)) > 1e-5
    assert sd == pytest.approx(3.730632, rel=1e-5)
    assert sd**2 < calibrate_baseline("gaussian", 1, 1e-5, scale=1, **SUM)


def test_gaussian_rdp_is_its_formula():
    assert gaussian_rdp(6, 2.0, 3.0) == 6 * 4 / 18


def test_conditional_rounding_keeps_the_bound_and_is_seldom_needed(rng):
    x = rng.standard_normal(4096)
    x *= 16 / np.linalg.norm(x)
    bound = rounded_norm_bound(16.0, 4096)
    draws = [conditional_round(x, bound, seeded_source(seed)) for seed in range(20)]
    assert all(np.dot(y, y) <= bound**2 for y in draws)
    np.testing.assert_allclose(np.mean(draws), x.mean(), atol=0.02)
    with pytest.raises(InputError, match="no rounding out of 5"):
        conditional_round(x, 10.0, seeded_source(0), tries=5)


@pytest.mark.parametrize("kind", ["skellam", "ddgauss", "cpsgd"])
def test_a_baseline_round_trip_has_the_stated_noise(kind, rng):
    dim, n, variance = 4000, 5, 400.0
    m = RoundedMechanism(kind, dim, 1.0, 64.0, 16, variance, n, rotation_seed=3)
    x = rng.standard_normal(dim) / 200
    source = seeded_source(4)
    total = sum(m.encode(x, source).astype(np.int64) for _ in range(n)) % 2**16
    error = (m.decode(total.astype(np.uint32)) - n * x) * 64
    assert error.var() == pytest.approx(variance + n * 0.21, rel=0.12)
    np.testing.assert_allclose(
        m.decode(total.astype(np.uint32), count=n) * n, m.decode(total.astype(np.uint32)), atol=1e-12
    )


def test_bad_baseline_input_is_refused():
    with pytest.raises(InputError, match="scale"):
        RoundedMechanism("skellam", 4, 1.0, 0.0, 8, 1.0, 2)
    m = RoundedMechanism("skellam", 4, 1.0, 1.0, 8, 1.0, 2)
    with pytest.raises(InputError, match="4 finite numbers"):
        m.encode(np.array([1.0, np.nan, 0, 0]), seeded_source(0))
    with pytest.raises(InputError, match="no amount of noise"):
        calibrate_baseline("gaussian", 1e-9, 1e-5, scale=1, **SUM)
