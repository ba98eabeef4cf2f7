import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core import InputError
from smm_dp import Accountant, AccountingWarning, RoundPrivacy, honest_mu, second_moment
from smm_dp.divergence import exact_rdp, log_mixture, renyi_divergence
from smm_dp.numeric import certified_rates
from smm_dp.rdp import paper_order_allowed
from smm_dp.skellam import log_pmf

README = {"clip": 4096.0, "mu": 240 * 5.95, "coordinate_bound": 4, "sampling_rate": 0.004}


def test_accountant_gives_the_official_value_at_the_integer_bound():
    accountant = Accountant()
    accountant.add(RoundPrivacy(**README), rounds=1000)
    spent = accountant.guarantee(1e-5)
    assert (round(spent.epsilon, 6), spent.order) == (2.998798, 5)


def test_orders_outside_the_conditions_are_not_used():
    """At the official bound 4.73, which rounds to 5, order 5 has no proof: the next best one is reported."""
    accountant = Accountant()
    accountant.add(RoundPrivacy(**(README | {"coordinate_bound": 4.73})), rounds=1000)
    spent = accountant.guarantee(1e-5)
    assert spent.order == 4
    assert spent.epsilon > 2.998798


def test_rounds_add_up_whatever_their_grouping():
    one, other = RoundPrivacy(**README), RoundPrivacy(**(README | {"accounting": "numeric"}))
    a, b = Accountant(), Accountant()
    a.add(one, 7)
    a.add(other, 3)
    for kind in (one,) * 4 + (one,) * 3 + (other,) * 3:
        b.add(kind)
    assert a.guarantee(1e-5) == b.guarantee(1e-5)
    assert a.history == b.history
    assert Accountant.from_state(a.state()).guarantee(1e-5) == a.guarantee(1e-5)
    np.testing.assert_allclose(a.rdp(), 7 * one.rdp(128) + 3 * other.rdp(128))


def test_numeric_is_less_than_paper_and_above_gaussian():
    numeric = RoundPrivacy(**(README | {"accounting": "numeric"})).rdp(20)
    paper = RoundPrivacy(**README).rdp(20)
    assert (numeric[:4] < paper[:4]).all()
    from smm_dp.rdp import poisson_sampled

    gaussian = poisson_sampled(np.arange(2, 21) * 4096 / (4 * README["mu"]), 0.004)
    assert (numeric >= gaussian).all()
    assert (numeric[:6] <= gaussian[:6] * 1.01).all()


@given(st.floats(2, 200), st.floats(0.05, 3), st.floats(0.01, 0.6), st.integers(2, 10))
def test_sampled_numeric_accounting_covers_both_directions_without_assuming_a_symmetry(mu, x, rate, order):
    """No mirror argument holds for sampled mixtures, so the reverse direction is bounded by itself."""
    log_p, log_q = log_mixture(x, mu, 200)
    mixed = np.logaddexp(math.log(rate) + log_p, math.log1p(-rate) + log_q)
    bound = RoundPrivacy(x * x, mu, x, "numeric", sampling_rate=rate).rdp(order)[-1]
    assert renyi_divergence(mixed, log_q, order) <= bound * (1 + 1e-9) + 1e-12
    assert renyi_divergence(log_q, mixed, order) <= bound * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(("mu", "bound", "rate"), [(200.0, 4.0, 0.3), (50.0, 2.5, 0.05)])
def test_the_larger_of_the_two_sampled_directions_counts(mu, bound, rate):
    """Lemma 7 written out: the reverse direction has a bound of its own, here above the forward one."""
    clip = 20.0
    rates = certified_rates(mu, bound, 20)
    ours = RoundPrivacy(clip, mu, bound, "numeric", sampling_rate=rate).rdp(20)
    above = 0
    for order in range(2, 21):
        growth = (1 - rate) ** (1 - order) - 1 - (order - 1) * rate
        moment = math.expm1(clip * rates.forward[0]) * growth
        means = rate * clip * rates.reverse[math.ceil(1 + rate * (order - 1)) - 2]
        reverse = min(math.log1p(moment) / (order - 1), means, clip * rates.reverse[order - 2])
        total = math.fsum(
            math.comb(order, j)
            * (1 - rate) ** (order - j)
            * rate**j
            * (math.exp((j - 1) * clip * rates.forward[j - 2]) if j > 1 else 1.0)
            for j in range(order + 1)
        )
        forward = math.log(total) / (order - 1)
        assert ours[order - 2] == pytest.approx(max(forward, reverse), rel=1e-9)
        above += reverse > forward * 1.001
    assert above > 0


def test_a_server_that_knows_who_takes_part_gets_no_amplification():
    seen = RoundPrivacy(**(README | {"observer": "server"}))
    np.testing.assert_array_equal(seen.rdp(9), RoundPrivacy(**(README | {"sampling_rate": 1.0})).rdp(9))


