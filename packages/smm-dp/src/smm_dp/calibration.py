"""From a privacy budget to noise, and from noise to bits: the numbers a user has to choose."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from shared_core import InputError
from smm_dp.mechanism import Accounting, clip_mixture
from smm_dp.numeric import MU_RANGE
from smm_dp.packing import MAX_BITS, MIN_BITS, check_bits
from smm_dp.privacy import Accountant, AccountingWarning, Adjacency, Observer, RoundPrivacy
from smm_dp.rdp import ORDERS, Guarantee, paper_coordinate_bound, poisson_sampled, to_epsilon
from smm_dp.rotation import padded_dimension


@dataclass(frozen=True)
class Parameters:
    """A consistent set: noise, the order that proves it, and the coordinate bound that this order allows."""

    guarantee: Guarantee
    round_privacy: RoundPrivacy
    rounds: int
    scale: float
    mu_total: float
    order: int
    coordinate_bound: float
    noise_sd: float
    """Standard deviation of the noise in a sum, per coordinate, in units of the participants' vectors."""
    shrinkage: float
    """What clipping leaves of a rotated vector with the L2 norm √clip/scale: 1 is all of it."""
    modulus_bits: int
    """The bits asked for, or the fewest whose wrap rate is below 0.1 %."""
    wrap_rate: float
    """Expected share of coordinates whose sum leaves (−m/2, m/2] at `modulus_bits`."""


