"""The measurements behind the proof and the `simulate` command: every mechanism at one budget."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float

from shared_core import InputError
from smm_dp.baselines import RoundedMechanism, calibrate_baseline
from smm_dp.calibration import calibrate
from smm_dp.mechanism import SkellamMixture
from smm_dp.randomness import seeded_source
from smm_dp.simulation import SimulatedSum, gaussian_sum, noisy_total, read_total, sum_errors
from smm_dp.training import Release, seeded_release

Method = Literal["smm-dp", "smm-dp-numeric", "skellam", "ddgauss", "cpsgd", "gaussian", "none"]
INTEGER_METHODS: tuple[Method, ...] = ("smm-dp", "smm-dp-numeric", "skellam", "ddgauss")


@dataclass(frozen=True)
class Setting:
    """The budget and the shape of the data, equal for all mechanisms that are compared."""

    epsilon: float
    delta: float
    dim: int
    participants: int
    sampling_rate: float = 1.0
    rounds: int = 1
    l2_norm: float = 1.0


@lru_cache(maxsize=512)  # a calibration each; seeds and numbers of bits share it
def build(
    method: Method, scale: float, bits: int, setting: Setting, rotation_seed: int = 0
) -> SkellamMixture | RoundedMechanism:
    """Return a mechanism with the least noise that the setting's budget allows; c = (γΔ₂)²."""
    s = setting
    if method in ("smm-dp", "smm-dp-numeric"):
        accounting = "numeric" if method.endswith("numeric") else "paper"
        clip = (scale * s.l2_norm) ** 2
        found = calibrate(
            s.epsilon, s.delta, clip, scale, s.sampling_rate, s.rounds, accounting, dim=s.dim,
            participants=s.participants, modulus_bits=bits,
        )  # fmt: skip
        return SkellamMixture(
            s.dim,
            clip,
            scale,
            bits,
            found.mu_total,
            s.participants,
            found.coordinate_bound,
            accounting,
            rotation_seed,
        )
    if method not in ("skellam", "ddgauss", "cpsgd"):
        raise InputError("has no integer mechanism", field="method", value=method)
    variance = calibrate_baseline(
        method, s.epsilon, s.delta, l2_norm=s.l2_norm, scale=scale, dim=s.dim, participants=s.participants,
        sampling_rate=s.sampling_rate, rounds=s.rounds,
    )  # fmt: skip
    return RoundedMechanism(method, s.dim, s.l2_norm, scale, bits, variance, s.participants, rotation_seed)


def gaussian_sd(setting: Setting) -> float:
    """Return the central Gaussian's standard deviation for the setting, in the vectors' units."""
    s = setting
    return math.sqrt(
        calibrate_baseline(
            "gaussian",
            s.epsilon,
            s.delta,
            l2_norm=s.l2_norm,
            scale=1.0,
            dim=s.dim,
            participants=s.participants,
            sampling_rate=s.sampling_rate,
            rounds=s.rounds,
        )
    )


def noise_sd(mechanism: SkellamMixture | RoundedMechanism) -> float:
    """Return the standard deviation of the summed noise in grid units."""
    if isinstance(mechanism, SkellamMixture):
        return math.sqrt(2 * mechanism.mu_total)
    return math.sqrt(mechanism.variance_total)


def deciding_bits(setting: Setting, scales: Sequence[float]) -> int:
    """Return the most bits at which the baselines' noise does not fit: 3σ > m/2 at every scale.

    The baseline is taken at its best: the scale with the smallest noise counts.
    """
    smallest = min(noise_sd(build("skellam", scale, 16, setting)) for scale in scales)
    return math.ceil(math.log2(2 * 3 * smallest)) - 1


@dataclass(frozen=True)
class SumPoint:
    """Errors of a sum at one number of bits, one scale, one seed."""

    method: str
    bits: int
    scale: float
    seed: int
    errors: dict[str, float]
    wrap_rate: float


def measure_sums(
    setting: Setting,
    vectors: Callable[[int], Float[np.ndarray, "n dim"]],
    *,
    methods: Iterable[Method],
    scales: Sequence[float],
    bits: Sequence[int],
    seeds: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> list[SumPoint]:
    """Return errors for every method, scale, number of bits and seed; `tick` is called after each sum.

    The sum before the modulus does not depend on the bits, so it is drawn once for all of them.
    """
    data = {seed: vectors(seed) for seed in seeds}
    points = []
    for method in methods:
        for scale in scales:
            mechanism = build(method, scale, 16, setting)
            for seed, rows in data.items():
                total, _ = noisy_total(mechanism, rows, seeded_source(seed, f"{method}/{scale}"))
                truth = rows.sum(axis=0)
                for width in bits:
                    estimate, wrapped = read_total(mechanism, total, width)
                    points.append(SumPoint(method, width, scale, seed, sum_errors(estimate, truth), wrapped))
                tick()
    return points


def measure_gaussian_sums(
    setting: Setting, vectors: Callable[[int], Float[np.ndarray, "n dim"]], seeds: Sequence[int]
) -> list[dict[str, float]]:
    """Return the central Gaussian's errors, one for each seed."""
    sd = gaussian_sd(setting)
    out = []
    for seed in seeds:
        rows = vectors(seed)
        result = gaussian_sum(rows, setting.l2_norm, sd, np.random.default_rng([seed, 7]))
        out.append(sum_errors(result.estimate, rows.sum(axis=0)))
    return out


def best_scale(points: Iterable[SumPoint], method: str, bits: int, metric: str = "nmse") -> list[SumPoint]:
    """Return the points, one a seed, of the scale that is best on average for a method and number of bits."""
    groups: dict[float, list[SumPoint]] = {}
    for point in points:
        if (point.method, point.bits) == (method, bits):
            groups.setdefault(point.scale, []).append(point)
    sign = -1 if metric in ("cosine", "slope") else 1  # the larger the better
    return min(groups.values(), key=lambda group: sum(sign * point.errors[metric] for point in group))


def fitting_scale(points: Iterable[SumPoint], method: str, bits: int, limit: float = 0.01) -> list[SumPoint]:
    """Return the points of the scale with the smallest MSE among those that hardly wrap.

    Sums that wrap all over have a small MSE and say nothing, so MSE alone must not choose. Where every scale
    wraps more than `limit`, the one that wraps least is returned.
    """
    groups: dict[float, list[SumPoint]] = {}
    for point in points:
        if (point.method, point.bits) == (method, bits):
            groups.setdefault(point.scale, []).append(point)
    wraps = {scale: sum(p.wrap_rate for p in group) / len(group) for scale, group in groups.items()}
    fitting = [groups[scale] for scale, rate in wraps.items() if rate <= limit]
    if not fitting:
        return groups[min(wraps, key=lambda scale: wraps[scale])]
    return min(fitting, key=lambda group: sum(p.errors["mse"] for p in group))


def training_release(
    method: Method, setting: Setting, seed: int, *, scale: float = 16.0, bits: int = 8
) -> Release:
    """Return a training run's release: a fresh public rotation every round, seeded noise."""
    if method == "none":
        return lambda number, rows: SimulatedSum(rows.sum(axis=0).astype(np.float64), 0.0, 0.0, "no noise")
    if method == "gaussian":
        sd, generator = gaussian_sd(setting), np.random.default_rng([seed, 11])
        return lambda number, rows: gaussian_sum(rows, setting.l2_norm, sd, generator)
    return seeded_release(build(method, scale, bits, setting), seed, f"training/{method}")
