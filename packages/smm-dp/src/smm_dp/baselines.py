"""The mechanisms that the paper compares with, accounted for with the same care.

All share orders, sampling formula, conversion and adjacency with the Skellam mixture. The integer ones
first clip the L2 norm, then round conditionally: rounding is drawn again until the rounded norm is within a
bound B, and privacy is paid for B. Quantities are in grid units (after scaling by γ) unless said otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, UInt32
from scipy.special import log_ndtr

from shared_core import InputError
from smm_dp.calibration import check_budget, smallest_noise
from smm_dp.mechanism import clip_norm, stochastic_round
from smm_dp.packing import centre, check_bits, check_residues, wrap
from smm_dp.randomness import RandomSource
from smm_dp.rdp import ORDERS, Guarantee, poisson_sampled, to_epsilon
from smm_dp.rotation import padded_dimension, rotate, unrotate
from smm_dp.samplers import binomial_table, discrete_gaussian_table, sample_skellam

Baseline = Literal["skellam", "ddgauss", "cpsgd"]
Orders = int | Integer[np.ndarray, " n"]
Divergences = float | Float64[np.ndarray, " n"]
BETA = math.exp(-0.5)
"""Chance that the first rounding is refused, at most: the value in the baselines' code."""


def rounded_norm_bound(norm: float, dim: int, beta: float = BETA) -> float:
    """Return B, the L2 bound of a conditionally rounded vector (Kairouz, Liu, Steinke 2021, theorem 1).

    B² = min{(R+√d)², R² + d/4 + √(2 log(1/β))·(R + √d/2)}.

    Args:
        norm: R, L2 bound before rounding.
        dim: d, padded dimension.
        beta: Chance that a rounding exceeds B, at most.

    >>> round(rounded_norm_bound(64.0, 65536), 4)
    143.7776
    """
    square = norm**2 + dim / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(dim) / 2)
    return math.sqrt(min((norm + math.sqrt(dim)) ** 2, square))


def rounded_l1_bound(norm: float, dim: int) -> float:
    """Return the L1 bound of an integer vector with L2 norm up to `norm`: B·min(√d, B)."""
    return norm * min(math.sqrt(dim), norm)


def conditional_round(
    x: Float[np.ndarray, " d"], bound: float, source: RandomSource, tries: int = 1000
) -> Int64[np.ndarray, " d"]:
    """Round at random, again and again, until the L2 norm is at most `bound`.

    Raises:
        InputError: It never was; the vector's own norm is probably above the bound.
    """
    for _ in range(tries):
        y = stochastic_round(x, source)
        if float(np.dot(y, y)) <= bound**2:
            return y
    raise InputError(f"no rounding out of {tries} had a norm within the bound", field="bound", value=bound)


