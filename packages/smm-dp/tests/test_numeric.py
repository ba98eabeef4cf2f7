"""Every lemma of docs/numeric-accounting.md, by exact sums over wide random settings."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared_core import InputError
from smm_dp.divergence import exact_delta, exact_epsilon, exact_rdp, log_mixture, renyi_divergence
from smm_dp.numeric import _grid, _MixtureSums, _rate_between, certified_rates
from smm_dp.skellam import log_pmf, pmf_ratios

mus = st.floats(math.log(0.3), math.log(5000)).map(math.exp)
orders = st.integers(2, 24)
TIGHT = 1 + 1e-9


@given(mus)
def test_lemma_1_the_skellam_law_is_log_concave(mu):
    ratios = pmf_ratios(mu, 200)
    assert (np.diff(ratios) < 0).all()
    assert (ratios < 1).all()


@given(mus, st.floats(1e-4, 8), st.floats(1e-4, 8), orders)
def test_lemma_2_the_divergence_grows_with_the_coordinate(mu, x, y, order):
    low, high = sorted((x, y))
    for small, large in zip(exact_rdp(low, mu, order), exact_rdp(high, mu, order), strict=True):
        assert small <= large * (1 + 1e-9) + 1e-13


@given(mus, st.floats(1e-4, 8))
def test_lemma_2_the_likelihood_ratio_is_monotone(mu, x):
    log_p, log_q = log_mixture(x, mu)
    core = log_q > -500
    assert (np.diff((log_p - log_q)[core]) > -1e-9).all()


@given(mus, st.integers(0, 6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), orders)
def test_lemma_3_moments_are_convex_between_integers(mu, k, a, b, share, order):
    low, high = sorted((a, b))
    middle = low + share * (high - low)

    def moments(p):
        log_p, log_q = log_mixture(k + p, mu, margin=60 + 4 * order)
        return [
            math.exp((order - 1) * renyi_divergence(*pair, order))
            for pair in ((log_p, log_q), (log_q, log_p))
        ]

    with np.errstate(over="ignore"):
        try:
            ends, inner = list(zip(moments(low), moments(high), strict=True)), moments(middle)
        except OverflowError:
            return
    for (left, right), value in zip(ends, inner, strict=True):
        assert value <= (left + share * (right - left)) * TIGHT + 1e-12


@given(
    st.floats(1e-3, 4),
    st.floats(1.001, 3),
    st.floats(1e-6, 10),
    st.floats(1, 20),
    st.floats(0, 1),
    st.integers(2, 12),
)
@example(left=1.0, ratio=1.5, low=1e-3, growth=2.25, share=0.4, order=2)
def test_a_cell_covers_every_convex_moment_through_its_ends(left, ratio, low, growth, share, order):
    """Lemma 3: the largest convex function through two grid values is their chord."""
    right, high = left * ratio, low * growth
    values = np.array([[low], [high]]) * np.ones(order - 1)
    bound = _rate_between(np.array([left, right]), values)[-1]
    x = left + share * (right - left)
    chord = low + share * (high - low)
    assert math.log1p(chord) / ((order - 1) * x * x) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("mu", [0.5, 5.0, 20.0])
def test_lemma_4_below_the_first_grid_point_the_rate_of_order_2_rises_to_its_limit(mu):
    """D_2(x) = log(1 + χ²x²): the rate is largest at zero, which no grid point reaches."""
    bound = 0.019 * math.sqrt(2 * mu) / 128
    assert len(_grid(mu, bound, 2)) == 1
    with mpmath.workdps(40):
        mass = [mpmath.besseli(z, 2 * mpmath.mpf(mu)) * mpmath.exp(-2 * mu) for z in range(200)]
        total = mpmath.fsum(mass[abs(z - 1)] ** 2 / mass[abs(z)] for z in range(-198, 200))
        limit = float(total - 1)
    rates = certified_rates(mu, bound, 2)
    assert limit <= rates.forward[0] <= limit * (1 + 1e-6)


@given(mus, st.floats(1e-3, 1), st.floats(1e-6, 1), orders)
def test_lemma_4_the_rate_near_zero(mu, top, share, order):
    """The bound at `top` covers every smaller coordinate."""
    forward, reverse = _MixtureSums(mu, 1.0, order)._near_zero(top)
    x = max(top * share, 1e-4)
    for exact, bound in zip(exact_rdp(x, mu, order), (forward[-1], reverse[-1]), strict=True):
        assert exact <= bound * x * x * TIGHT + 1e-13


@given(mus, st.floats(1e-3, 6), orders)
def test_lemma_5_the_recursion_gives_the_moments(mu, x, order):
    sums = _MixtureSums(mu, max(x, 1.0), order)
    forward, reverse, _, _ = sums.moments(np.array([min(1e-3, x), x]) if x > 1e-3 else np.array([x]))
    exact = exact_rdp(x, mu, order)
    for moment, value in zip((forward[-1, -1], reverse[-1, -1]), exact, strict=True):
        if math.isfinite(moment) and value * (order - 1) < 500:
            assert math.log1p(moment) / (order - 1) == pytest.approx(value, rel=1e-6, abs=1e-12)
            assert math.log1p(moment) / (order - 1) >= value * (1 - 1e-9) - 1e-12


@given(st.floats(0.3, 2000), st.integers(1, 300))
def test_lemma_6_turan_bound_of_the_ratios(mu, z):
    ratios = pmf_ratios(mu, 302)
    inner = z + 1
    assert ratios[z - 1] / ratios[z] <= (1 + 1e-12) / (1 - 2 / (inner + math.sqrt(4 * mu**2 + inner**2)))


@given(mus, st.floats(0.5, 6), st.integers(4, 16))
@settings(max_examples=25)
def test_lemma_6_a_longer_range_of_sums_stays_below_the_bound_of_the_tails(mu, bound, order):
    """What lies beyond the range, summed to 300 nepers below, is less than the bound of the tails."""
    sums = _MixtureSums(mu, bound, order)
    tail = sums._tail(bound, *sums._ratio(bound))
    far = sums.radius + 1 + np.arange(min(400, len(sums.table) - sums.radius - 10))
    k = math.ceil(bound) - 1
    p = bound - k
    ratio = (1 - p) * np.exp(sums.table[np.abs(far - k)] - sums.table[far]) + p * np.exp(
        sums.table[np.abs(far - k - 1)] - sums.table[far]
    )
    for index, a in enumerate(sums.orders):
        if math.isfinite(tail[index]):
            outside = np.exp(np.minimum(sums.table[far] + a * np.log(ratio), 700)).sum()
            assert outside <= tail[index] * TIGHT


def cut(sums, radius):
    """Shorten the range of the sums, so that the bound of the tails has to carry them."""
    sums.radius, sums.z = radius, np.arange(-radius - 1, radius + 2)
    sums.weight = np.exp(sums.table[np.abs(sums.z)])


@pytest.mark.parametrize(
    ("mu", "x", "order"),
    [(2000.0, 0.5, 4), (20.0, 2.5, 8), (3.0, 1.0, 3), (2000.0, 250.0, 2), (2000.0, 300.0, 3)],
)
def test_lemma_6_a_short_sum_and_the_bound_of_its_tails_are_no_less_than_the_whole_sum(mu, x, order):
    """Where terms still grow at the end of the sum, as for a large x, the bound is infinite."""
    log_p, log_q = log_mixture(x, mu, 300 + 4 * order * x)
    exact = [
        math.expm1((order - 1) * renyi_divergence(*pair, order)) for pair in ((log_p, log_q), (log_q, log_p))
    ]
    whole = _MixtureSums(mu, max(x, 1.0), order)
    share = []
    for radius in np.linspace(math.ceil(x) + 1, whole.radius, 40).astype(int).tolist():
        sums = _MixtureSums(mu, max(x, 1.0), order)
        cut(sums, radius)
        ratio, u = (law[None, 1:-1] for law in sums._ratio(x))
        bounds = sums.moments(np.array([x]))[:2]
        for bound, short, value in zip(bounds, sums._powers(ratio, u), exact, strict=True):
            assert bound[0, -1] >= value * (1 - 1e-9)
            share.append(short[0, -1] / value)
    assert min(share) < 0.6  # the shortest sums lack much
    assert all(bound[0, -1] <= value * (1 + 1e-9) for bound, value in zip(bounds, exact, strict=True))


@given(mus, st.floats(0.05, 8), st.integers(0, 2**32), orders)
@example(mu=1428.0, bound=4.0, seed=0, order=5)
@example(mu=0.3, bound=0.05, seed=1, order=2)
def test_certified_rate_is_above_the_exact_one_on_a_finer_random_grid(mu, bound, seed, order):
    """Toy trap 17."""
    rates = certified_rates(mu, bound, order)
    generator = np.random.default_rng(seed)
    points = np.concatenate(
        (bound * generator.uniform(0, 1, 12) ** 3, np.arange(1, math.floor(bound) + 1), [bound])
    )
    for x in points[points > 1e-4]:
        forward, reverse = exact_rdp(float(x), mu, order)
        assert forward <= rates.forward[-1] * x * x * TIGHT + 1e-13
        assert reverse <= rates.reverse[-1] * x * x * TIGHT + 1e-13


def test_grid_maximum_without_the_cells_would_not_be_a_bound():
    """Between 0.01 and 1 the rate rises by a fifth and falls again; only the cover of the cells sees it."""
    mu, order = 1.0, 8
    coarse = max(exact_rdp(x, mu, order)[0] / x**2 for x in (0.01, 1.0))
    peak = exact_rdp(0.3, mu, order)[0] / 0.3**2
    assert peak > 1.2 * coarse
    assert certified_rates(mu, 1.0, order).forward[-1] >= peak


@pytest.mark.parametrize(("mu", "bound"), [(10.0, 1.0), (200.0, 4.0), (1428.0, 5.0)])
def test_certified_rate_costs_less_than_half_a_per_cent(mu, bound):
    rates = certified_rates(mu, bound, 12)
    points = np.concatenate((np.geomspace(2e-3, bound, 60), np.arange(1, bound + 1)))
    for order in (2, 5, 8, 12):
        exact = max(max(exact_rdp(float(x), mu, order)) / x**2 for x in points)
        best = max(rates.forward[order - 2], rates.reverse[order - 2])
        assert exact * (1 - 1e-9) <= best <= exact * 1.005


def test_penalty_over_gaussian_noise_is_as_small_as_the_method_says():
    """K·4μ/α is 1.02 to 1.14 at μ=10, at most 1.007 at μ=200 (and half a per cent for the cover)."""
    ten = certified_rates(10.0, 4.0, 12).forward * 40 / np.arange(2, 13)
    assert ten.min() > 1.02
    assert ten.max() < 1.14 * 1.005
    assert (certified_rates(200.0, 4.0, 12).forward * 800 / np.arange(2, 13)).max() < 1.007 * 1.005


def test_sums_agree_with_fifty_digits():
    """Float64 is enough: divergences against mpmath."""
    with mpmath.workdps(50):
        for mu, x, order in ((5.0, 0.01, 5), (60.0, 0.002, 20), (20.0, 2.6, 8)):
            k = math.floor(x)
            p = mpmath.mpf(x) - k
            s = lambda z, mu=mu: mpmath.exp(-2 * mu) * mpmath.besseli(abs(z), 2 * mpmath.mpf(mu))  # noqa: E731
            total = mpmath.fsum(
                ((1 - p) * s(z - k) + p * s(z - k - 1)) ** order * s(z) ** (1 - order)
                for z in range(-180, 181)
            )
            exact = float(mpmath.log(total) / (order - 1))
            grid = np.array([x])
            moment = _MixtureSums(mu, max(1.0, x), order).moments(grid)[0][0, -1]
            assert math.log1p(moment) / (order - 1) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_at_integers_the_sums_are_the_divergence_of_the_shifted_law(shift):
    """Toy trap 17: no rounding there, so the mixture is Sk(mu) moved by an integer."""
    mu, order = 30.0, 6
    table, z = log_pmf(mu, 400), np.arange(-300, 301)
    shifted = renyi_divergence(table[np.abs(z - shift)], table[np.abs(z)], order)
    sums = _MixtureSums(mu, float(shift), order)
    for moment in (
        each[0, -1] for each in sums.moments(np.array([float(shift)]))[:2]
    ):  # the law is symmetric
        assert math.log1p(moment) / (order - 1) == pytest.approx(shifted, rel=1e-10)


def test_one_order_too_high_to_certify_is_infinite_not_small():
    rates = certified_rates(0.5, 8.0, 128)
    assert np.isinf(rates.forward[-1])
    assert np.isfinite(rates.forward[0])


@pytest.mark.parametrize(
    ("mu", "bound", "order"),
    [(0.5, 50.0, 16), (0.5, 8.0, 128), (0.5, 200.0, 8), (20.0, 500.0, 8), (1e-9, 50.0, 64)],
)
def test_a_rate_that_cannot_be_certified_is_infinite_without_a_warning(mu, bound, order):
    """Warnings are errors here. Where an order is infinite, so is every higher one."""
    rates = certified_rates(mu, bound, order)
    for rate in (rates.forward, rates.reverse):
        assert np.isinf(rate[-1])
        assert not np.isnan(rate).any()
        assert (np.diff(np.isinf(rate).astype(int)) >= 0).all()


@pytest.mark.parametrize("mu", [0.0, 0.9e-9, 1.1e8, math.inf, math.nan])
def test_a_noise_beyond_the_reach_of_the_sums_is_refused(mu):
    with pytest.raises(InputError, match=r"mu: .*Skellam parameters in 1e-09\.\.1e\+08"):
        certified_rates(mu, 1.0, 4)


@pytest.mark.parametrize("bound", [0.0, 0.9e-6, math.inf, math.nan])
def test_a_coordinate_bound_beyond_the_reach_of_the_sums_is_refused(bound):
    with pytest.raises(InputError, match=r"coordinate_bound: .*at least 1e-06"):
        certified_rates(1.0, bound, 4)


def test_grid_covers_zero_to_the_bound_and_every_integer():
    grid = _grid(50.0, 3.7, 20)
    assert grid[-1] == 3.7
    assert set(np.arange(1.0, 4.0)) <= set(grid)
    assert (np.diff(grid) > 0).all()


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="order of at least 2"):
        certified_rates(1.0, 1.0, 1)
    with pytest.raises(InputError, match="coordinate_bound"):
        certified_rates(1.0, 0.0, 4)
    with pytest.raises(InputError, match="mu"):
        certified_rates(-1.0, 1.0, 4)


@pytest.mark.parametrize(("x", "mu"), [(1.0, 3.0), (0.4, 1.5), (2.6, 20.0)])
def test_exact_epsilon_agrees_with_dp_accountings_loss_distribution(x, mu):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    log_p, log_q = log_mixture(x, mu, 45)
    p = {int(z): float(v) for z, v in enumerate(log_p)}
    q = {int(z): float(v) for z, v in enumerate(log_q)}
    peers = [
        pld.from_two_probability_mass_functions(*pair, value_discretization_interval=1e-5)
        for pair in ((p, q), (q, p))
    ]
    for delta in (1e-3, 1e-6):
        ours = exact_epsilon(x, mu, delta)
        peer = max(each.get_epsilon_for_delta(delta) for each in peers)
        assert ours <= peer * (1 + 1e-6)
        assert peer <= ours * 1.001 + 2e-5
        assert exact_delta(x, mu, ours) <= delta


@given(st.floats(0.5, 300), st.floats(0.05, 4))
@settings(max_examples=20)
def test_epsilon_by_renyi_is_never_below_the_exact_one(mu, x):
    from smm_dp.rdp import to_epsilon

    curve = np.array([max(exact_rdp(x, mu, order)) for order in range(2, 33)])
    assert to_epsilon(range(2, 33), curve, 1e-5).epsilon >= exact_epsilon(x, mu, 1e-5) - 1e-8
