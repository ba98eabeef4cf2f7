"""Certified numeric accounting of the Skellam mixture. Derived in this project, not peer-reviewed.

For plain L2 clipping Σx² ≤ c and |x_i| ≤ Δ∞ the divergence of the whole vector is at most K_α·c with
K_α = sup over 0 < x ≤ Δ∞ of D_α(x)/x², D_α(x) that of one coordinate. K_α is bounded from above here on a
grid, with every point between the grid covered by a lemma. docs/numeric-accounting.md proves the lemmas;
the tests check each of them by exact sums.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from shared_core import InputError
from smm_dp.skellam import log_pmf

LABEL = "derived in this project, not peer-reviewed"

_ROUNDOFF = 1e-9  # relative allowance for float64 in sums of positive terms (observed: below 1e-12)
_RATIO = 1.03  # of neighbouring grid points; costs about (ratio-1)²/4 of K
_DEEPEST = -640.0  # log of the smallest mass that is summed; e^-640 is a normal float64
_CELLS = 1 << 15  # numbers that are worked on at a time


@dataclass(frozen=True)
class CertifiedRates:
    """K_α for α = 2 .. max_order in both directions; infinite where the sums cannot be certified."""

    mu: float
    coordinate_bound: float
    forward: Float64[np.ndarray, " n"]
    """D_α(with ‖ without) ≤ forward·Σx²"""
    reverse: Float64[np.ndarray, " n"]
    """D_α(without ‖ with) ≤ reverse·Σx²"""


MU_RANGE = (1e-9, 1e8)
"""Skellam parameters whose sums fit in memory and in floating point."""

_FINEST_BOUND = 1e-6  # below, x² and L − 1 are too small for sums of relative precision


@lru_cache(maxsize=256)
def certified_rates(mu: float, coordinate_bound: float, max_order: int) -> CertifiedRates:
    """Return upper bounds of D_α(x)/x² over 0 < x ≤ coordinate_bound for all integer orders up to max_order.

    Args:
        mu: Total Skellam parameter.
        coordinate_bound: Δ∞ > 0, any real number.
        max_order: Largest order, at least 2.

    Raises:
        InputError: An argument is out of range.

    >>> rates = certified_rates(200.0, 4.0, 8)
    >>> bool(1.0 <= rates.forward[6] * 4 * 200 / 8 < 1.02)  # relative to Gaussian noise of the same variance
    True
    """
    if not (MU_RANGE[0] <= mu <= MU_RANGE[1]):
        raise InputError(
            f"numeric accounting is computed for Skellam parameters in {MU_RANGE[0]:g}..{MU_RANGE[1]:g}",
            field="mu",
            value=mu,
        )
    if max_order < 2:
        raise InputError("expected an order of at least 2", field="max_order", value=max_order)
    if not (_FINEST_BOUND <= coordinate_bound < math.inf):
        raise InputError(
            f"expected a finite number of at least {_FINEST_BOUND:g}",
            field="coordinate_bound",
            value=coordinate_bound,
        )
    sums = _MixtureSums(mu, coordinate_bound, max_order)
    grid = _grid(mu, coordinate_bound, max_order)
    forward, reverse, near_forward, near_reverse = sums.moments(grid)
    scale = 1 + _ROUNDOFF
    return CertifiedRates(
        mu,
        coordinate_bound,
        scale * np.maximum(_rate_between(grid, forward), near_forward),
        scale * np.maximum(_rate_between(grid, reverse), near_reverse),
    )


def _grid(mu: float, coordinate_bound: float, max_order: int) -> Float64[np.ndarray, " n"]:
    finest = max(128, max_order)  # one grid for all usual orders, so that calibration and accounting agree
    first = min(1.0, coordinate_bound, 0.02 * math.sqrt(2 * mu) / finest)
    count = 1 + math.ceil(math.log(coordinate_bound / first) / math.log(_RATIO))
    points = (
        np.geomspace(first, coordinate_bound, max(count, 2))
        if first < coordinate_bound
        else np.array([first])
    )
    points[-1] = coordinate_bound  # a power rounded below it would leave a gap
    return np.union1d(points, np.arange(1, math.floor(coordinate_bound) + 1))


def _rate_between(
    grid: Float64[np.ndarray, " n"], moment: Float64[np.ndarray, "n orders"]
) -> Float64[np.ndarray, " orders"]:
    """Return an upper bound of sup log(1 + f(x))/((α−1) x²) over all x between grid points, f known there.

    f is convex between integers (lemma 3), so it lies below its chord, and log below its tangent; and f
    increases (lemma 2). The lower of the two bounds counts in each cell.
    """
    gaps = np.arange(1, moment.shape[1] + 1)  # α − 1
    if len(grid) == 1:
        return np.log1p(moment[0]) / (gaps * grid[0] ** 2)
    left, right = grid[:-1, None], grid[1:, None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        monotone = np.log1p(moment[1:]) / left**2
        height = np.log1p(moment[:-1])
        slope = (moment[1:] - moment[:-1]) / ((right - left) * (1 + moment[:-1]))
        top = np.clip(
            2 * (left - height / slope), left, right
        )  # where (height + slope (x-left))/x² is largest
        chord = (height + slope * (top - left)) / top**2
    best = np.where(np.isfinite(chord), np.minimum(monotone, chord), monotone)
    return np.where(np.isnan(best), np.inf, best).max(axis=0) / gaps


class _MixtureSums:
    """Sums over the integers of functions of L(z) = P(z)/Q(z), with the tails bounded."""

    def __init__(self, mu: float, coordinate_bound: float, max_order: int) -> None:
        self.mu = mu
        self.orders = np.arange(2, max_order + 1)
        steps = math.ceil(coordinate_bound)
        deep = math.ceil(math.sqrt(-4 * mu * _DEEPEST) - _DEEPEST) + 2 * steps + 8
        self.table = table = log_pmf(mu, deep)
        last = int(np.searchsorted(-table, -_DEEPEST)) - 2 * steps - 2
        z = np.arange(steps, max(last, steps + 2))
        forward = table[z] + max_order * (table[z - steps] - table[z])
        reverse = table[z] + (max_order - 1) * (table[z] - table[z + steps])
        needed = np.flatnonzero(
            (forward > forward.max() - 90) | (reverse > reverse.max() - 90) | (table[z] > -90)
        )
        self.radius = int(z[needed[-1]])
        self.z = np.arange(-self.radius - 1, self.radius + 2)  # the two ends serve the tails only
        self.weight = np.exp(table[np.abs(self.z)])

    def moments(
        self, grid: Float64[np.ndarray, " n"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return E_Q[L^α] − 1 and E_Q[L^(1−α)] − 1 on the grid, and the rates on (0, grid[0]] (lemma 4)."""
        forward = np.empty((len(grid), self.orders.size))
        reverse = np.empty_like(forward)
        rows = max(1, _CELLS // self.z.size)
        for start in range(0, len(grid), rows):
            part = slice(start, start + rows)
            laws = [self._ratio(x) for x in grid[part]]
            tails = np.stack([self._tail(x, *law) for x, law in zip(grid[part], laws, strict=True)])
            ratio, u = (np.stack(rows)[:, 1:-1] for rows in zip(*laws, strict=True))
            forward[part], reverse[part] = self._powers(ratio, u)
            with np.errstate(over="ignore"):  # an infinite sum is a bound too
                forward[part] += tails
                reverse[part] += tails
        return forward, reverse, *self._near_zero(grid[0])

    def _ratio(self, x: float) -> tuple[Float64[np.ndarray, " z"], Float64[np.ndarray, " z"]]:
        """Return L(z) and L(z) − 1 for the input x, each to a small relative error also where it is tiny."""
        k = math.ceil(x) - 1  # x in (k, k+1]
        p = x - k
        base = self.table[np.abs(self.z - k)] - self.table[np.abs(self.z)]
        step = self.table[np.abs(self.z - k - 1)] - self.table[np.abs(self.z - k)]
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows ends as an infinite bound
            ratio = np.exp(base) * ((1 - p) + p * np.exp(step))
            return ratio, np.expm1(base) + np.exp(base) * p * np.expm1(step)

    def _tail(
        self, x: float, ratio: Float64[np.ndarray, " z"], _: object = None
    ) -> Float64[np.ndarray, " orders"]:
        """Bound what all |z| > radius add to either sum (lemma 6); infinite where terms grow."""
        z, steps = self.radius + 1, math.ceil(x)
        inner = z - steps + 2
        turan = -math.log1p(-2 / (inner + math.sqrt(4 * self.mu**2 + inner**2)))  # log r_(z-1)/r_z at most
        log_ratio = self.table[z + 1] - self.table[z] + steps * self.orders * turan
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            # a ratio that under- or overflowed gives an infinite bound
            up = self.table[z] + self.orders * np.log(ratio[-1])
            down = self.table[z] - (self.orders - 1) * np.log(ratio[0])
            bound = 2 * (self.orders + 1) * (np.exp(up) + np.exp(down)) / -np.expm1(log_ratio)
        return np.where((log_ratio < 0) & np.isfinite(bound), bound, np.inf)

    def _powers(
        self, ratio: Float64[np.ndarray, "n z"], u: Float64[np.ndarray, "n z"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return Σ Q (L^α − 1 − αu) and Σ Q (L^(1−α) − 1 + (α−1)u), u = L − 1, for all orders.

        By g_(j+1) = L g_j + j u² and h_(j+1) = (h_j + (j+1) u²)/L: only positive numbers are added, so
        nothing cancels however small the divergence is (lemma 5).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            square = self.weight[1:-1] * u * u
        g, h = np.zeros_like(u), np.zeros_like(u)
        forward = np.empty((len(u), self.orders.size))
        reverse = np.empty_like(forward)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            inverse = 1 / ratio
            for index, order in enumerate(self.orders):
                g *= ratio
                g += (order - 1) * square
                h += (order - 1) * square
                h *= inverse
                forward[:, index] = g.sum(axis=1)
                reverse[:, index] = h.sum(axis=1)
        return np.where(np.isnan(forward), np.inf, forward), np.where(np.isnan(reverse), np.inf, reverse)

    def _near_zero(self, x: float) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds of f(t)/((α−1)t²) for all 0 < t ≤ x ≤ 1 (lemma 4)."""
        ends, excess = self._ratio(x)
        ratio, u = ends[1:-1], excess[1:-1]
        gains = u > 0  # those z whose ratio is above 1
        quadratic = self.orders * (self.orders - 1) / 2
        with np.errstate(over="ignore", invalid="ignore"):
            weight = self.weight[1:-1] * u**2
        up = self._powers(np.where(gains, ratio, 1.0)[None], np.where(gains, u, 0.0)[None])[0][0]
        down = self._powers(np.where(gains, 1.0, ratio)[None], np.where(gains, 0.0, u)[None])[1][0]
        tail = self._tail(x, ends) * (1 + self.orders)  # lemma 4 puts C(α,2)u² for some of the terms
        scale = (self.orders - 1) * x * x
        with np.errstate(over="ignore", invalid="ignore"):
            rates = (
                (up + quadratic * weight[~gains].sum() + tail) / scale,
                (down + quadratic * weight[gains].sum() + tail) / scale,
            )
        forward, reverse = (np.where(np.isnan(rate), np.inf, rate) for rate in rates)
        return forward, reverse
