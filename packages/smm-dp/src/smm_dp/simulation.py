"""Sums of many participants in one process, for experiments: the same law as the protocol, far faster.

The sum of n participants' noise is drawn once, as Sk(μ) for the total μ, which has exactly the law of the
sum (the discrete Gaussian's sum is drawn share by share: it is not closed under addition). Vectors are
rounded one by one. Secure aggregation would reveal exactly this sum, so it is left out. Clipping and wrap
rates
are computed from private data: they are for experiments and are not themselves private.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Float64, Int64

from smm_dp.baselines import RoundedMechanism, conditional_round, rounded_norm_bound
from smm_dp.mechanism import SkellamMixture, inverse_second_moment, second_moment, stochastic_round
from smm_dp.packing import centre, wrap
from smm_dp.randomness import RandomSource
from smm_dp.rotation import hadamard_transform, rotation_signs, unrotate
from smm_dp.samplers import binomial_table, discrete_gaussian_table, sample_skellam

_ENTRIES = 1 << 21  # numbers of participants' vectors that are held at once


@dataclass(frozen=True)
class SimulatedSum:
    """An estimated sum, and what happened on the way. The rates are not private."""

    estimate: Float64[np.ndarray, " dim"]
    clip_rate: float
    """Share of participants whose vector was shrunk by clipping."""
    wrap_rate: float
    """Share of coordinates whose sum left (−m/2, m/2]."""
    sampler: str


def simulate_sum(
    mechanism: SkellamMixture | RoundedMechanism, vectors: Float[np.ndarray, "n dim"], source: RandomSource
) -> SimulatedSum:
    """Return what the server would decode from one round with these participants.

    Args:
        mechanism: The mechanism of the round; its total noise is added, however many vectors there are.
        vectors: One row a participant; may be empty (a Poisson sample can be).
        source: Random bits.
    """
    total, clip_rate = noisy_total(mechanism, vectors, source)
    estimate, wrap_rate = read_total(mechanism, total, mechanism.modulus_bits)
    return SimulatedSum(estimate, clip_rate, wrap_rate, f"{source.label}; one draw of the summed noise")


def noisy_total(
    mechanism: SkellamMixture | RoundedMechanism, vectors: Float[np.ndarray, "n dim"], source: RandomSource
) -> tuple[Int64[np.ndarray, " d"], float]:
    """Return the noisy integer sum before the modulus, and the share of clipped participants."""
    d = mechanism.padded_dim
    signs = rotation_signs(mechanism.rotation_seed, d)[: mechanism.dim] * (mechanism.scale / math.sqrt(d))
    total = np.zeros(d, np.int64)
    clipped_rows = 0
    rows = max(1, _ENTRIES // d)
    for start in range(0, len(vectors), rows):
        part = np.zeros((len(vectors[start : start + rows]), d))
        np.multiply(vectors[start : start + rows], signs, out=part[:, : mechanism.dim])
        hadamard_transform(part)
        clipped_rows += _clip_rows(mechanism, part)
        total += _round_rows(mechanism, part, source)
    return total + _noise(mechanism, source), clipped_rows / max(1, len(vectors))


def read_total(
    mechanism: SkellamMixture | RoundedMechanism, total: Int64[np.ndarray, " d"], bits: int
) -> tuple[Float64[np.ndarray, " dim"], float]:
    """Return what is decoded of a sum modulo 2^bits, and the share of wrapped coordinates."""
    centred = centre(wrap(total, bits), bits)
    estimate = unrotate(centred / mechanism.scale, mechanism.rotation_seed, mechanism.dim)
    return estimate, float(np.mean(centred != total))


def _clip_rows(mechanism: SkellamMixture | RoundedMechanism, rows: Float64[np.ndarray, "n d"]) -> int:
    """Clip in place as the mechanism does; return how many rows were shrunk."""
    if isinstance(mechanism, RoundedMechanism):
        bound, moments = (mechanism.scale * mechanism.l2_norm) ** 2, None
    else:
        bound, moments = mechanism.clip, second_moment(rows) if mechanism.accounting == "paper" else None
    totals = (rows * rows if moments is None else moments).sum(axis=1)
    over = totals > bound
    factor = np.where(over, bound * (1 - 1e-11) / np.maximum(totals, 1e-300), 1.0)[:, None]
    if moments is None:
        rows *= np.sqrt(factor)
    else:
        rows[over] = np.copysign(inverse_second_moment(moments[over] * factor[over]), rows[over])
    if isinstance(mechanism, SkellamMixture):
        np.clip(rows, -mechanism.coordinate_bound, mechanism.coordinate_bound, out=rows)
    return int(over.sum())


def _round_rows(
    mechanism: SkellamMixture | RoundedMechanism, rows: Float64[np.ndarray, "n d"], source: RandomSource
) -> Int64[np.ndarray, " d"]:
    if isinstance(mechanism, RoundedMechanism):
        bound = rounded_norm_bound(mechanism.scale * mechanism.l2_norm, mechanism.padded_dim)
        drawn = [conditional_round(row, bound, source) for row in rows]
        return np.asarray(np.sum(drawn, axis=0, dtype=np.int64))
    rounded = stochastic_round(rows.reshape(-1), source).reshape(rows.shape)
    return np.asarray(rounded.sum(axis=0))


def _noise(mechanism: SkellamMixture | RoundedMechanism, source: RandomSource) -> Int64[np.ndarray, " d"]:
    d = mechanism.padded_dim
    if isinstance(mechanism, SkellamMixture):
        return sample_skellam(Fraction(mechanism.mu_total), d, source)
    each = Fraction(mechanism.variance_total) / mechanism.participants
    if mechanism.kind == "skellam":
        return sample_skellam(Fraction(mechanism.variance_total) / 2, d, source)
    table = (
        discrete_gaussian_table(each)
        if mechanism.kind == "ddgauss"
        else binomial_table(2 * math.ceil(2 * each))
    )
    total = np.zeros(d, np.int64)
    for _ in range(mechanism.participants):
        total += table.sample(source, d)
    return total


def gaussian_sum(
    vectors: Float[np.ndarray, "n dim"], l2_norm: float, sd: float, generator: np.random.Generator
) -> SimulatedSum:
    """Return the central Gaussian mechanism's sum of L2-clipped vectors: no rounding, no modulus."""
    norms = np.linalg.norm(vectors, axis=1)
    over = norms > l2_norm
    factor = np.where(over, l2_norm / np.maximum(norms, 1e-300), 1.0)
    total = factor @ vectors if len(vectors) else np.zeros(vectors.shape[1])
    noise = generator.normal(0.0, sd, vectors.shape[1])
    return SimulatedSum(
        total + noise, float(over.sum()) / max(1, len(vectors)), 0.0, "float64 Gaussian (simulation only)"
    )


