"""The Skellam mixture mechanism: what one participant does to a vector, and how the server reads the sum.

One coordinate x of the scaled, rotated and clipped vector becomes Y + Z, where Y is x rounded at random to
a neighbouring integer and Z ~ Sk(μ). Rounding and noise are accounted for together (Bao et al. 2022): what
counts is E[Y²] = φ(x), not the largest integer that Y can be.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, UInt32

from shared_core import InputError
from smm_dp.packing import centre, check_bits, check_residues, wrap
from smm_dp.randomness import RandomSource, secure_source, words16
from smm_dp.rotation import padded_dimension, rotate, unrotate
from smm_dp.samplers import sample_skellam

Accounting = Literal["paper", "numeric"]

_BLOCK = 1 << 15  # coordinates that are worked on while they are in the cache
_CLIP_MARGIN = 1e-11  # clipping aims this much (relatively) below c, so that float rounding cannot exceed c


def second_moment(x: Float[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Return φ(x) = E[Y²] of randomly rounded x: squares of integers, linear in between, even.

    With |x| = k + p, φ = k² + (2k+1)p (φ(x) = |x| up to 1, φ(x) ≥ x²).

    >>> second_moment(np.array([-0.5, 1.0, 1.5, 2.0])).tolist()
    [0.5, 1.0, 2.5, 4.0]
    """
    size = np.abs(np.asarray(x, np.float64))
    k = np.floor(size)
    return k * k + (2 * k + 1) * (size - k)


