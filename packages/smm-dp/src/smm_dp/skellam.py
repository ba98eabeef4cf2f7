"""The symmetric Skellam law Sk(μ): the difference of two independent Poisson variables of mean μ.

Its variance is 2μ and its mass function S_μ(z) = e^(−2μ) I_|z|(2μ) is log-concave. Everything here comes
from the ratios r_z = S(z+1)/S(z), z ≥ 0, by the downward recurrence r_(z−1) = 1 / (z/μ + r_z), which
contracts errors; the upward one magnifies them.
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float64
from scipy.special import ive

from shared_core import InputError


def support_radius(mu: float, log_tail: float) -> int:
    """Return a z with P(|Sk(mu)| > z) < 2 e^(−log_tail), by Bernstein's inequality."""
    return math.ceil(log_tail / 3 + math.sqrt(log_tail**2 / 9 + 4 * mu * log_tail)) + 1


def pmf_ratios(mu: float, radius: int) -> Float64[np.ndarray, " radius"]:
    """Return r_z = S(z+1)/S(z) for z = 0 .. radius−1, each to about 1e-15.

    Args:
        mu: Parameter of the law, positive.
        radius: Number of ratios.

    Raises:
        InputError: `mu` is not positive and finite.
    """
    if not (mu > 0 and math.isfinite(mu)):
        raise InputError("the Skellam parameter must be positive and finite", field="mu", value=mu)
    start = radius + 64 + math.ceil(4 * math.sqrt(mu))
    half = (start + 1) / (2 * mu)
    ratio = 1 / (half + math.sqrt(half**2 + 1))  # Amos' approximation of r_start
    out = np.empty(radius)
    for z in range(start, 0, -1):
        ratio = 1 / (z / mu + ratio)
        if z <= radius:
            out[z - 1] = ratio
    return out


def log_pmf(mu: float, radius: int) -> Float64[np.ndarray, " size"]:
    """Return log S(z) for z = 0 .. radius (size radius+1).

    >>> float(np.exp(log_pmf(0.5, 40)).sum() * 2 - np.exp(log_pmf(0.5, 40))[0]).__round__(12)
    1.0
    """
    return np.concatenate(([0.0], np.cumsum(np.log(pmf_ratios(mu, radius))))) + math.log(ive(0, 2 * mu))


def tail_probability(mu: float, z: int) -> float:
    """Return P(Sk(mu) > z) for z ≥ 0, by summing the mass function upwards from z+1."""
    last = max(support_radius(mu, 45.0), z + 40)
    return float(math.fsum(np.exp(log_pmf(mu, last)[z + 1 :])))


def cumulative_thresholds(mu: Fraction, bits: int) -> tuple[int, list[int]]:
    """Return the distribution function of Sk(mu) in fixed point, from integers only.

    Args:
        mu: Exact rational parameter, positive.
        bits: Precision of the result.

    Returns:
        (first, thresholds): thresholds[i] is P(Z ≤ first + i)·2^bits with an error below 2, for all values
        but those whose tails weigh less than 2^−(bits+8).
    """
    work = bits + 96  # fixed point of the recurrence; its error stays below 2^-(bits+64), see the tests
    one = 1 << work
    radius = support_radius(float(mu), (bits + 10) * math.log(2))
    start = radius + 64 + math.ceil(4 * math.sqrt(mu)) + bits
    ratio = 0
    ratios = [0] * radius
    for z in range(start, 0, -1):
        ratio = (one << work) // (z * one * mu.denominator // mu.numerator + ratio)
        if z <= radius:
            ratios[z - 1] = ratio
    weights = [one]
    for ratio in ratios:
        weights.append(weights[-1] * ratio >> work)
    total = 2 * sum(weights) - weights[0]
    thresholds, running = [], 0
    for weight in weights[:0:-1] + weights:
        running += weight
        thresholds.append((running << bits) // total)
    return -radius, thresholds[:-1]  # the last one is 1: no draw lies above it at this precision
