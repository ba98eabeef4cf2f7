"""Loads: schedules, exact queues on a simulated clock, and the error of the real clock."""

import time

import numpy as np
import pytest

from migperf.loads import (
    Closed,
    Constant,
    Gamma,
    Poisson,
    SimulatedClock,
    arrivals,
    drive_closed,
    drive_open,
    from_spec,
    spec_of,
)
from shared_core import InputError


def served(load, service_ms, seconds, clock=None):
    """Serve the load on a simulated clock with a service time that may depend on the size of the batch."""
    clock = clock or SimulatedClock()
    cost = service_ms if callable(service_ms) else lambda size: service_ms
    schedule = arrivals(load, seconds)
    return drive_open(load, schedule, lambda size: clock.advance(cost(size) * 1e6), clock), schedule


@pytest.mark.parametrize(("rho", "mean_ms"), [(0.3, 12.14), (0.5, 15.0), (0.7, 21.67), (0.9, 55.0)])
def test_open_loop_gives_the_mean_response_of_the_m_d_1_queue(rho, mean_ms):
    load = Poisson(rho * 100, seed=7)
    timings, _ = served(load, 10, 300)
    assert not timings.saturated
    # The mean of so short a run is known only roughly; the driver follows Lindley's recursion exactly, so
    # the long run is the recursion's.
    assert np.mean(timings.latency) / 1e6 == pytest.approx(mean_ms, rel=0.03 if rho < 0.6 else 0.35)
    due = arrivals(load, 40_000) / 1e6
    done = np.maximum.accumulate(due - 10 * np.arange(len(due))) + 10 * np.arange(1, len(due) + 1)
    assert np.mean(done - due) == pytest.approx(mean_ms, rel=0.02)
    assert np.allclose(timings.latency / 1e6, (done - due)[: len(timings.latency)])


def test_a_queue_of_constant_arrivals_does_not_wait_below_capacity():
    timings, _ = served(Constant(99), 10, 60)
    assert set(timings.latency.tolist()) == {10_000_000}


def test_the_wait_follows_lindleys_recursion_request_by_request():
    timings, schedule = served(Gamma(70, 0.5, seed=3), 10, 200)
    free, expected = 0, []
    for due in schedule.tolist():
        free = max(free, due) + 10_000_000
        expected.append(free - due)
    assert timings.latency.tolist() == expected


def test_a_stall_counts_for_every_request_that_fell_due_in_it():
    clock = SimulatedClock()
    stalled = []

    def target(_):
        clock.advance(1e9 if clock.now() >= 50e9 and not stalled and stalled.append(1) is None else 1e6)

    timings = drive_open(Constant(100), arrivals(Constant(100), 100), target, clock)
    assert len(timings.latency) == 10_000
    assert not timings.saturated
    assert np.percentile(timings.latency, 99) / 1e6 == pytest.approx(101, abs=1)
    # what a closed loop would have called the tail
    assert np.percentile(timings.service, 99) / 1e6 == pytest.approx(1)


@pytest.mark.parametrize("rate", [101, 120, 400])
def test_a_rate_above_capacity_is_saturated_also_where_the_backlog_stays_below_its_limit(rate):
    timings, schedule = served(Constant(rate), 10, 30)
    assert timings.saturated
    assert len(timings.latency) <= len(schedule)


def test_saturation_stops_at_the_backlog_limit_with_the_achieved_rate():
    timings, schedule = served(Constant(1000, backlog_limit=100), 10, 60)
    assert timings.saturated
    assert timings.backlog > 100
    assert len(timings.completed) < 20 < len(schedule)
    achieved = len(timings.completed) / ((timings.completed[-1] - timings.scheduled[0]) / 1e9)
    assert achieved == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_queue_below_capacity_is_not_called_saturated(seed):
    timings, _ = served(Poisson(90, seed=seed), 10, 30)
    assert not timings.saturated or np.mean(np.diff(timings.scheduled)) <= 10e6


def test_micro_batches_close_when_full_or_when_the_oldest_has_waited():
    load = Constant(1000, collect=4, wait_ms=2.0)
    timings, _ = served(load, 0.1, 0.1)
    sizes = np.bincount(timings.calls)
    assert set(sizes[:-1].tolist()) == {3}  # 0, 1 and 2 ms: then the oldest has waited 2 ms
    assert timings.lag[0] == 2_000_000
    full, _ = served(Constant(1000, collect=2, wait_ms=50), 0.1, 0.1)
    assert set(np.bincount(full.calls).tolist()) == {2}
    assert full.lag[0] == 1_000_000
    assert len(full.latency) == 100