def inverse_second_moment(v: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Return the x ≥ 0 with φ(x) = v, for v ≥ 0.

    >>> inverse_second_moment(np.array([0.5, 2.5, 4.0])).tolist()
    [0.5, 1.5, 2.0]
    """
    k = np.floor(np.sqrt(v))
    k -= k * k > v  # the square root of a number just below a square may round up to it,
    k += (k + 1) * (k + 1) <= v  # and of a square just below
    return k + (v - k * k) / (2 * k + 1)


def clip_mixture(x: Float[np.ndarray, " d"], bound: float) -> Float64[np.ndarray, " d"]:
    """Shrink every φ(x_i) by one factor so that Σ φ(x_i) ≤ bound; signs stay.

    Args:
        x: Scaled, rotated vector, units of the integer grid.
        bound: c > 0, units of the grid squared.

    >>> float(second_moment(clip_mixture(np.array([3.0, -4.0]), 10.0)).sum().round(6))
    10.0
    """
    total = float(second_moment(x).sum())
    if total <= bound * (1 - _CLIP_MARGIN / 2):
        return x.astype(np.float64)
    factor = bound * (1 - _CLIP_MARGIN) / total
    return np.copysign(inverse_second_moment(second_moment(x) * factor), x)


def clip_norm(x: Float[np.ndarray, " d"], bound: float) -> Float64[np.ndarray, " d"]:
    """Scale `x` so that Σ x_i² ≤ bound: plain L2 clipping, for numeric accounting and the baselines.

    Args:
        x: Vector.
        bound: c = R² > 0, the *squared* norm allowed.
    """
    total = float(np.dot(x, x))
    if total <= bound * (1 - _CLIP_MARGIN / 2):
        return x.astype(np.float64)
    return x * math.sqrt(bound * (1 - _CLIP_MARGIN) / total)


def stochastic_round(x: Float[np.ndarray, " d"], source: RandomSource) -> Int64[np.ndarray, " d"]:
    """Round each entry to a neighbouring integer at random, so that the mean is x.

    Rounding works on |x| = k + p: up with probability p cut to 64 bits. The cut moves the mean towards zero
    by less than 2^−64 and never raises φ, so clip bounds stay true. 16 random bits decide nearly always;
    48 more are read only where they tie.

    Args:
        x: Vector, |x| < 2^53.
        source: Where the bits come from. They must stay private to the participant.
    """
    size = np.abs(np.asarray(x, np.float64))
    k = np.floor(size)
    p = (size - k) * 65536.0  # exact: a power of two
    high = p.astype(np.uint16)
    draw = words16(source, x.size)
    up = draw < high
    ties = np.flatnonzero(draw == high)
    if ties.size:
        rest = ((p[ties] - high[ties]) * 2.0**48).astype(np.uint64)
        tail = np.zeros((ties.size, 8), np.uint8)
        tail[:, :6] = source.octets(6 * ties.size).reshape(-1, 6)
        up[ties] = tail.view("<u8")[:, 0] < rest
    rounded = k.astype(np.int64) + up
    return np.where(np.signbit(x), -rounded, rounded)


@dataclass(frozen=True)
class SkellamMixture:
    """The mechanism of one round, the same object at every participant and at the server.

    Args:
        dim: Length D of the participants' vectors.
        clip: c, the bound of Σφ(x) (paper) or Σx² (numeric) after scaling, in units of the grid squared.
            The usual choice is (scale · L2 norm)². It is part of the privacy guarantee.
        scale: γ, grid steps per unit of the vector.
        modulus_bits: b; sums are known modulo 2^b. Affects utility only.
        mu_total: μ of the summed noise of all participants; its variance is 2μ. 0 adds no noise (tests).
        participants: n, among whom the noise is divided.
        coordinate_bound: Δ∞, bound of |x_i| after scaling. An integer for paper accounting.
        accounting: "paper" clips φ, "numeric" clips the L2 norm. See `smm_dp.rdp`, `smm_dp.numeric`.
        rotation_seed: Public seed of the rotation; one for all participants, fresh each round.

    Raises:
        InputError: A parameter is out of range.

    >>> from smm_dp.randomness import seeded_source
    >>> mechanism = SkellamMixture(3, clip=1e6, scale=100, modulus_bits=16, mu_total=2, participants=2,
    ...                            coordinate_bound=1000)
    >>> rng, x = seeded_source(0), np.array([1.0, 2.0, 3.0])
    >>> total = sum(mechanism.encode(x, rng, secure=False).astype(int) for _ in range(2))
    >>> (mechanism.decode(total.astype(np.uint32) % 2**16) / 2).round().tolist()
    [1.0, 2.0, 3.0]
    """

    dim: int
    clip: float
    scale: float
    modulus_bits: int
    mu_total: float
    participants: int
    coordinate_bound: float
    accounting: Accounting = "paper"
    rotation_seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.modulus_bits)
        for field in ("dim", "participants"):
            if getattr(self, field) < 1:
                raise InputError("expected at least 1", field=field, value=getattr(self, field))
        for field in ("clip", "scale", "coordinate_bound"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise InputError("expected a positive finite number", field=field, value=getattr(self, field))
        if not (self.mu_total >= 0 and math.isfinite(self.mu_total)):
            raise InputError("expected a finite number, 0 or more", field="mu_total", value=self.mu_total)
        if self.accounting not in ("paper", "numeric"):
            raise InputError("expected 'paper' or 'numeric'", field="accounting", value=self.accounting)
        if self.accounting == "paper" and self.coordinate_bound != int(self.coordinate_bound):
            raise InputError(
                "paper accounting needs an integer: a coordinate at 4.7 may be rounded to 5, which "
                "breaks the bound",
                field="coordinate_bound",
                value=self.coordinate_bound,
            )

    @property
    def padded_dim(self) -> int:
        """Number of coordinates sent, d: `dim` padded to a power of two."""
        return padded_dimension(self.dim)

    @property
    def mu_each(self) -> Fraction:
        """Skellam parameter of one participant's noise, exactly mu_total / participants."""
        return Fraction(self.mu_total) / self.participants

    def clipped(
        self, x: Float[np.ndarray, " dim"], participant: str = "participant"
    ) -> Float64[np.ndarray, " d"]:
        """Return the vector in the units of the grid: rotated, scaled, clipped.

        Raises:
            InputError: Wrong length, NaN or infinity (says whose and where), or numbers so large that their
                float type has lost the integers.
        """
        self._check_vector(x, participant)
        y = rotate(x, self.rotation_seed)
        y *= self.scale
        blocks = [y[start : start + _BLOCK] for start in range(0, y.size, _BLOCK)]
        total = math.fsum(self._moment(block) for block in blocks)
        if total > self.clip * (1 - _CLIP_MARGIN / 2):
            factor = self.clip * (1 - _CLIP_MARGIN) / total
            for block in blocks:
                if self.accounting == "numeric":
                    block *= math.sqrt(factor)
                elif np.abs(block).max() <= 1:
                    block *= factor  # φ(x) = |x| up to 1
                else:
                    block[:] = np.copysign(inverse_second_moment(second_moment(block) * factor), block)
        return np.clip(y, -self.coordinate_bound, self.coordinate_bound, out=y)

    def encode(
        self,
        x: Float[np.ndarray, " dim"],
        source: RandomSource | None = None,
        *,
        secure: bool = True,
        participant: str = "participant",
    ) -> UInt32[np.ndarray, " d"]:
        """Return what a participant gives to secure aggregation: noisy residues modulo 2^modulus_bits.

        Args:
            x: The participant's vector, in its own units.
            source: Private random bits; a fresh `secure_source()` where None.
            secure: Refuse a source that is not cryptographic. False is for simulation.
            participant: Name used in errors.

        Raises:
            InputError: As for `clipped`; or `secure` and the source is not.
        """
        source = secure_source() if source is None else source
        if secure and not source.secure:
            raise InputError(
                "a release needs a cryptographic source; pass secure=False for a simulation",
                field="source",
                value=source.label,
            )
        y = self.clipped(x, participant)
        out = np.empty(y.size, np.uint32)
        for start in range(0, y.size, _BLOCK):
            part = stochastic_round(y[start : start + _BLOCK], source)
            part += sample_skellam(self.mu_each, part.size, source)
            out[start : start + _BLOCK] = wrap(part, self.modulus_bits)
        return out

    def decode(
        self, total: Integer[np.ndarray, " d"], count: float | None = None
    ) -> Float64[np.ndarray, " dim"]:
        """Return the estimated sum of the participants' vectors, or their mean.

        Args:
            total: Sum of the residues modulo 2^modulus_bits.
            count: Divides the sum. With Poisson sampling this is the *expected* number qN, a public constant;
                the realised number depends on who was sampled.

        Raises:
            InputError: Not `padded_dim` residues, or a count that is not positive.
        """
        check_residues(total, self.padded_dim, self.modulus_bits, "the aggregator")
        if count is not None and not count > 0:
            raise InputError("expected a positive number", field="count", value=count)
        y = centre(total, self.modulus_bits) / (self.scale * (count or 1.0))
        return unrotate(y, self.rotation_seed, self.dim)

    def _moment(self, block: Float64[np.ndarray, " size"]) -> float:
        """Return what clipping bounds, summed over a block."""
        if self.accounting == "numeric":
            return float(np.dot(block, block))
        size = np.abs(block)
        return float(size.sum() if size.max() <= 1 else second_moment(block).sum())

    def _check_vector(self, x: np.ndarray, participant: str) -> None:
        if x.shape != (self.dim,):
            raise InputError(
                f"{participant} has a vector of shape {x.shape}, expected ({self.dim},)", field="x"
            )
        if not np.isfinite(x).all():
            index = int(np.argmin(np.isfinite(x)))
            raise InputError(
                f"{participant} has a value that is not finite at index {index}",
                field="x",
                value=float(x[index]),
            )
        limit = 2.0**24 if x.dtype.itemsize <= 4 else 2.0**53
        if float(np.abs(x).max()) * self.scale > limit:
            index = int(np.argmax(np.abs(x)))
            raise InputError(
                f"{participant} has at index {index} a value that times scale exceeds "
                f"2^{int(math.log2(limit))}: "
                f"{x.dtype} has no exact integers there; clip or rescale the vector, or use float64",
                field="x",
                value=float(x[index]),
            )


def check_same_mechanism(mechanisms: Mapping[str, SkellamMixture]) -> None:
    """Refuse a round whose participants do not run the same mechanism: their sum could not be decoded.

    Args:
        mechanisms: By participant, e.g. as they announce them before a round.

    Raises:
        InputError: Two differ, e.g. in the rotation seed; names the participant and the field.
    """
    (first, reference), *others = mechanisms.items()
    for name, mechanism in others:
        for field in fields(SkellamMixture):
            theirs, ours = getattr(mechanism, field.name), getattr(reference, field.name)
            if theirs != ours:
                raise InputError(
                    f"{name} has another value than {first}, {ours!r}", field=field.name, value=theirs
                )
