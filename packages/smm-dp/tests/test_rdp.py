import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import comb

from shared_core import InputError
from smm_dp.divergence import exact_rdp, renyi_divergence
from smm_dp.rdp import (
    OFFICIAL_ORDERS,
    ORDERS,
    paper_coordinate_bound,
    paper_order_allowed,
    paper_orders,
    paper_rdp,
    poisson_sampled,
    poisson_sampled_reverse,
    to_epsilon,
)
from smm_dp.skellam import log_pmf


def paper_curve(clip, mu, orders=OFFICIAL_ORDERS):
    return np.array([paper_rdp(order, clip, mu) for order in orders])


def test_readme_setting_of_the_official_code():
    """c=4096, n=240, N=60000, 4 epochs, mu=5.95 each: T=1000, q=0.004 (README: epsilon 3, bound 4.73)."""
    mu = 240 * 5.95
    spent = to_epsilon(OFFICIAL_ORDERS, 1000 * poisson_sampled(paper_curve(4096, mu), 0.004), 1e-5)
    assert round(spent.epsilon, 6) == 2.998798
    assert spent.order == 5
    assert not spent.at_edge
    assert round(paper_coordinate_bound(5, mu), 6) == 4.738442


def test_one_round_without_sampling():
    mu = 100 * 5.95
    spent = to_epsilon(OFFICIAL_ORDERS, paper_curve(4096, mu), 1e-5)
    assert round(spent.epsilon, 6) == 12.718330
    assert spent.order == 3
    assert round(paper_coordinate_bound(3, mu), 6) == 5.335626


def test_noise_where_the_number_of_one_participant_is_wanted_gives_another_epsilon():
    """Toy trap 4: mu of one participant instead of the total."""
    wrong = to_epsilon(OFFICIAL_ORDERS, 1000 * poisson_sampled(paper_curve(4096, 5.95), 0.004), 1e-5)
    assert wrong.epsilon > 100


@given(st.floats(0.5, 5000), st.floats(-6, 6), st.integers(2, 64))
def test_the_papers_bound_is_never_below_the_exact_divergence(mu, x, order):
    from smm_dp import second_moment

    bound = paper_rdp(order, float(second_moment(np.array([x]))[0]), mu)
    assert max(exact_rdp(x, mu, order)) <= bound * (1 + 1e-9) + 1e-13


@given(st.floats(0.5, 2000), st.integers(1, 8), st.integers(2, 32))
def test_integer_shift_bound_behind_the_papers_formula(mu, shift, order):
    """(i) of the derivation: D ≤ (1.09α + 0.91)s²/(4μ) when α ≤ 2μ/s."""
    if order <= 2 * mu / shift:
        assert exact_rdp(float(shift), mu, order)[0] <= (1.09 * order + 0.91) * shift**2 / (4 * mu) * (
            1 + 1e-12
        )


@given(st.floats(0.1, 1e5), st.floats(0.01, 50), st.integers(2, 256))
def test_an_allowed_order_satisfies_both_conditions_at_the_rounded_bound(mu, bound, order):
    top = math.ceil(bound)
    stated = top <= 2 * mu / order and top**2 <= 4 * mu / (10.9 * order**2 - 1.8 * order - 9.1) * (1 + 1e-12)
    assert paper_order_allowed(order, mu, bound) <= stated
    if paper_order_allowed(order, mu, bound) and order > 2:
        assert paper_order_allowed(order - 1, mu, bound)  # lower orders, which sampling uses, are covered


@given(st.floats(1e-3, 1e5), st.integers(2, 256))
def test_the_coordinate_bound_is_the_largest_that_both_conditions_allow(mu, order):
    """Below mu = 0.13 the first condition, order ≤ 2μ/Δ∞, is the tighter one, and both allow less than 1."""
    first = 2 * mu / order
    second = math.sqrt(4 * mu / (10.9 * order**2 - 1.8 * order - 9.1))
    bound = paper_coordinate_bound(order, mu)
    assert bound <= first
    assert bound <= second * (1 + 1e-12)
    assert bound >= min(first, second) * (1 - 1e-12)


def test_the_official_bound_of_4_73_is_refused_at_its_own_order_but_4_is_allowed():
    mu = 240 * 5.95
    assert not paper_order_allowed(5, mu, 4.73)
    assert paper_order_allowed(5, mu, 4)
    assert max(paper_orders(mu, 4.73)) == 4


def test_no_order_at_all_is_an_error_that_says_what_mu_would_do():
    with pytest.raises(InputError, match=r"order 2 needs mu >= 7\.725"):
        paper_orders(5.0, 1)
    assert paper_orders(7.7251, 1) == (2,)


@pytest.mark.parametrize("rate", [1e-6, 0.004, 0.3, 0.9])
def test_sampling_formula_equals_the_binomial_sum_written_out(rate):
    curve = paper_curve(3.0, 20.0, range(2, 21))
    for order in (2, 3, 7, 20):
        total = (1 - rate) ** (order - 1) * (order * rate - rate + 1) + math.fsum(
            comb(order, j, exact=True)
            * (1 - rate) ** (order - j)
            * rate**j
            * math.exp((j - 1) * curve[j - 2])
            for j in range(2, order + 1)
        )
        expected = min(math.log(total) / (order - 1), curve[order - 2])
        assert poisson_sampled(curve, rate)[order - 2] == pytest.approx(expected, rel=1e-6, abs=1e-13)


