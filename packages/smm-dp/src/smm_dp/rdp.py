"""Rényi accounting: the paper's bound with its conditions, Poisson sampling, composition, conversion.

τ(α) is a bound of the Rényi divergence of order α between the sum with a participant's vector and the sum
with that vector replaced by zero. Orders are integers α ≥ 2: the sampling formula is a binomial sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64
from scipy.special import gammaln, logsumexp

from shared_core import InputError

OFFICIAL_ORDERS = tuple(range(2, 100))
"""The orders that the paper's authors search."""
ORDERS = tuple(range(2, 257))
"""The orders searched here: small epsilon needs the higher ones."""


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy, and the order that proves it."""

    epsilon: float
    delta: float
    order: int
    at_edge: bool
    """The best order is the largest one tried: a longer list of orders would give a smaller epsilon."""


def paper_rdp(order: int, clip: float, mu: float) -> float:
    """Return τ(α) = (1.2α + 1)·c/(4μ), the paper's bound, valid only where `paper_order_allowed`.

    Args:
        order: α ≥ 2.
        clip: c, bound of Σφ(x).
        mu: Total Skellam parameter of the sum (variance 2·mu).
    """
    return (1.2 * order + 1) * clip / (4 * mu)


def paper_coordinate_bound(order: int, mu: float) -> float:
    """Return the largest Δ∞ that the paper's conditions allow: min(2μ/α, √(4μ/((α−1)(10.9α+9.1)))).

    >>> round(paper_coordinate_bound(5, 240 * 5.95), 6)
    4.738442
    """
    return min(2 * mu / order, math.sqrt(4 * mu / ((order - 1) * (10.9 * order + 9.1))))


def paper_order_allowed(order: int, mu: float, coordinate_bound: float) -> bool:
    """Say whether the conditions hold for every integer that a clipped coordinate can be rounded to.

    A coordinate at 4.7 is rounded to 5, so they are checked at ceil(Δ∞). The authors' code checks Δ∞.
    """
    return math.ceil(coordinate_bound) <= paper_coordinate_bound(order, mu)


def paper_orders(mu: float, coordinate_bound: float, orders: Sequence[int] = ORDERS) -> tuple[int, ...]:
    """Return the orders whose conditions hold; they tighten with the order, so lower ones are covered.

    Raises:
        InputError: None holds; says which mu or bound would do.
    """
    allowed = tuple(order for order in orders if paper_order_allowed(order, mu, coordinate_bound))
    if not allowed:
        bound = math.ceil(coordinate_bound)
        needed = max(bound * 1.0, bound**2 * 30.9 / 4)  # both conditions at order 2
        raise InputError(
            f"no order satisfies the paper's conditions: with coordinates up to {bound} order 2 needs mu >= "
            f"{needed:.4g}; raise the scale (mu grows with its square) or use accounting='numeric'",
            field="mu",
            value=mu,
        )
    return allowed


def poisson_sampled(rdp: Float64[np.ndarray, " n"], rate: float) -> Float64[np.ndarray, " n"]:
    """Return the forward divergence D_α((1−q)Q + qP ‖ Q) from bounds of D_j(P ‖ Q), j = 2 .. n+1.

    (1/(α−1))·log[Σ_j C(α,j)(1−q)^(α−j) q^j e^((j−1)τ(j))], the binomial identity of the official code and of
    Zhu and Wang (2019) without their factor 3. Written with e^(..)−1, so that small rates lose no digits.

    Args:
        rdp: τ(2), τ(3), ..., τ(n+1).
        rate: q in [0, 1], chance that a participant is in the round.

    Returns:
        The divergence at the same orders, never above `rdp` itself.
    """
    if not 0 <= rate <= 1:
        raise InputError("a sampling rate lies in 0..1", field="sampling_rate", value=rate)
    if rate in (0.0, 1.0):
        return rdp * rate
    growth = np.arange(1, rdp.size + 1) * rdp
    with np.errstate(divide="ignore"):
        log_growth = growth + np.log(-np.expm1(-growth))  # log(e^((j-1)τ) - 1)
    table = _log_binomial(rdp.size, rate)
    with np.errstate(invalid="ignore"):  # an infinite order must not reach lower ones: −inf + inf
        terms = np.where(np.isneginf(table), -np.inf, table + log_growth)
    excess = np.asarray(logsumexp(terms, axis=1))
    return np.minimum(np.logaddexp(0, excess) / np.arange(1, rdp.size + 1), rdp)


@lru_cache(maxsize=8)
def _log_binomial(count: int, rate: float) -> Float64[np.ndarray, "count count"]:
    """Return log[C(α,j)(1−q)^(α−j) q^j] for α (rows) and j (columns) in 2 .. count+1; −inf where j > α."""
    j = np.arange(2, count + 2)
    order = j[:, None]
    table = gammaln(order + 1) - gammaln(j + 1) + (order - j) * math.log1p(-rate) + j * math.log(rate)
    table -= np.where(j <= order, gammaln(np.maximum(order - j, 0) + 1.0), np.inf)
    return table


def poisson_sampled_reverse(
    rdp_reverse: Float64[np.ndarray, " n"], rdp_two: float, rate: float
) -> Float64[np.ndarray, " n"]:
    """Return a bound of D_α(Q ‖ (1−q)Q + qP) for any P, Q with a common support (docs/numeric-accounting.md).

    The smaller of log[1 + (e^τ(2) − 1)·((1−q)^(1−α) − 1 − (α−1)q)]/(α−1) and q·D_⌈1+q(α−1)⌉(Q ‖ P).

    Args:
        rdp_reverse: D_α(Q ‖ P) for α = 2 .. n+1, which the bound never exceeds.
        rdp_two: τ(2), bound of D_2(P ‖ Q).
        rate: q in [0, 1].
    """
    if rate in (0.0, 1.0):
        return rdp_reverse * rate
    growth, curve = 0.0, np.empty(rdp_reverse.size)
    with np.errstate(over="ignore"):
        for j in range(rdp_reverse.size):  # (1−q)^−(j+1) − 1 − (j+1)q, by lemma 5: without cancellation
            growth = np.float64(growth + (j + 1) * rate**2) / (1 - rate)
            curve[j] = growth
        moment = np.expm1(rdp_two) * curve
    gaps = np.arange(1, rdp_reverse.size + 1)  # α − 1
    lower = np.ceil(rate * gaps).astype(int)  # ⌈1+q(α−1)⌉ − 1
    return np.minimum(np.log1p(moment) / gaps, np.minimum(rate * rdp_reverse[lower - 1], rdp_reverse))


def to_epsilon(orders: Sequence[int], rdp: Float64[np.ndarray, " n"], delta: float) -> Guarantee:
    """Return the smallest epsilon over the orders (Canonne, Kamath, Steinke 2020; the authors' conversion).

    ε = τ + [log(1/δ) + (α−1) log(1−1/α) − log α]/(α−1).

    Args:
        orders: The orders.
        rdp: Composed divergence at each.
        delta: In (0, 1).

    Raises:
        InputError: `delta` is outside (0, 1), an order is not an integer above 1, or no order has a finite
            bound.
    """
    if not 0 < delta < 1:
        raise InputError("delta must lie strictly between 0 and 1", field="delta", value=delta)
    a = np.asarray(orders, np.float64)
    if (a < 2).any() or (a != np.floor(a)).any():
        raise InputError(
            "the bounds and the sampling formula hold at integer orders of at least 2",
            field="orders",
            value=tuple(orders)[:3],
        )
    epsilon = rdp + (-math.log(delta) + (a - 1) * np.log1p(-1 / a) - np.log(a)) / (a - 1)
    if not np.isfinite(epsilon).any():
        raise InputError(
            "no order has a finite bound: more noise is needed", field="orders", value=tuple(orders)[:3]
        )
    best = int(np.nanargmin(epsilon))
    at_edge = best == len(orders) - 1 and len(orders) > 1
    return Guarantee(max(0.0, float(epsilon[best])), delta, int(orders[best]), at_edge)