@given(st.floats(2, 300), st.floats(-2, 2), st.floats(-2, 2), st.integers(2, 12))
def test_replace_one_is_covered_in_both_modes(mu, x, y, order):
    """Two neighbours with vectors x and y, exact divergence of the two mixtures."""
    a, _ = log_mixture(x, mu, 100)
    b, _ = log_mixture(y, mu, 100)
    width = min(len(a), len(b)) // 2
    a, b = (v[len(v) // 2 - width : len(v) // 2 + width + 1] for v in (a, b))
    exact = renyi_divergence(a, b, order)
    from smm_dp import second_moment

    numeric = RoundPrivacy(max(x * x, y * y, 1e-6), mu, 2, "numeric", adjacency="replace-one")
    assert exact <= numeric.rdp(order)[-1] * (1 + 1e-9)
    clip = max(float(second_moment(np.array([v]))[0]) for v in (x, y))
    if clip > 0:
        from smm_dp.rdp import paper_order_allowed, paper_rdp

        if paper_order_allowed(order, mu, 4):
            paper = RoundPrivacy(clip, mu, 2, "paper", adjacency="replace-one")
            assert paper.rdp(order)[-1] == paper_rdp(order, 4 * clip, mu)
            assert exact <= paper.rdp(order)[-1]


@pytest.mark.parametrize(("x", "mu"), [(1.0, 20.0), (2.0, 100.0), (0.6, 5.0), (3.0, 1428.0)])
def test_replace_one_covers_a_vector_and_its_opposite(x, mu):
    """The farthest neighbours of a norm: 2x apart, so about four times the divergence from zero."""
    a, _ = log_mixture(x, mu, 120)
    b = a[::-1]  # the law for −x
    if x == int(x):
        centre = len(a) // 2
        assert np.argmax(a) == centre + x
        assert np.argmax(b) == centre - x
    bound = RoundPrivacy(x * x, mu, x, "numeric", adjacency="replace-one").rdp(12)
    for order in range(2, 13):
        exact = max(renyi_divergence(a, b, order), renyi_divergence(b, a, order))
        assert exact <= bound[order - 2] * (1 + 1e-9)
        assert exact > 2 * max(exact_rdp(x, mu, order))


def test_replace_one_checks_the_conditions_at_twice_the_bound():
    mu = 240 * 5.95
    rdp = RoundPrivacy(4096.0, mu, 4, adjacency="replace-one").rdp(8)
    assert np.isfinite(rdp).tolist() == [4 * mu / ((a - 1) * (10.9 * a + 9.1)) >= 8**2 for a in range(2, 9)]


def test_leaving_noise_is_not_covered_by_one_participant_less():
    """Why add-remove with fixed shares is refused: at x = 0 any K·x² is 0, but the laws differ."""
    n, each = 10, 2.0
    with_noise, without = log_pmf(n * each, 400), log_pmf((n - 1) * each, 400)
    z = np.abs(np.arange(-300, 301))
    per_coordinate = renyi_divergence(with_noise[z], without[z], 8)
    assert per_coordinate > 0.01
    assert 65536 * per_coordinate > 100 * exact_rdp(1.0, (n - 1) * each, 8)[0]
    with pytest.raises(InputError, match="betray an absent participant"):
        RoundPrivacy(1.0, 18.0, 1, adjacency="add-remove", noise_share="fixed-each")
    RoundPrivacy(1.0, 18.0, 1, adjacency="add-remove")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"adjacency": "replace-one"}, "zero-out and add-remove adjacency only"),
        ({"noise_share": "fixed-each"}, "same total noise"),
        ({"adjacency": "add-remove", "observer": "server"}, "sees that a participant is absent"),
        ({"sampling_rate": 0.0}, "sampling rate"),
        ({"sampling_rate": 1.1}, "sampling rate"),
        ({"mu": 0.0}, "mu"),
        ({"clip": math.inf}, "clip"),
        ({"coordinate_bound": -1.0}, "coordinate_bound"),
    ],
)
def test_what_has_no_proof_is_refused(change, text):
    with pytest.raises(InputError, match=text):
        RoundPrivacy(**(README | change))


@pytest.mark.parametrize("field", ["adjacency", "observer", "accounting", "noise_share"])
def test_words_that_are_no_choice_are_refused(field):
    kind = RoundPrivacy(**README)
    object.__setattr__(kind, field, "nobody")  # past the tests' own type checks
    with pytest.raises(InputError, match="expected one of"):
        kind.__post_init__()


def test_a_history_of_something_else_is_refused():
    with pytest.raises(InputError, match="not an entry"):
        Accountant.from_state([{"rounds": 3}])
    with pytest.raises(InputError, match="at least 1"):
        Accountant().add(RoundPrivacy(**README), 0)


def test_edge_of_the_orders_warns():
    accountant = Accountant()
    accountant.add(RoundPrivacy(1.0, 1e6, 1, sampling_rate=0.001))
    with pytest.warns(AccountingWarning, match="largest one tried"):
        accountant.guarantee(1e-5)


