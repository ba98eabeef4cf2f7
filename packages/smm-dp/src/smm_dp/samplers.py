"""Integer noise, drawn exactly, from uniform bits.

`TableSampler` inverts a distribution function. It compares 16 random bits with a guide table, reads 48 more
where the guide cannot decide, and goes on to 128, 256, ... bits in the vanishing rest, with thresholds
recomputed to that precision. No draw is ever decided by a rounded number, so the law is the stated one: the
distance in total variation is 0, given uniform bits. Running time depends on the draw (a side channel).

`sample_skellam_exact` is the construction of the paper's authors: Poisson(1) by Duchon and Duvignau (2016),
Poisson(a/b) by thinning, from uniform integers alone. It is slow and serves as the judge of the table.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64

from shared_core import InputError
from smm_dp import skellam
from smm_dp.randomness import IntegerReader, RandomSource, words16

Thresholds = tuple[int, list[int]]
"""(first value, distribution function at consecutive values in fixed point), each within 1 unit."""

_UNDECIDED = np.iinfo(np.int32).min
_MAX_TABLE_MU = (
    1e5  # above it, draws are sums of draws with an equal part of mu: tables stay below 10^5 entries
)


class TableSampler:
    """Draws from a law on the integers by exact inversion of its distribution function.

    Args:
        thresholds: Gives, for a number of bits, the distribution function in that fixed point.
        label: Name of the law, for a report.
    """

    total_variation = 0.0
    """Distance between the law of a draw and the stated law, given uniform bits."""

    def __init__(self, thresholds: Callable[[int], Thresholds], label: str) -> None:
        self.label = label
        self._thresholds = lru_cache(maxsize=8)(thresholds)
        self._first, table = self._thresholds(64)
        if len(table) > 1 << 24:
            raise InputError("the law is too wide for a table", field=label, value=len(table))
        cut = np.array([min(t, (1 << 64) - 1) for t in table], np.uint64)
        self._low = np.array([max(t - 1, 0) for t in table], np.uint64)  # a draw below _low[i] is ≤ value i
        self._high = np.minimum(cut, np.uint64((1 << 64) - 2)) + np.uint64(1)  # a draw above _high[i] is not
        bucket = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
        above = np.searchsorted(self._high, bucket, "left")
        maybe = np.searchsorted(self._low, bucket + np.uint64((1 << 48) - 1), "right")
        self._guide = np.where(
            (above == maybe) & (maybe < len(table)), above + self._first, _UNDECIDED
        ).astype(np.int32)

    def sample(self, source: RandomSource, count: int) -> Int32[np.ndarray, " count"]:
        """Return `count` independent draws."""
        prefix = words16(source, count)
        out = self._guide[prefix]
        undecided = np.flatnonzero(out == _UNDECIDED)
        if undecided.size:
            out[undecided] = self._sample_64(source, prefix[undecided])
        return out

    def _sample_64(self, source: RandomSource, prefix: np.ndarray) -> np.ndarray:
        word = prefix.astype(np.uint64) << np.uint64(48)
        tail = source.octets(6 * prefix.size).reshape(-1, 6)
        for place in range(6):
            word |= tail[:, place].astype(np.uint64) << np.uint64(8 * place)
        above = np.searchsorted(self._high, word, "left")
        maybe = np.searchsorted(self._low, word, "right")
        out = above + self._first
        for index in np.flatnonzero((above != maybe) | (maybe == len(self._low))):
            out[index] = self._resolve(source, int(word[index]), 64)
        return out

    def _resolve(self, source: RandomSource, prefix: int, bits: int) -> int:
        """Return the draw whose uniform number starts with `prefix`; read bits until it is certain."""
        while True:
            prefix = prefix << bits | int.from_bytes(source.octets(bits // 8).tobytes(), "little")
            bits *= 2
            first, table = self._thresholds(bits)
            above = bisect_left(table, prefix - 1)  # thresholds certainly below the uniform number
            maybe = bisect_right(table, prefix + 1)
            if above == maybe < len(table):
                return first + above


@lru_cache(maxsize=32)
def skellam_table(mu: Fraction) -> TableSampler:
    """Return the exact table sampler of Sk(mu), 0 < mu ≤ 100000.

    >>> from smm_dp.randomness import seeded_source
    >>> draws = skellam_table(Fraction(119, 20)).sample(seeded_source(0), 100_000)
    >>> bool(abs(draws.var() / (2 * 5.95) - 1) < 0.02)
    True
    """
    if not 0 < mu <= _MAX_TABLE_MU:
        raise InputError(f"a table needs 0 < mu <= {_MAX_TABLE_MU:g}", field="mu", value=float(mu))
    return TableSampler(lambda bits: skellam.cumulative_thresholds(mu, bits), f"Sk({float(mu):.6g})")


def sample_skellam(mu: Fraction, count: int, source: RandomSource) -> Int64[np.ndarray, " count"]:
    """Return `count` exact draws of Sk(mu) by the table; mu = 0 gives zeros.

    Large mu is split into equal parts whose draws are added: Skellam laws are closed under addition.

    Args:
        mu: Exact rational parameter of this participant, not negative. Variance is 2·mu.
        count: Number of draws.
        source: Where the bits come from.
    """
    if mu < 0:
        raise InputError("the Skellam parameter cannot be negative", field="mu", value=float(mu))
    out = np.zeros(count, np.int64)
    if mu == 0:
        return out
    parts = math.ceil(mu / Fraction(_MAX_TABLE_MU))
    table = skellam_table(mu / parts)
    for _ in range(parts):
        out += table.sample(source, count)
    return out


def sample_poisson_one(reader: IntegerReader) -> int:
    """Return a draw of Poisson(1) (Duchon and Duvignau 2016, algorithm 1), from uniform integers only."""
    n, g, k = 1, 0, 1
    while True:
        i = 1 + reader.below(n + 1)
        if i == n + 1:
            k += 1
        elif i > g:
            k -= 1
            g = n + 1
        else:
            return k
        n += 1


def sample_poisson_exact(mu: Fraction, reader: IntegerReader) -> int:
    """Return a draw of Poisson(mu): whole parts added, the rest by thinning (Devroye 1986, p. 487)."""
    whole, rest = divmod(mu, 1)
    total = sum(sample_poisson_one(reader) for _ in range(whole))
    if rest:
        for _ in range(sample_poisson_one(reader)):
            total += reader.below(rest.denominator) < rest.numerator
    return total


def sample_skellam_exact(mu: Fraction, count: int, source: RandomSource) -> Int64[np.ndarray, " count"]:
    """Return `count` draws of Sk(mu) by the paper's authors' construction: 10^4 a second."""
    reader = IntegerReader(source)
    draws = (sample_poisson_exact(mu, reader) - sample_poisson_exact(mu, reader) for _ in range(count))
    return np.fromiter(draws, np.int64, count)


def simulate_skellam(mu: float, count: int, generator: np.random.Generator) -> Int64[np.ndarray, " count"]:
    """Return `count` floating-point Poisson differences: simulation only, not exact, not secure."""
    return generator.poisson(mu, count) - generator.poisson(mu, count)


def _bernoulli_exp(numerator: int, denominator: int, reader: IntegerReader) -> bool:
    """Return True with probability exp(−numerator/denominator) (Canonne et al. 2020, algorithm 1)."""
    for _ in range(numerator // denominator):
        if not _bernoulli_exp_small(1, 1, reader):
            return False
    return _bernoulli_exp_small(numerator % denominator, denominator, reader)


def _bernoulli_exp_small(numerator: int, denominator: int, reader: IntegerReader) -> bool:
    k = 1
    while reader.below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def _discrete_laplace(scale: int, reader: IntegerReader) -> int:
    """Return z with mass ∝ exp(−|z|/scale) (Canonne, Kamath, Steinke 2020, algorithm 2)."""
    while True:
        low = reader.below(scale)
        if not _bernoulli_exp_small(low, scale, reader):
            continue
        high = 0
        while _bernoulli_exp_small(1, 1, reader):
            high += 1
        magnitude = low + scale * high
        if reader.below(2):
            return magnitude
        if magnitude:
            return -magnitude


def sample_discrete_gaussian_exact(
    variance: Fraction, count: int, source: RandomSource
) -> Int64[np.ndarray, " count"]:
    """Return draws with mass ∝ exp(−z²/(2·variance)) (Canonne, Kamath, Steinke 2020, algorithm 3).

    Integers only, slow; `discrete_gaussian_table` draws the same law fast.
    """
    if variance <= 0:
        raise InputError("the variance must be positive", field="variance", value=float(variance))
    scale = math.isqrt(math.floor(variance)) + 1
    out = np.empty(count, np.int64)
    reader = IntegerReader(source)
    for index in range(count):
        while True:
            z = _discrete_laplace(scale, reader)
            # (|z| − variance/scale)² / (2 variance)
            exponent = (abs(z) - variance / scale) ** 2 / (2 * variance)
            if _bernoulli_exp(exponent.numerator, exponent.denominator, reader):
                out[index] = z
                break
    return out


@lru_cache(maxsize=32)
def discrete_gaussian_table(variance: Fraction) -> TableSampler:
    """Return the exact table sampler of the discrete Gaussian with parameter `variance` (σ²)."""
    if not 0 < variance <= 10**8:
        raise InputError("a table needs 0 < variance <= 1e8", field="variance", value=float(variance))

    def thresholds(bits: int) -> Thresholds:
        from mpmath import exp, mpf, workprec

        radius = math.ceil(math.sqrt(2 * float(variance) * (bits + 10) * math.log(2))) + 1
        with workprec(bits + 96):
            step = mpf(variance.denominator) / (2 * variance.numerator)
            weights = [int(exp(-step * z * z) * 2 ** (bits + 80)) for z in range(radius + 1)]
        return -radius, _cumulate(weights[:0:-1] + weights, bits)

    return TableSampler(thresholds, f"discrete Gaussian({float(variance):.6g})")


@lru_cache(maxsize=32)
def binomial_table(trials: int) -> TableSampler:
    """Return the exact table sampler of Bin(trials, 1/2) − trials/2, the noise of cpSGD; `trials` is even."""
    if trials < 2 or trials % 2 or trials > 10**6:
        raise InputError("expected an even number of trials in 2..1000000", field="trials", value=trials)

    def thresholds(bits: int) -> Thresholds:
        centre = trials // 2
        radius = min(centre, math.ceil(math.sqrt(trials * (bits + 10) * math.log(2) / 2)) + 1)  # Hoeffding
        weight, weights = 1 << (bits + 80), []
        for z in range(radius + 1):  # C(trials, centre+z) relative to the middle
            weights.append(weight)
            weight = weight * (centre - z) // (centre + z + 1)
        table = _cumulate(weights[:0:-1] + weights, bits)
        return -radius, [
            *table,
            1 << bits,
        ] if radius == centre else table  # the support ends: P(Z <= last) = 1

    return TableSampler(thresholds, f"Bin({trials}, 1/2) - {trials // 2}")


def _cumulate(weights: list[int], bits: int) -> list[int]:
    total = sum(weights)
    out, running = [], 0
    for weight in weights:
        running += weight
        out.append((running << bits) // total)
    return out[:-1]