def skellam_rdp(order: Orders, l2: float, l1: float, variance: float) -> Divergences:
    """Return τ(α) of the Skellam mechanism (Agarwal, Kairouz, Liu 2021), `variance` = 2·mu of the sum.

    For one order or many.

    αB²/(2V) + min{((2α−1)B² + 6B₁)/(4V²), 3B₁/(2V)}.

    >>> bound = rounded_norm_bound(64.0, 65536)
    >>> round(float(skellam_rdp(8, bound, rounded_l1_bound(bound, 65536), 2000.0)), 6)
    41.371132
    """
    extra = np.minimum(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2**2 / (2 * variance) + extra


def discrete_gaussian_rdp(
    order: Orders, l2: float, l1: float, variance_each: float, participants: int, dim: int
) -> Divergences:
    """Return τ(α) of n added discrete Gaussians of parameter σ² each (Kairouz, Liu, Steinke 2021, prop. 14).

    A sum of discrete Gaussians is not one; t bounds how far it is from it.
    """
    sd = math.sqrt(participants * variance_each)
    t = _gap_of_the_sum(variance_each, participants)
    two, one = l2 / sd, l1 / sd
    slope = min(two**2 + 2 * one * t + t**2 * dim, (two + math.sqrt(dim) * t) ** 2) / 2
    return np.minimum(order * two**2 / 2 + t * dim, order * slope)


def _gap_of_the_sum(variance_each: float, participants: int) -> float:
    """Return t, which bounds how far a sum of discrete Gaussians is from one discrete Gaussian."""
    k = np.arange(1, participants)
    return 10 * float(np.exp(-2 * math.pi**2 * variance_each * k / (k + 1)).sum())


def gaussian_rdp(order: Orders, l2: float, sd: float) -> Divergences:
    """Return τ(α) = αΔ²/(2σ²) of the central Gaussian mechanism: no rounding, no modulus."""
    return order * l2**2 / (2 * sd**2)


def analytic_gaussian_delta(epsilon: float, l2: float, sd: float) -> float:
    """Return the exact delta of one Gaussian release (Balle and Wang 2018, theorem 8)."""
    a, b = l2 / (2 * sd), epsilon * sd / l2
    return float(np.exp(log_ndtr(a - b)) - np.exp(epsilon + log_ndtr(-a - b)))


def analytic_gaussian_sd(epsilon: float, delta: float, l2: float) -> float:
    """Return the least standard deviation of one (epsilon, delta)-private Gaussian release.

    >>> sd = analytic_gaussian_sd(1.0, 1e-5, 1.0)
    >>> abs(analytic_gaussian_delta(1.0, 1.0, sd) / 1e-5 - 1) < 1e-4
    True
    """
    check_budget(epsilon, delta)
    return smallest_noise(lambda sd: math.log(max(analytic_gaussian_delta(epsilon, l2, sd), 1e-300)) -
    math.log(delta),
                          0.0, l2, tolerance=1e-10)  # fmt: skip


def cpsgd_epsilon(trials: int, delta: float, dim: int, l2: float, l1: float, linf: float) -> float:
    """Return epsilon of one release with noise Bin(N, 1/2) − N/2 (Agarwal et al. 2018, theorem 1).

    Second-hand: the paper's own text was not opened. Formula, constants and condition are those of the
    Internet-Draft draft-case-ppm-binomial-dp, which restates theorem 1 and equation (7); the tests hold them
    to exact sums in one and two dimensions. Infinite where N/4 ≥ max(23 log(10d/δ), 2Δ∞) fails.

    Args:
        trials: N of the summed noise; its variance is N/4.
        delta: In (0, 1).
        dim: d.
        l2: Δ₂ of the integer vector.
        l1: Δ₁.
        linf: Δ∞.
    """
    variance = trials / 4
    if variance < max(23 * math.log(10 * dim / delta), 2 * linf):
        return math.inf
    b, c, d = 1 / 3, math.sqrt(2) * 7 / 4, 2 / 3  # b_p, c_p, d_p at p = 1/2
    first = l2 * math.sqrt(2 * math.log(1.25 / delta)) / math.sqrt(variance)
    second = (l2 * c * math.sqrt(math.log(10 / delta)) + l1 * b) / (variance * (1 - delta / 10))
    third = (
        2 / 3 * linf * math.log(1.25 / delta) + linf * d * math.log(20 * dim / delta) * math.log(10 / delta)
    ) / variance
    return first + second + third


@dataclass(frozen=True)
class RoundedMechanism:
    """A baseline that rounds conditionally and then adds integer noise; same shape as `SkellamMixture`.

    Args:
        kind: "skellam", "ddgauss" or "cpsgd".
        dim: D.
        l2_norm: Δ₂, norm to which vectors are clipped, in their own units.
        scale: γ.
        modulus_bits: b.
        variance_total: Variance of the summed noise (for "ddgauss" n·σ²), grid units squared.
        participants: n.
        rotation_seed: Public seed.
    """

    kind: Baseline
    dim: int
    l2_norm: float
    scale: float
    modulus_bits: int
    variance_total: float
    participants: int
    rotation_seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.modulus_bits)
        for field in ("dim", "l2_norm", "scale", "variance_total", "participants"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise InputError("expected a positive finite number", field=field, value=getattr(self, field))

    @property
    def padded_dim(self) -> int:
        """Number of coordinates sent."""
        return padded_dimension(self.dim)

    def encode(self, x: Float[np.ndarray, " dim"], source: RandomSource) -> UInt32[np.ndarray, " d"]:
        """Return a participant's residues."""
        if x.shape != (self.dim,) or not np.isfinite(x).all():
            raise InputError(f"expected {self.dim} finite numbers", field="x", value=x.shape)
        norm = self.scale * self.l2_norm
        y = clip_norm(rotate(x, self.rotation_seed) * self.scale, norm**2)
        rounded = conditional_round(y, rounded_norm_bound(norm, self.padded_dim), source)
        return wrap(rounded + self._noise(source), self.modulus_bits)

    def _noise(self, source: RandomSource) -> Integer[np.ndarray, " d"]:
        each = Fraction(self.variance_total) / self.participants
        if self.kind == "skellam":
            return sample_skellam(each / 2, self.padded_dim, source)
        if self.kind == "ddgauss":
            return discrete_gaussian_table(each).sample(source, self.padded_dim)
        return binomial_table(2 * math.ceil(2 * each)).sample(source, self.padded_dim)

    def decode(
        self, total: Integer[np.ndarray, " d"], count: float | None = None
    ) -> Float64[np.ndarray, " dim"]:
        """Return the estimated sum, or the mean over `count`."""
        check_residues(total, self.padded_dim, self.modulus_bits, "the aggregator")
        return unrotate(
            centre(total, self.modulus_bits) / (self.scale * (count or 1.0)), self.rotation_seed, self.dim
        )


def baseline_guarantee(
    kind: Baseline | Literal["gaussian"],
    variance_total: float,
    delta: float,
    *,
    l2_norm: float,
    scale: float,
    dim: int,
    participants: int,
    sampling_rate: float = 1.0,
    rounds: int = 1,
) -> Guarantee:
    """Return what a baseline guarantees; arguments as for `calibrate_baseline`, noise given.

    For "gaussian" `variance_total` is in the vectors' own units and `scale` has no effect. "cpsgd" has no
    Rényi bound: rounds are composed by the better of basic and advanced composition, each amplified.
    """
    d = padded_dimension(dim)
    if kind == "gaussian":
        sd = math.sqrt(variance_total)
        return _composed(lambda order: gaussian_rdp(order, l2_norm, sd), sampling_rate, rounds, delta)
    l2 = rounded_norm_bound(scale * l2_norm, d)
    l1 = rounded_l1_bound(l2, d)
    if kind == "skellam":
        return _composed(
            lambda order: skellam_rdp(order, l2, l1, variance_total), sampling_rate, rounds, delta
        )
    if kind == "ddgauss":
        each = variance_total / participants
        return _composed(
            lambda order: discrete_gaussian_rdp(order, l2, l1, each, participants, d),
            sampling_rate,
            rounds,
            delta,
        )
    return _cpsgd_guarantee(variance_total, delta, d, l2, l1, sampling_rate, rounds)


def _composed(
    rdp: Callable[[Integer[np.ndarray, " n"]], Divergences], rate: float, rounds: int, delta: float
) -> Guarantee:
    curve = np.asarray(rdp(np.array(ORDERS)))
    return to_epsilon(ORDERS, rounds * poisson_sampled(curve, rate), delta)


def _cpsgd_guarantee(
    variance: float, delta: float, dim: int, l2: float, l1: float, rate: float, rounds: int
) -> Guarantee:
    each_delta = delta / (2 * rounds * rate) if rounds > 1 else delta / rate
    epsilon = cpsgd_epsilon(
        2 * math.ceil(2 * variance), min(each_delta, 0.5), dim, l2, l1, float(math.floor(l2))
    )
    if not math.isfinite(epsilon):
        return Guarantee(math.inf, delta, ORDERS[0], at_edge=False)
    epsilon = math.log1p(rate * math.expm1(epsilon)) if epsilon < 700 else epsilon + math.log(rate)
    advanced = epsilon * math.sqrt(2 * rounds * math.log(2 / delta)) + rounds * epsilon * math.expm1(
        min(epsilon, 700)
    )
    return Guarantee(min(rounds * epsilon, advanced), delta, ORDERS[0], at_edge=False)


def calibrate_baseline(
    kind: Baseline | Literal["gaussian"],
    epsilon: float,
    delta: float,
    *,
    l2_norm: float,
    scale: float,
    dim: int,
    participants: int,
    sampling_rate: float = 1.0,
    rounds: int = 1,
) -> float:
    """Return the least total noise variance (grid units squared; own units for "gaussian").

    Args:
        kind: Which mechanism.
        epsilon: Budget of all rounds together.
        delta: Budget.
        l2_norm: Δ₂, clipping norm in the vectors' units.
        scale: γ.
        dim: D.
        participants: n.
        sampling_rate: q.
        rounds: T.

    Raises:
        InputError: The budget is impossible or cannot be reached.

    >>> round(calibrate_baseline("gaussian", 8, 1e-5, l2_norm=1, scale=1, dim=65536, participants=100), 4)
    0.4072
    """
    check_budget(epsilon, delta)

    def epsilon_of(variance: float) -> float:
        try:
            return baseline_guarantee(
                kind, variance, delta, l2_norm=l2_norm, scale=scale, dim=dim, participants=participants,
                sampling_rate=sampling_rate, rounds=rounds,
            ).epsilon  # fmt: skip
        except InputError:  # no finite order
            return math.inf

    return smallest_noise(epsilon_of, epsilon, (1.0 if kind == "gaussian" else scale**2) * l2_norm**2)
