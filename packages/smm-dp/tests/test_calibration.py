import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core import InputError
from smm_dp import Accountant, AccountingWarning, calibrate, clip_mixture, smallest_bits, wrap_probability
from smm_dp.calibration import check_budget, check_modulus, expected_shrinkage, smallest_noise, squared_norm
from smm_dp.rdp import paper_coordinate_bound, paper_order_allowed
from smm_dp.rotation import rotate

SUM = {
    "delta": 1e-5,
    "clip": 4096.0,
    "scale": 64.0,
    "sampling_rate": 1.0,
    "rounds": 1,
    "dim": 65536,
    "participants": 100,
}
MNIST = SUM | {"sampling_rate": 0.004, "rounds": 1000, "dim": 63610, "participants": 240}


@pytest.mark.parametrize(("epsilon", "variance"), [(1, 20.5473), (2, 5.9976), (4, 1.8319), (8, 0.5904)])
def test_variances_of_one_round_per_unit_of_the_clip(epsilon, variance):
    found = calibrate(epsilon, accounting="paper", **SUM)
    assert round(2 * found.mu_total / 4096, 4) == variance


def test_noise_of_the_mnist_setting_in_both_modes():
    assert 2 * calibrate(3, accounting="paper", **MNIST).mu_total / 4096 == pytest.approx(0.697, abs=5e-4)
    for scale, variance in ((16.0, 0.483), (4.0, 0.533)):
        found = calibrate(3, accounting="numeric", **(MNIST | {"scale": scale, "clip": scale**2}))
        assert 2 * found.mu_total / scale**2 == pytest.approx(variance, abs=1.5e-3)


@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
def test_the_coordinate_bound_is_the_largest_integer_that_the_best_order_allows(adjacency):
    setting = MNIST | ({"sampling_rate": 1.0, "rounds": 1} if adjacency == "replace-one" else {})
    found = calibrate(3, accounting="paper", adjacency=adjacency, **setting)
    reach = {"zero-out": 1, "replace-one": 2}[adjacency]
    assert paper_order_allowed(found.order, found.mu_total, reach * found.coordinate_bound)
    assert not paper_order_allowed(found.order, found.mu_total, reach * (found.coordinate_bound + 1))
    if adjacency == "zero-out":
        assert (found.order, found.coordinate_bound) == (5, 4)  # the authors' 4.73, cut to an integer


@given(
    st.floats(0.3, 12),
    st.sampled_from([4.0, 16.0, 64.0]),
    st.sampled_from([0.01, 0.2, 1.0]),
    st.integers(1, 300),
)
@settings(max_examples=10)
def test_paper_calibration_is_consistent(epsilon, scale, rate, rounds):
    """μ gives ε at α*, Δ∞ is an integer that α* allows, and the accountant with that Δ∞ agrees."""
    found = calibrate(epsilon, 1e-5, scale**2, scale, rate, rounds, "paper", dim=4096, participants=50)
    assert found.coordinate_bound == math.floor(paper_coordinate_bound(found.order, found.mu_total)) >= 1
    assert paper_order_allowed(found.order, found.mu_total, found.coordinate_bound)
    accountant = Accountant()
    accountant.add(found.round_privacy, rounds)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        spent = accountant.guarantee(1e-5)
    assert spent.epsilon == pytest.approx(found.guarantee.epsilon, rel=1e-12)
    assert spent.epsilon <= epsilon


def test_calibration_returns_the_least_noise():
    found = calibrate(3, accounting="numeric", **MNIST)
    less = Accountant()
    kind = found.round_privacy
    less.add(type(kind)(**(kind.__dict__ | {"mu": found.mu_total * 0.999})), 1000)
    assert found.guarantee.epsilon <= 3 < less.guarantee(1e-5).epsilon


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
@pytest.mark.parametrize("rounds", [1, 50])
def test_a_ledger_admits_exactly_the_rounds_that_were_calibrated_for(accounting, rounds):
    from smm_dp.ledger import BudgetExceeded, PrivacyLedger

    found = calibrate(3.0, 1e-5, 256.0, 16.0, 0.06, rounds, accounting, dim=500, participants=80)
    ledger = PrivacyLedger(None, 3.0, 1e-5, found.round_privacy)
    ledger.charge(rounds)
    with pytest.raises(BudgetExceeded):
        ledger.charge()


def test_numeric_calibration_where_high_orders_cannot_be_certified():
    found = calibrate(8.0, 1e-5, 256.0, 16.0, 0.5, 2, "numeric", dim=7, participants=6)
    assert found.coordinate_bound == 16
    assert found.guarantee.epsilon <= 8.0


def test_a_fixed_coordinate_bound_restricts_the_orders():
    free = calibrate(2, accounting="paper", **SUM)
    tight = calibrate(2, accounting="paper", coordinate_bound=20, **SUM)
    assert tight.coordinate_bound == 20
    assert tight.order < free.order
    assert tight.mu_total > free.mu_total