def test_sampling_at_the_ends_and_for_infinite_or_huge_curves():
    curve = paper_curve(3.0, 20.0)
    np.testing.assert_array_equal(poisson_sampled(curve, 1.0), curve)
    assert not poisson_sampled(curve, 0.0).any()
    assert np.isfinite(poisson_sampled(curve * 1e5, 0.5)).all()
    with pytest.raises(InputError, match=r"0\.\.1"):
        poisson_sampled(curve, 1.5)


def test_an_order_without_a_bound_does_not_spoil_lower_ones():
    curve = paper_curve(3.0, 20.0)
    cut = np.where(np.arange(curve.size) < 10, curve, np.inf)
    np.testing.assert_array_equal(poisson_sampled(cut, 0.3)[:10], poisson_sampled(curve, 0.3)[:10])
    assert np.isinf(poisson_sampled(cut, 0.3)[10:]).all()


@given(st.floats(1, 500), st.integers(1, 4), st.floats(0.001, 0.95), st.integers(2, 24))
def test_sampled_integer_shifts_exactly(mu, shift, rate, order):
    """Forward is the identity; reverse is no larger because shift and reflection swap the laws."""
    table = log_pmf(mu, 2000)
    z = np.arange(-900, 901)
    q, p = table[np.abs(z)], table[np.abs(z - shift)]
    mixed = np.logaddexp(np.log(rate) + p, np.log1p(-rate) + q)
    curve = np.array([renyi_divergence(p, q, j) for j in range(2, order + 1)])
    forward = renyi_divergence(mixed, q, order)
    assert poisson_sampled(curve, rate)[-1] == pytest.approx(min(forward, curve[-1]), rel=1e-6, abs=1e-10)
    assert renyi_divergence(q, mixed, order) <= forward * (1 + 1e-7) + 1e-12


@given(st.integers(0, 2**32), st.floats(0.001, 0.6), st.integers(2, 24))
def test_sampled_reverse_bound_for_arbitrary_laws(seed, rate, order):
    """Lemma 7, for laws without any symmetry."""
    generator = np.random.default_rng(seed)
    p, q = generator.dirichlet(np.full(12, 0.7), 2) + 1e-6
    p, q = np.log(p / p.sum()), np.log(q / q.sum())
    mixed = np.logaddexp(np.log(rate) + p, np.log1p(-rate) + q)
    reverse = np.array([renyi_divergence(q, p, j) for j in range(2, order + 1)])
    bound = poisson_sampled_reverse(reverse, renyi_divergence(p, q, 2), rate)[-1]
    assert renyi_divergence(q, mixed, order) <= bound * (1 + 1e-9) + 1e-12


@given(st.floats(0.95, 0.999), st.floats(1e-3, 0.9), st.integers(2, 24))
def test_sampled_reverse_bound_is_reached_by_a_loss_with_two_values(weight, rate, order):
    """P has hardly anything where Q has 1 − weight: there q(L−1) is −q, and there lies the variance."""
    tiny = 1e-13
    q = np.array([1 - weight, weight])
    p = np.array([tiny, 1 - tiny])
    exact = renyi_divergence(np.log(q), np.log((1 - rate) * q + rate * p), order)
    chi = float((p * p / q).sum())
    bound = poisson_sampled_reverse(np.full(order - 1, np.inf), math.log(chi), rate)[-1]
    assert exact <= bound * (1 + 1e-9)
    assert bound <= 1.2 * exact


def test_conversion_equals_the_formula_and_warns_of_the_edge():
    spent = to_epsilon([2, 3, 4], np.array([0.5, 0.7, 1.2]), 1e-5)
    each = [
        tau + (math.log(1e5) + (a - 1) * math.log(1 - 1 / a) - math.log(a)) / (a - 1)
        for a, tau in ((2, 0.5), (3, 0.7), (4, 1.2))
    ]
    assert spent.epsilon == pytest.approx(min(each))
    assert spent.order == 4
    assert spent.at_edge


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_impossible_delta_is_refused(delta):
    with pytest.raises(InputError, match="between 0 and 1"):
        to_epsilon([2], np.array([1.0]), delta)


@pytest.mark.parametrize("order", [2.5, 1.0, 1.25])
def test_fractional_orders_are_refused(order):
    """Toy trap 11: the binomial formula is for integers; other grids have 1.25."""
    plain = inspect.unwrap(to_epsilon)  # without the tests' own type checks, which refuse it as well
    with pytest.raises(InputError, match="at integer orders of at least 2"):
        plain([3, order], np.array([1.0, 1.0]), 1e-5)


def test_no_finite_order_is_refused():
    with pytest.raises(InputError, match="more noise"):
        to_epsilon([2, 3], np.array([np.inf, np.inf]), 1e-5)


def test_conversion_of_a_gaussian_agrees_with_dp_accounting():
    dp_accounting = pytest.importorskip("dp_accounting")
    accountant = dp_accounting.rdp.RdpAccountant(list(ORDERS))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.3)), 500)
    curve = np.array([order / (2 * 1.3**2) for order in ORDERS])
    ours = to_epsilon(ORDERS, 500 * poisson_sampled(curve, 0.01), 1e-5)
    assert ours.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