def sum_errors(estimate: Float64[np.ndarray, " dim"], truth: Float64[np.ndarray, " dim"]) -> dict[str, float]:
    """Return MSE and what keeps it honest: NMSE (1 is what answering zero gets), cosine, slope on the truth.

    >>> sum_errors(np.zeros(3), np.ones(3))["nmse"]
    1.0
    """
    error = float(np.mean((estimate - truth) ** 2))
    power = float(np.mean(truth**2))
    norms = float(np.linalg.norm(estimate) * np.linalg.norm(truth))
    return {
        "mse": error,
        "nmse": error / power if power else math.inf,
        "cosine": float(estimate @ truth) / norms if norms else 0.0,
        "slope": float(estimate @ truth / (truth @ truth)) if power else 0.0,
    }


def coherent_vectors(n: int, dim: int, seed: int) -> Float64[np.ndarray, "n dim"]:
    """Return unit vectors with a common heavy-tailed direction: normalise(direction + N(0, I/dim)).

    Their sum is far from zero, so that errors of it mean something.
    """
    generator = np.random.default_rng(seed)
    direction = generator.standard_t(3, dim)
    direction /= np.linalg.norm(direction)
    vectors = direction + generator.standard_normal((n, dim)) / math.sqrt(dim)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sphere_vectors(n: int, dim: int, seed: int) -> Float64[np.ndarray, "n dim"]:
    """Return vectors uniform on the unit sphere: the paper's data. Their sum is small (mean square n/dim)."""
    vectors = np.random.default_rng(seed).standard_normal((n, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