def test_small_scales_pay_for_the_papers_conditions():
    """γ=4: no order is allowed at the noise that the formula alone would need."""
    found = calibrate(3, accounting="paper", **(MNIST | {"scale": 4.0, "clip": 16.0}))
    assert found.coordinate_bound == 1
    assert 2 * found.mu_total / 16 == pytest.approx(7.95, abs=0.01)


@pytest.mark.parametrize("kind", ["replace-one"])
def test_other_adjacency_needs_more_noise(kind):
    plain = calibrate(4, accounting="paper", **SUM)
    other = calibrate(4, accounting="paper", adjacency=kind, **SUM)
    assert other.mu_total == pytest.approx(4 * plain.mu_total, rel=1e-5)
    assert paper_order_allowed(other.order, other.mu_total, 2 * other.coordinate_bound)


def test_observer_server_counts_every_participation():
    release = calibrate(8, accounting="paper", **(MNIST | {"rounds": 4}))
    server = calibrate(8, accounting="paper", observer="server", **(MNIST | {"rounds": 4}))
    assert server.mu_total > 5 * release.mu_total


def test_predicted_shrinkage_is_what_clipping_does():
    assert expected_shrinkage(64.0**2, 65536, "paper") == pytest.approx(0.31, abs=0.005)
    assert expected_shrinkage(16.0, 65536, "paper") == pytest.approx(0.02, abs=0.001)
    x = np.random.default_rng(0).standard_normal(5000)
    y = rotate(x / np.linalg.norm(x), 3) * 16
    clipped = clip_mixture(y, 256.0)
    assert expected_shrinkage(256.0, 5000, "paper") == pytest.approx(clipped @ y / (y @ y), rel=0.05)
    assert expected_shrinkage(256.0, 5000, "numeric") == 1


def test_wrap_rate_of_the_readme_setting_and_bits_that_avoid_it():
    """sd 53 of a half modulus of 128: 1.6 to 1.7 % of the coordinates."""
    rate = wrap_probability(1428.0, 8)
    assert 0.015 < rate < 0.018
    assert smallest_bits(1428.0) == 9
    with pytest.raises(InputError, match=r"of the coordinates would wrap; 9 bits are enough"):
        check_modulus(1428.0, 5)
    assert check_modulus(1428.0, 9) < 1e-3
    with pytest.raises(InputError, match="lower the scale"):
        smallest_bits(1e20)


@given(st.floats(0.5, 3000), st.integers(2, 10))
def test_wrap_rate_agrees_with_the_exact_tail(mu, bits):
    from smm_dp.skellam import tail_probability

    half = 2 ** (bits - 1)
    exact = tail_probability(mu, half) + tail_probability(mu, half - 1)  # S > m/2 or S ≤ −m/2
    if exact > 1e-3:
        assert wrap_probability(mu, bits) == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"scale": 0.0}, "scale"),
        ({"clip": -1.0}, "clip"),
        ({"rounds": 0}, "rounds"),
        ({"sampling_rate": 0.0}, "sampling rate"),
        ({"epsilon": 1e-9}, "raise epsilon"),
    ],
)
def test_impossible_budgets_are_refused(change, text):
    with pytest.raises(InputError, match=text):
        calibrate(**({"epsilon": 2.0, "accounting": "paper"} | SUM | change))


def test_a_large_delta_warns():
    with pytest.warns(AccountingWarning, match="above 1/100"):
        check_budget(1.0, 0.05, 100)


def test_smallest_noise_finds_the_root_from_either_side():
    for start in (1e-6, 1.0, 1e6):
        assert smallest_noise(lambda v: 7.0 / v, 2.0, start) == pytest.approx(3.5, rel=1e-6)
    assert smallest_noise(lambda v: math.inf if v < 5 else 1 / v, 1.0, 1.0) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"participants": 0}, "participants: expected at least 1"),
        ({"dim": 0}, "dim: expected at least 1"),
        ({"modulus_bits": 77}, "2 to 32"),
        ({"modulus_bits": 0}, "2 to 32"),
        ({"clip": 16384.0**2, "scale": 16384.0, "accounting": "numeric"}, "lower the scale"),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_one_line(change, text):
    values = {
        "epsilon": 1.0, "delta": 1e-5, "clip": 256.0, "scale": 16.0, "sampling_rate": 1.0, "rounds": 1,
        "accounting": "paper", "dim": 1000, "participants": 100,
    }  # fmt: skip
    with pytest.raises(InputError, match=text):
        calibrate(**(values | change))


@pytest.mark.parametrize(("scale", "norm"), [(1e200, 1.0), (4.0, -1.0), (float("nan"), 1.0), (0.0, 1.0)])
def test_a_clip_bound_is_positive_and_finite(scale, norm):
    with pytest.raises(InputError, match=r"scale|norm"):
        squared_norm(scale, norm)