def check_budget(epsilon: float, delta: float, population: int | None = None) -> None:
    """Refuse an impossible budget; warn of a delta that is large for the number of people.

    Raises:
        InputError: epsilon ≤ 0 or delta outside (0, 1).

    Warns:
        AccountingWarning: delta > 1/population.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise InputError("expected a positive finite number", field="epsilon", value=epsilon)
    if not 0 < delta < 1:
        raise InputError("delta must lie strictly between 0 and 1", field="delta", value=delta)
    if population is not None and delta > 1 / population:
        warnings.warn(
            f"delta {delta:g} is above 1/{population}: such a guarantee allows one participant's "
            "data to be published",
            AccountingWarning,
            stacklevel=3,
        )


def squared_norm(scale: float, norm: float) -> float:
    """Return c = (scale · norm)², the clip bound for vectors of an L2 norm.

    Raises:
        InputError: One of them is not positive, or the square is no finite number.
    """
    for field, value in (("scale", scale), ("norm", norm)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError("expected a positive finite number", field=field, value=value)
    if scale * norm > 2.0**53:
        raise InputError(
            "scaled by this, vectors have no exact integers in float64", field="scale", value=scale
        )
    return (scale * norm) ** 2


def smallest_noise(
    epsilon_of: Callable[[float], float], target: float, start: float, tolerance: float = 1e-7
) -> float:
    """Return the smallest noise with epsilon_of(noise) ≤ target, for a function that falls with the noise.

    Brackets from `start` by doubling, then bisects on the logarithm, with secant steps where they help. The
    result itself satisfies the target.

    Args:
        epsilon_of: Epsilon as a function of the noise; infinite where nothing is proved.
        target: Epsilon wanted.
        start: Any positive guess.
        tolerance: Relative accuracy of the noise.

    Raises:
        InputError: No noise up to 2^60 times the guess reaches the target.
    """
    low = high = math.log(start)
    value_low = value_high = epsilon_of(start)
    step = 0.01
    while value_high > target:
        low, value_low = high, value_high
        high, step = high + step, 2 * step
        if high - math.log(start) > 60 * math.log(2):
            raise InputError(
                "no amount of noise reaches this epsilon; raise epsilon or delta",
                field="epsilon",
                value=target,
            )
        value_high = epsilon_of(math.exp(high))
    step = 0.01
    while value_low <= target:
        high, value_high = low, value_low
        low, step = low - step, 2 * step
        if math.log(start) - low > 60 * math.log(2):
            return math.exp(high)
        value_low = epsilon_of(math.exp(low))
    for count in range(200):
        if high - low <= tolerance:
            break
        middle = (low + high) / 2
        if count % 3 and math.isfinite(value_low):
            middle = low + (high - low) * (value_low - target) / (value_low - value_high)
            edge = min(tolerance / 3, (high - low) / 3)  # aim just beyond the root, so that both ends move
            middle = min(max(middle + (edge if count % 3 == 1 else -edge), low + edge), high - edge)
        value = epsilon_of(math.exp(middle))
        if value <= target:
            high, value_high = middle, value
        else:
            low, value_low = middle, value
    return math.exp(high)


def wrap_probability(mu: float, bits: int, *, participants: int = 0, signal_sd: float = 0.0) -> float:
    """Return the expected share of coordinates of a sum that leave (−m/2, m/2], in normal approximation.

    Args:
        mu: Total Skellam parameter.
        bits: b, m = 2^b.
        participants: Number of roundings in the sum, each of variance up to 1/4.
        signal_sd: Spread of the noiseless sum's coordinates in grid units, scale·‖Σx‖₂/√d after rotation.

    >>> round(wrap_probability(1428.0, 8), 3)  # the official MNIST setting: 2.4 standard deviations
    0.017
    """
    sd = math.sqrt(2 * mu + participants / 4 + signal_sd**2)
    half = 2.0 ** (bits - 1)
    return float(ndtr(-(half + 0.5) / sd) + ndtr(-(half - 0.5) / sd)) if sd > 0 else 0.0


def smallest_bits(
    mu: float, *, participants: int = 0, signal_sd: float = 0.0, wrap_rate: float = 1e-3
) -> int:
    """Return the fewest bits whose expected wrap rate is at most `wrap_rate`.

    Raises:
        InputError: 32 bits are not enough.
    """
    for bits in range(MIN_BITS, MAX_BITS + 1):
        if wrap_probability(mu, bits, participants=participants, signal_sd=signal_sd) <= wrap_rate:
            return bits
    raise InputError(f"no modulus up to 2^{MAX_BITS} holds this noise: lower the scale", field="mu", value=mu)


def check_modulus(
    mu: float, bits: int, *, participants: int = 0, signal_sd: float = 0.0, limit: float = 0.5
) -> float:
    """Return the expected wrap rate, and refuse a modulus at which hardly anything can be read.

    Raises:
        InputError: The rate is above `limit`; says the rate and the fewest bits that work.
    """
    rate = wrap_probability(mu, bits, participants=participants, signal_sd=signal_sd)
    if rate > limit:
        enough = smallest_bits(mu, participants=participants, signal_sd=signal_sd)
        raise InputError(
            f"the noise does not fit: {rate:.0%} of the coordinates would wrap; {enough} bits are enough",
            field="modulus_bits",
            value=bits,
        )
    return rate


def expected_shrinkage(
    clip: float, dim: int, accounting: Accounting, coordinate_bound: float = math.inf
) -> float:
    """Return what clipping leaves of a rotated vector whose scaled L2 norm is √clip (slope on the input).

    Mixture clipping bounds Σφ(x) ≥ Σx², so it shrinks a vector of that norm, more so the smaller its
    coordinates are against the grid. The coordinates of a rotated vector are taken as normal.

    >>> [round(expected_shrinkage(scale**2, 65536, "paper"), 2) for scale in (64.0, 4.0)]
    [0.31, 0.02]
    """
    count = 8191
    x = ndtri((np.arange(count) + 0.5) / count) * math.sqrt(clip / padded_dimension(dim))
    share = clip * count / padded_dimension(dim)
    clipped = np.clip(
        clip_mixture(x, share) if accounting == "paper" else x, -coordinate_bound, coordinate_bound
    )
    return float(clipped @ x / (x @ x))


def calibrate(
    epsilon: float,
    delta: float,
    clip: float,
    scale: float,
    sampling_rate: float,
    rounds: int,
    accounting: Accounting,
    *,
    dim: int,
    participants: int,
    coordinate_bound: float | None = None,
    modulus_bits: int | None = None,
    adjacency: Adjacency = "zero-out",
    observer: Observer = "model-release",
    population: int | None = None,
) -> Parameters:
    """Return the least noise that keeps `rounds` rounds within (epsilon, delta), and what follows.

    Args:
        epsilon: Budget of all rounds together.
        delta: Budget, in (0, 1).
        clip: c in grid units squared; usually (scale · L2 norm)².
        scale: γ.
        sampling_rate: q of Poisson sampling; 1 for everybody in each round.
        rounds: T.
        accounting: "paper" or "numeric".
        dim: Length of the vectors.
        participants: (Expected) number in a round.
        coordinate_bound: Δ∞. Where None, paper accounting takes the largest integer that the best order
            allows, numeric accounting six standard deviations of a rotated vector's coordinate.
        modulus_bits: Bits to report the wrap rate for; where None the fewest with a rate below 0.1 %.
        adjacency: See `RoundPrivacy`.
        observer: See `RoundPrivacy`.
        population: Number of people, to judge delta by.

    Raises:
        InputError: A value is out of range or the budget cannot be reached; says what would do.

    >>> found = calibrate(8, 1e-5, clip=4096, scale=64, sampling_rate=1, rounds=1, accounting="paper",
    ...                   dim=65536, participants=100)
    >>> round(2 * found.mu_total / 4096, 4), found.order
    (0.5904, 4)
    """
    check_budget(epsilon, delta, population)
    for field, value in (("clip", clip), ("scale", scale)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError("expected a positive finite number", field=field, value=value)
    for field, value in (("rounds", rounds), ("dim", dim), ("participants", participants)):
        if value < 1:
            raise InputError("expected at least 1", field=field, value=value)
    if modulus_bits is not None:
        check_bits(modulus_bits)
    d = padded_dimension(dim)
    if accounting == "numeric" and coordinate_bound is None:
        coordinate_bound = min(math.ceil(math.sqrt(clip)), math.ceil(6 * math.sqrt(clip / d)))
    fixed = coordinate_bound or 1

    def round_at(mu: float) -> RoundPrivacy:
        return RoundPrivacy(clip, mu, fixed, accounting, sampling_rate, adjacency, observer)

    rate = round_at(1.0).effective_rate
    start, order = _gaussian_start(epsilon, delta, clip, rate, rounds)
    top = ORDERS[-1] if accounting == "paper" else min(128, 2 * order + 8)

    def guarantee(mu: float) -> Guarantee:
        return to_epsilon(range(2, top + 1), rounds * round_at(mu).rdp(top), delta)

    def epsilon_of(mu: float) -> float:
        if accounting == "numeric" and mu > MU_RANGE[1]:
            raise InputError(
                f"this budget needs noise of mu above {MU_RANGE[1]:g}, beyond numeric accounting: lower the "
                "scale, or use paper accounting",
                field="scale",
                value=scale,
            )
        try:
            return guarantee(mu).epsilon
        except InputError:  # no order is allowed at this mu: more noise is needed
            return math.inf

    mu = smallest_noise(epsilon_of, epsilon, start)
    while (found := _accounted(round_at(mu), rounds, delta)).epsilon > epsilon:
        mu *= 1 + 1e-9  # tables of all orders round differently in the last digits
    if coordinate_bound is None:
        reach = 2 if adjacency == "replace-one" else 1
        coordinate_bound = math.floor(paper_coordinate_bound(found.order, mu) / reach)
    chosen = RoundPrivacy(clip, mu, coordinate_bound, accounting, sampling_rate, adjacency, observer)
    signal_sd = math.sqrt(participants * clip / d)
    bits = modulus_bits or smallest_bits(mu, participants=participants, signal_sd=signal_sd)
    return Parameters(
        guarantee=found,
        round_privacy=chosen,
        rounds=rounds,
        scale=scale,
        mu_total=mu,
        order=found.order,
        coordinate_bound=coordinate_bound,
        noise_sd=math.sqrt(2 * mu) / scale,
        shrinkage=expected_shrinkage(clip, dim, accounting, coordinate_bound),
        modulus_bits=bits,
        wrap_rate=wrap_probability(mu, bits, participants=participants, signal_sd=signal_sd),
    )


def _accounted(kind: RoundPrivacy, rounds: int, delta: float) -> Guarantee:
    accountant = Accountant()
    accountant.add(kind, rounds)
    return accountant.guarantee(delta, warn=False)


def _gaussian_start(epsilon: float, delta: float, clip: float, rate: float, rounds: int) -> tuple[float, int]:
    """Return mu and order for Gaussian noise of the same variance: a close lower bound to start from."""
    orders = np.arange(2, 129)

    def guarantee(mu: float) -> Guarantee:
        return to_epsilon(orders.tolist(), rounds * poisson_sampled(orders * clip / (4 * mu), rate), delta)

    mu = smallest_noise(lambda value: guarantee(value).epsilon, epsilon, clip, tolerance=1e-3)
    return mu, guarantee(mu).order
