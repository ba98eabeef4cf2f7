"""Latencies: percentiles over all requests pooled, with intervals, and what too few samples do not tell."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from shared_core import InputError

PERCENTILES = (50, 90, 95, 99)
P99_LEAST = 100
"""Below this many samples p99 is the largest or nothing: it is not given."""
P99_FIRM = 1000
"""Below this many it rests on fewer than ten samples: it is given with a warning."""


@dataclass(frozen=True)
class Latency:
    """A summary of latencies.

    Attributes:
        ms: mean, std, p50, p90, p95, p99, max in ms; without p99 below 100 samples.
        interval_ms: 95 % interval of each percentile, where the samples bound it on both sides.
        samples: How many requests.
        warning: What the number of samples does not allow; "" if nothing.
    """

    ms: dict[str, float]
    interval_ms: dict[str, tuple[float, float]]
    samples: int
    warning: str


def percentile_ranks(count: int, percent: float, confidence: float = 0.95) -> tuple[int, int] | None:
    """Return the ranks (from 1) of the order statistics that enclose a percentile with that confidence.

    The number of samples below the true percentile is binomial(count, percent/100): no distribution of
    latencies is assumed. The coverage is at least the confidence, exactly computed.

    Returns:
        Lower and upper rank, or None if the samples are too few to bound the percentile on both sides.
    """
    from scipy.stats import binom

    tail = (1 - confidence) / 2
    lower = int(binom.ppf(tail, count, percent / 100))
    upper = int(binom.ppf(1 - tail, count, percent / 100)) + 1
    return (lower, upper) if lower >= 1 and upper <= count else None


def summarize(latencies_ns: Int64[np.ndarray, " requests"]) -> Latency:
    """Summarize latencies of requests, pooled: never means of percentiles.

    Args:
        latencies_ns: One a request, in ns, from all workers and repeats that belong together.

    Raises:
        InputError: There is none, or one is negative.

    >>> summarize(np.full(50, 2_000_000)).ms["p50"], summarize(np.full(50, 2_000_000)).warning
    (2.0, 'p99 is not given: 50 samples, expected at least 100')
    """
    count = len(latencies_ns)
    if not count:
        raise InputError("no request was measured", field="latencies")
    ordered = np.sort(latencies_ns) / 1e6
    if ordered[0] < 0:
        raise InputError("a latency is negative: the clock went back", field="latencies", value=ordered[0])
    given = [percent for percent in PERCENTILES if percent < 99 or count >= P99_LEAST]
    ms = {"mean": float(ordered.mean()), "std": float(ordered.std())}
    ms |= {f"p{percent}": float(np.percentile(ordered, percent)) for percent in given}
    ms["max"] = float(ordered[-1])
    intervals: dict[str, tuple[float, float]] = {}
    for percent in given:
        if ranks := percentile_ranks(count, percent):
            intervals[f"p{percent}"] = (float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1]))
    warning = ""
    if count < P99_LEAST:
        warning = f"p99 is not given: {count} samples, expected at least {P99_LEAST}"
    elif count < P99_FIRM:
        warning = f"p99 rests on {count} samples, expected at least {P99_FIRM} to trust it"
    return Latency(ms, intervals, count, warning)


def pooled(parts: Sequence[Int64[np.ndarray, " _"]]) -> Latency:
    """Summarize several measurements as one, from their raw latencies."""
    return summarize(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))


def too_short_for_p99(rate: float, seconds: float) -> str:
    """Return why a run at a known rate cannot have a p99, and how long would do; "" if it can.

    >>> too_short_for_p99(20, 3)
    '60 requests are expected in 3 s, p99 needs 100: 5 s would do'
    """
    expected = rate * seconds
    if expected >= P99_LEAST:
        return ""
    return (
        f"{expected:.0f} requests are expected in {seconds:g} s, p99 needs {P99_LEAST}: "
        f"{P99_LEAST / rate:.3g} s would do"
    )
