"""Percentiles against numpy on the pooled samples, intervals against scipy and by their coverage."""

import numpy as np
import pytest
from scipy import stats

from migperf.latency import percentile_ranks, pooled, summarize, too_short_for_p99
from shared_core import InputError


def test_percentiles_are_of_all_requests_pooled_never_means_of_percentiles():
    rng = np.random.default_rng(5)
    fast, slow = rng.integers(1e6, 2e6, 900), rng.integers(50e6, 90e6, 100)
    ms = pooled([fast, slow]).ms
    together = np.concatenate([fast, slow]) / 1e6
    for percent in (50, 90, 95, 99):
        assert ms[f"p{percent}"] == pytest.approx(np.percentile(together, percent))
    means = (np.percentile(fast, 95) + np.percentile(slow, 95)) / 2e6
    assert abs(ms["p95"] - means) > 20


@pytest.mark.parametrize(
    ("count", "given", "warned"), [(30, False, "is not given"), (100, True, "rests on"), (1000, True, "")]
)
def test_p99_is_refused_below_100_samples_and_flagged_below_1000(count, given, warned):
    summary = summarize(np.arange(1, count + 1) * 1_000_000)
    assert ("p99" in summary.ms) is given
    assert warned in summary.warning
    assert bool(summary.warning) is bool(warned)


@pytest.mark.parametrize("percent", [50, 90, 95, 99])
@pytest.mark.parametrize("count", [120, 1000, 5000])
def test_intervals_are_those_of_scipys_quantile_test(count, percent):
    samples = np.random.default_rng(count).permutation(count) * 1_000_000
    ranks = percentile_ranks(count, percent)
    reference = stats.quantile_test(samples, q=0, p=percent / 100).confidence_interval(0.95)
    ordered = np.sort(samples)
    if ranks is None:
        assert not (np.isfinite(reference.low) and np.isfinite(reference.high))
    else:
        assert ordered[ranks[0] - 1] == pytest.approx(reference.low, abs=1_000_001)
        assert ordered[ranks[1] - 1] == pytest.approx(reference.high, abs=1_000_001)


def test_intervals_cover_the_true_percentile_at_least_as_often_as_promised():
    rng, inside, trials = np.random.default_rng(11), 0, 2000
    lower, upper = percentile_ranks(400, 95)
    for _ in range(trials):
        ordered = np.sort(rng.exponential(size=400))
        inside += ordered[lower - 1] <= -np.log(0.05) <= ordered[upper - 1]
    assert 0.94 < inside / trials < 0.99


def test_an_interval_that_the_samples_cannot_bound_is_left_out():
    assert "p99" not in summarize(np.arange(100) * 1_000_000).interval_ms
    low, high = summarize(np.arange(100) * 1_000_000).interval_ms["p50"]
    assert low < 49.5 < high


def test_no_sample_is_an_error_and_a_negative_one_too():
    with pytest.raises(InputError, match="no request was measured"):
        summarize(np.array([], dtype=np.int64))
    with pytest.raises(InputError, match="negative"):
        summarize(np.array([-5, 3]))


def test_a_duration_too_short_for_p99_is_told_before_the_run():
    assert "p99 needs 100: 10 s would do" in too_short_for_p99(10, 2)
    assert too_short_for_p99(10, 10) == ""