def test_micro_batching_without_a_wait_takes_what_has_piled_up():
    timings, _ = served(Constant(1000, collect=8), 5, 1.0)
    assert np.bincount(timings.calls)[1:-1].tolist() == [5] * (len(np.bincount(timings.calls)) - 2)
    assert not timings.saturated
    assert served(Constant(1000), 5, 1.0)[0].saturated


def test_the_same_seed_gives_the_same_schedule_and_a_longer_one_begins_with_it():
    short, long = arrivals(Poisson(50, seed=666), 10), arrivals(Poisson(50, seed=666), 30)
    assert np.array_equal(short, long[: len(short)])
    assert not np.array_equal(short, arrivals(Poisson(50, seed=667), 10)[: len(short)])


def test_gaps_have_the_distribution_that_was_asked_for():
    from scipy import stats

    gaps = np.diff(arrivals(Poisson(200, seed=1), 50)) / 1e9
    assert stats.kstest(gaps, stats.expon(scale=1 / 200).cdf).pvalue > 0.01
    gaps = np.diff(arrivals(Gamma(200, 4.0, seed=1), 50)) / 1e9
    assert stats.kstest(gaps, stats.gamma(4.0, scale=1 / 800).cdf).pvalue > 0.01
    assert len(arrivals(Constant(25), 30)) == 750


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(rate):
    with pytest.raises(InputError, match="rate: expected requests a second above 0"):
        Poisson(rate, seed=1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "burst"}, "expected one of closed, constant, poisson, gamma"),
        ({"kind": "poisson", "rate": 5, "sed": 1}, "a poisson load has"),
        ({"kind": "poisson", "rate": 5}, "needs"),
        ({"kind": "gamma", "rate": 5, "shape": 0, "seed": 1}, "shape above 0"),
        ({"kind": "closed", "concurrency": 0}, "1 to 1024 threads"),
    ],
)
def test_a_spec_that_cannot_be_a_load_says_why(spec, message):
    with pytest.raises(InputError, match=message):
        from_spec(spec)


@pytest.mark.parametrize(
    "load", [Closed(4), Constant(3.5), Poisson(2, seed=9, collect=4), Gamma(1, 2, seed=3)]
)
def test_a_load_is_read_back_from_its_spec(load):
    assert from_spec({**spec_of(load), "duration": 3}) == load


def test_nothing_to_send_is_said_before_the_run():
    with pytest.raises(InputError, match=r"nothing arrives in 0\.001 s"):
        arrivals(Poisson(0.01, seed=1), 0.001)


def test_closed_loop_begins_no_call_after_the_end_and_finishes_the_last():
    clock = SimulatedClock()
    timings = drive_closed(Closed(), lambda _: clock.advance(3e6), 10_000_000, clock)
    assert timings.started.tolist() == [0, 3_000_000, 6_000_000, 9_000_000]
    assert timings.completed[-1] == 12_000_000


def test_closed_loop_threads_overlap_and_their_failures_are_raised():
    timings = drive_closed(Closed(4), lambda _: time.sleep(0.01), time.perf_counter_ns() + 50_000_000)
    overlap = np.sum(timings.completed[:-1] > timings.started[1:])
    assert overlap > len(timings.started) / 2

    def broken(_):
        raise RuntimeError("broken target")

    with pytest.raises(RuntimeError, match="broken target"):
        drive_closed(Closed(2), broken, time.perf_counter_ns() + 10_000_000)


def test_the_driver_costs_less_than_20_us_a_request_of_processor_time():
    schedule = np.zeros(20_000, dtype=np.int64)
    load = Constant(1000, backlog_limit=1_000_000)
    before = time.process_time()
    drive_open(load, schedule, lambda _: None)
    assert (time.process_time() - before) / len(schedule) < 20e-6


def test_real_requests_start_close_to_their_schedule():
    """Loose: the median, because a busy machine delays the rest; the bench holds p99 against its target."""
    load = Poisson(500, seed=4)
    timings = drive_open(load, arrivals(load, 0.5), lambda _: None)
    assert np.min(timings.lag) >= 0
    assert np.median(timings.lag) < 200_000


def test_phases_of_calls_are_kept_in_order():
    clock = SimulatedClock()
    seen = iter(range(100))
    timings = drive_open(Constant(10), arrivals(Constant(10), 1), lambda _: {"forward": next(seen)}, clock)
    assert timings.phases["forward"] == list(range(10))
