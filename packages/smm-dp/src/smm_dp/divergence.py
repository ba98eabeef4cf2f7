"""The exact privacy loss of one coordinate, by summing over the integers: the judge of every bound.

Written apart from the accountants, in log space and without their recursions. In one dimension the worst
case is the input itself, so this is the truth; in d dimensions it is the truth for one known vector.
"""

import math

import numpy as np
from jaxtyping import Float64
from scipy.special import logsumexp

from smm_dp.skellam import log_pmf, support_radius


def log_mixture(
    x: float, mu: float, margin: float = 60.0
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Return log P and log Q on one range of integers: P the released coordinate for input x, Q for input 0.

    Args:
        x: Scaled coordinate.
        mu: Skellam parameter of the sum.
        margin: The range leaves out less than about e^−margin of either law.
    """
    k = math.floor(x)
    p = x - k
    radius = support_radius(mu, margin) + abs(k) + 2
    table = log_pmf(mu, radius + abs(k) + 1)
    z = np.arange(-radius, radius + 1)
    with np.errstate(divide="ignore"):
        log_p = np.logaddexp(np.log1p(-p) + table[np.abs(z - k)], np.log(p) + table[np.abs(z - k - 1)])
    return log_p, table[np.abs(z)]


def renyi_divergence(
    log_p: Float64[np.ndarray, " n"], log_q: Float64[np.ndarray, " n"], order: float
) -> float:
    """Return D_α(P ‖ Q) of two laws on the same points."""
    return float(np.asarray(logsumexp(order * log_p + (1 - order) * log_q))) / (order - 1)


def exact_rdp(x: float, mu: float, order: int) -> tuple[float, float]:
    """Return (D_α(P ‖ Q), D_α(Q ‖ P)) of one released coordinate against input 0."""
    margin = (
        60.0 + 4 * order * (1 + abs(x)) * (1 + abs(x)) / max(1.0, math.sqrt(mu)) + 20 * order / max(1.0, mu)
    )
    log_p, log_q = log_mixture(x, mu, margin)
    return renyi_divergence(log_p, log_q, order), renyi_divergence(log_q, log_p, order)


def exact_delta(x: float, mu: float, epsilon: float) -> float:
    """Return the smallest delta for which one release of coordinate x against 0 is (epsilon, delta)-private.

    The hockey-stick divergence Σ max(0, P − e^ε Q), the larger of both directions.
    """
    log_p, log_q = log_mixture(x, mu)

    def stick(a: np.ndarray, b: np.ndarray) -> float:
        gap = epsilon + b - a
        keep = gap < 0
        return math.fsum(np.exp(a[keep]) * -np.expm1(gap[keep]))

    return max(stick(log_p, log_q), stick(log_q, log_p))


def exact_epsilon(x: float, mu: float, delta: float) -> float:
    """Return the smallest epsilon for `exact_delta(x, mu, epsilon)` ≤ delta, to 1e-9."""
    low, high = 0.0, 1.0
    if exact_delta(x, mu, 0.0) <= delta:
        return 0.0
    while exact_delta(x, mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(x, mu, middle) > delta else (low, middle)
    return high