def test_statements_about_different_adjacencies_do_not_add_up():
    one = RoundPrivacy(4096.0, 1428.0, 1)
    other = RoundPrivacy(4096.0, 1428.0, 1, adjacency="replace-one")
    accountant = Accountant()
    accountant.add(one, 2)
    with pytest.raises(InputError, match="the rounds before protect against zero-out"):
        accountant.add(other)
    with pytest.raises(InputError, match="do not add up"):
        accountant.guarantee(1e-5, also=[(other, 1)])
    with pytest.raises(InputError, match="do not add up"):
        Accountant().guarantee(1e-5, also=[(one, 1), (other, 1)])
    assert accountant.history == ((one, 2),)
    mixed = [{"round": kind.__dict__, "rounds": 1} for kind in (one, other)]
    with pytest.raises(InputError, match="do not add up"):
        Accountant.from_state(mixed)


def test_an_empty_history_costs_nothing():
    assert Accountant().guarantee(1e-5).epsilon == 0


def test_numeric_accounting_is_labelled_in_the_assumptions():
    text = " ".join(RoundPrivacy(**(README | {"accounting": "numeric"})).assumptions())
    assert "derived in this project, not peer-reviewed" in text
    assert "not who took part" in text
    assert "does not depend on its vector" in text
    assert "Nobody drops out" in " ".join(
        RoundPrivacy(**(README | {"adjacency": "add-remove"})).assumptions()
    )
    assert "no amplification" in " ".join(RoundPrivacy(**(README | {"observer": "server"})).assumptions())


def test_honest_noise_counts_survivors_who_do_not_collude():
    assert honest_mu(2.0, 10, dropouts=3, colluders=2) == 10.0
    with pytest.raises(InputError, match="no honest participant"):
        honest_mu(2.0, 5, dropouts=3, colluders=2)


def _joint(vector, mu, width):
    """Log masses of a whole released vector and of noise alone, on a box of integers, by plain products."""
    with_it, without = np.zeros(1), np.zeros(1)
    for x in vector:
        log_p, log_q = (v[len(v) // 2 - width : len(v) // 2 + width + 1] for v in log_mixture(x, mu, 200))
        with_it, without = np.add.outer(with_it, log_p).ravel(), np.add.outer(without, log_q).ravel()
    return with_it, without


@given(
    st.floats(0.05, 60),
    st.lists(st.floats(-2, 2), min_size=2, max_size=3),
    st.sampled_from([1.0, 0.9, 0.3, 0.02]),
    st.integers(2, 8),
)
@settings(max_examples=25)
def test_exact_divergences_of_whole_vectors_are_below_both_accountants(mu, vector, rate, order):
    """Two and three coordinates, summed over the grid: sampled in both directions, and replaced by −x."""
    bound = max(1e-3, *map(abs, vector))
    log_p, log_q = _joint(vector, mu, 110 if len(vector) == 2 else 45)
    mixed = log_p if rate == 1 else np.logaddexp(math.log(rate) + log_p, math.log1p(-rate) + log_q)
    exact = max(renyi_divergence(mixed, log_q, order), renyi_divergence(log_q, mixed, order))
    x = np.array(vector)
    for accounting, clip in (("numeric", float(x @ x)), ("paper", float(second_moment(x).sum()))):
        if clip < 1e-6 or (accounting == "paper" and not paper_order_allowed(order, mu, bound)):
            continue
        kind = RoundPrivacy(clip, mu, bound, accounting, rate)
        assert exact <= kind.rdp(order)[-1] * (1 + 1e-9) + 1e-12
        if rate == 1 and (accounting == "numeric" or paper_order_allowed(order, mu, 2 * math.ceil(bound))):
            other, _ = _joint(-x, mu, 110 if len(vector) == 2 else 45)
            replaced = RoundPrivacy(clip, mu, bound, accounting, adjacency="replace-one")
            assert renyi_divergence(log_p, other, order) <= replaced.rdp(order)[-1] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("x", "mu", "rate", "rounds"), [(1.0, 6.0, 1.0, 8), (0.4, 3.0, 0.2, 60), (2.6, 40.0, 0.05, 300)]
)
def test_epsilon_of_many_sampled_rounds_covers_dp_accountings_convolution(x, mu, rate, rounds):
    """An accountant of another kind: dp-accounting convolves the exact law of the loss, rounded upwards."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    log_p, log_q = log_mixture(x, mu, 50)
    mixed = log_p if rate == 1 else np.logaddexp(math.log(rate) + log_p, math.log1p(-rate) + log_q)
    laws = [{z: float(v) for z, v in enumerate(law)} for law in (mixed, log_q)]
    exact = 0.0
    for upper, lower in (laws, laws[::-1]):
        one = pld.from_two_probability_mass_functions(lower, upper, value_discretization_interval=1e-4)
        exact = max(exact, one.self_compose(rounds).get_epsilon_for_delta(1e-5))
    accountant = Accountant()
    accountant.add(RoundPrivacy(x * x, mu, x, "numeric", rate), rounds)
    ours = accountant.guarantee(1e-5, warn=False).epsilon
    assert exact - 1e-4 * math.sqrt(rounds) <= ours * (1 + 1e-3)
    assert ours <= 1.35 * exact  # Renyi accounting is not tight, and no more than so loose here
