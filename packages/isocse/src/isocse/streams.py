"""The measures as accumulators: vectors come in batches, once, and only sums of fixed size stay.

Each has `update` with a batch, `merge` with another accumulator of the same kind (another process or file),
and results that equal the definitions in `cosines`, `dimensions` and `isotropy` on all vectors at once.
States may be in half precision: they are computed with in float32 and summed in float64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from isocse.dimensions import Contributions, Pairs, contributions_of_sums
from isocse.isotropy import BLOCK, isoscore_of_covariance
from isocse.vectors import add_products, mirrored
from shared_core import InputError

Batch = Float[Tensor, "n d"]
SUMMED = 2048
"""Vectors of one type, at most, that are summed in float32: the error is below 1e-6 of the sum."""


class Stream:
    """Sums that add up: `merge` adds each tensor and number of another one to this one's."""

    def to(self, device: torch.device | str) -> Any:
        """Keep the sums on a device; batches must be there, too."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def merge(self, other: Any) -> None:
        """Take in what another accumulator of the same kind has seen."""
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).add_(value)
            elif isinstance(value, int | float) and not name.startswith("_"):
                setattr(self, name, getattr(self, name) + value)


class Moments(Stream):
    """Mean and spread of numbers, by group, from their count, sum and sum of squares about a shift.

    Args:
        groups: Number of groups.
        shift: A number near the mean, so that no digits are lost when squares are subtracted.
    """

    def __init__(self, groups: int = 1, shift: float = 0.0) -> None:
        self._shift = shift
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.sums = torch.zeros(groups, dtype=torch.float64)
        self.squares = torch.zeros(groups, dtype=torch.float64)

    def update(self, values: Float[Tensor, " n"], group: Int[Tensor, " n"] | None = None) -> None:
        """Add numbers."""
        group = _one_group(values) if group is None else group
        shifted = values.double() - self._shift
        self.counts.index_add_(0, group, torch.ones_like(shifted))
        self.sums.index_add_(0, group, shifted)
        self.squares.index_add_(0, group, shifted.square())

    @property
    def mean(self) -> Float[Tensor, " groups"]:
        """Mean by group; NaN where there is nothing."""
        return self.sums / self.counts + self._shift

    @property
    def std(self) -> Float[Tensor, " groups"]:
        """Standard deviation by group, divided by the count less one; 0 for a single number."""
        variance = (self.squares - self.sums.square() / self.counts) / (self.counts - 1).clamp_min(1)
        return variance.clamp_min(0).sqrt()

    @property
    def error(self) -> Float[Tensor, " groups"]:
        """Standard error of the mean, by group."""
        return self.std / self.counts.sqrt()

    def all_groups(self) -> Moments:
        """The groups taken together."""
        whole = Moments(1, self._shift)
        for name in ("counts", "sums", "squares"):
            getattr(whole, name).copy_(getattr(self, name).sum())
        return whole


class MeanCosine(Stream):
    """Mean cosine of all pairs, its contributions by dimension, and the mean vector, by group of vectors.

    Args:
        dimensions: Of the vectors.
        groups: Number of groups; pairs are formed within a group.
    """

    def __init__(self, dimensions: int, groups: int = 1) -> None:
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.unit_sums = torch.zeros(groups, dimensions, dtype=torch.float64)
        self.unit_squares = torch.zeros(groups, dimensions, dtype=torch.float64)
        self.sums = torch.zeros(groups, dimensions, dtype=torch.float64)
        self.energy = torch.zeros(groups, dtype=torch.float64)
        self.totals = torch.zeros(groups, dtype=torch.float64)

    def update(self, x: Batch, group: Int[Tensor, " n"] | None = None) -> None:
        """Add vectors; zeros have no direction and are counted apart."""
        norms = x.float().norm(dim=1)
        self.update_units(x.float(), _units(x.float(), norms), norms, group)

    def update_units(
        self, x: Batch, units: Batch, norms: Float[Tensor, " n"], group: Int[Tensor, " n"] | None = None
    ) -> None:
        """The same where unit vectors (zeros for zeros) and lengths are known."""
        group = _one_group(x) if group is None else group
        groups = torch.arange(len(self.counts), device=x.device)
        member = (groups[:, None] == group[None, :]).to(x.dtype)  # a product with it sums by group
        self.totals += member.sum(1)
        self.counts += member @ (norms > 0).to(x.dtype)
        self.energy += member.double() @ norms.double().square()
        self.unit_sums += member @ units
        self.unit_squares += member @ units.square()
        self.sums += member @ x

    def mean_cosine(self, group: int | None = None) -> float:
        """Mean cosine of all pairs in a group, or in all vectors; NaN with fewer than 2."""
        n = self._count(group)
        total = float(self._pick(self.unit_sums, group).square().sum())
        return (total - n) / (n * (n - 1)) if n > 1 else float("nan")

    def contributions(
        self, pairs: Pairs = "off_diagonal", group: int | None = None, error: float | None = None
    ) -> Contributions:
        """What each dimension adds to the mean cosine."""
        sums, squares = (self._pick(part, group) for part in (self.unit_sums, self.unit_squares))
        return contributions_of_sums(sums, squares, self._count(group), pairs, error)

    def mean(self, group: int | None = None) -> Float[Tensor, " d"]:
        """The mean vector."""
        return self._pick(self.sums, group) / self._pick(self.totals, group)

    def common_component(self, group: int | None = None) -> tuple[float, float]:
        """Distance of the mean vector from the origin, and its share of the energy."""
        mean = self.mean(group)
        energy = float(self._pick(self.energy, group) / self._pick(self.totals, group))
        return float(mean.norm()), float(mean.square().sum()) / energy if energy > 0 else 0.0

    def cosine_to_mean(self, group: int | None = None) -> float:
        """Mean cosine of the vectors with their mean vector."""
        mean = self.mean(group)
        return float(self._pick(self.unit_sums, group) @ mean / mean.norm()) / self._count(group)

    @property
    def zeros(self) -> int:
        """Vectors of zeros, which no cosine has."""
        return int((self.totals - self.counts).sum())

    def _count(self, group: int | None) -> float:
        return float(self._pick(self.counts, group))

    @staticmethod
    def _pick(values: Tensor, group: int | None) -> Tensor:
        return values.sum(0) if group is None else values[group]


class SentenceCosine(Stream):
    """`cosines.expected_anisotropy`, with its standard error by a bootstrap over sentences that runs along.

    Every sentence gets, by its number and the seed, a Poisson(1) weight in each replicate (the streaming form
    of resampling with replacement), so the result does not depend on the order of batches.

    Args:
        dimensions: Of the vectors.
        seed: Of the weights.
        replicates: Number of resamples.
    """

    def __init__(self, dimensions: int, seed: int = 0, replicates: int = 64) -> None:
        self._seed = seed
        self._replicates = replicates
        self.count = 0
        self.sums = torch.zeros(dimensions, dtype=torch.float64)
        self.coordinate_squares = torch.zeros(dimensions, dtype=torch.float64)
        self.weighted = torch.zeros(replicates, dimensions, dtype=torch.float64)
        self.weighted_squares = torch.zeros(replicates, dtype=torch.float64)
        self.weight_squares = torch.zeros(replicates, dtype=torch.float64)
        self.weight_totals = torch.zeros(replicates, dtype=torch.float64)

    def update(self, means: Float[Tensor, "sentences d"], numbers: Int[np.ndarray, " sentences"]) -> None:
        """Add sentences: the mean unit vector of each, and its number in the corpus."""
        numbers = np.ascontiguousarray(numbers, dtype=np.int64)
        means = means.double()
        weights = _weights(numbers.tobytes(), self._seed, self._replicates).to(means)
        squares = means.square()
        self.count += len(means)
        self.sums += means.sum(0)
        self.coordinate_squares += squares.sum(0)
        self.weighted += weights @ means
        self.weighted_squares += weights.square() @ squares.sum(1)
        self.weight_squares += weights.square().sum(1)
        self.weight_totals += weights.sum(1)

    @property
    def value(self) -> float:
        """Expected cosine of tokens of two different sentences."""
        n = self.count
        if n < 2:
            return float("nan")
        return float(self.sums.square().sum() - self.coordinate_squares.sum()) / (n * (n - 1))

    @property
    def error(self) -> float:
        """Standard error of `value` over sentences."""
        numerator = self.weighted.square().sum(1) - self.weighted_squares
        return float((numerator / (self.weight_totals.square() - self.weight_squares)).std())

    def contributions(self, pairs: Pairs = "off_diagonal") -> Contributions:
        """What each dimension adds to `value`."""
        error = self.error if pairs == "off_diagonal" else None
        return contributions_of_sums(self.sums, self.coordinate_squares, self.count, pairs, error)


class SelfSimilarity(Stream):
    """Self-similarity of many types, from the sum of the unit vectors of each.

    Args:
        types: Number of types.
        dimensions: Of the vectors.
    """

    def __init__(self, types: int, dimensions: int) -> None:
        self.counts = torch.zeros(types, dtype=torch.float64)
        self.sums = torch.zeros(types, dimensions, dtype=torch.float64)
        self.repeat_counts = torch.zeros(types, dtype=torch.float64)
        self.repeat_sums = torch.zeros(types, dimensions, dtype=torch.float64)

    def update(
        self,
        units: Batch,
        types: Int[Tensor, " n"],
        repeated: Bool[Tensor, " n"] | None = None,
        present: Bool[Tensor, " n"] | None = None,
    ) -> None:
        """Add occurrences.

        Args:
            units: Unit vectors; zeros, which have no direction, are left out.
            types: The type of each, or -1 for none.
            repeated: Where the type was in the same sentence before.
            present: Which are not zeros, where that is known.
        """
        kept = types >= 0
        present = (units != 0).any(1) if present is None else present
        self._add(self.counts, self.sums, units, types, kept & present)
        if repeated is not None:
            self._add(self.repeat_counts, self.repeat_sums, units, types, kept & present & repeated)

    @staticmethod
    def _add(counts: Tensor, sums: Tensor, units: Tensor, types: Tensor, kept: Tensor) -> None:
        if not bool(kept.all()):
            units, types = units[kept], types[kept]
        # By type in the vectors' own precision, a few hundred at a time, then all in float64.
        for some, kinds in zip(units.split(SUMMED), types.split(SUMMED), strict=True):
            present, row, occurrences = kinds.unique(return_inverse=True, return_counts=True)
            by_type = some.new_zeros(len(present), some.shape[1]).index_add_(0, row, some)
            sums.index_add_(0, present, by_type.double())
            counts.index_add_(0, present, occurrences.double())

    def grow(self, types: int) -> None:
        """Make room for more types."""
        extra = types - len(self.counts)
        for name in ("counts", "sums", "repeat_counts", "repeat_sums"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(extra, *old.shape[1:])]))

    def values(self, *, first_only: bool = False) -> Float[Tensor, " types"]:
        """Self-similarity by type; NaN where there are fewer than 2 occurrences.

        Args:
            first_only: Take only the first occurrence in each sentence, as the paper's published code.
        """
        counts, sums = self.counts, self.sums
        if first_only:
            counts, sums = counts - self.repeat_counts, sums - self.repeat_sums
        pairs = counts * (counts - 1)
        return torch.where(counts > 1, (sums.square().sum(1) - counts) / pairs, float("nan"))

    def contributions(self, kind: int) -> Contributions:
        """What each dimension adds to a type's self-similarity, pairs of a state with itself included."""
        return Contributions(self.sums[kind].square() / self.counts[kind] ** 2)


class Covariance(Stream):
    """Mean and covariance of vectors. They wait until there are many: one product of many rows is fast.

    Args:
        dimensions: Of the vectors.
    """

    def __init__(self, dimensions: int) -> None:
        self._count = 0
        self._sums = torch.zeros(dimensions, dtype=torch.float64)
        self._products = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    @property
    def count(self) -> int:
        """Vectors so far."""
        return self._count + sum(len(rows) for rows in self._waiting)

    def update(self, x: Batch) -> None:
        """Add vectors."""
        if len(x):
            self._waiting.append(x.clone())
        if sum(len(rows) for rows in self._waiting) >= BLOCK:
            self._settle()

    def to(self, device: torch.device | str) -> Covariance:
        """Keep the sums on a device; batches must be there, too."""
        self._settle()
        return super().to(device)

    def merge(self, other: Covariance) -> None:
        """Take in what another accumulator has seen."""
        other._settle()
        self._settle()
        if other._count:
            self._products += other._products
            self._join(other._count, other._sums)

    def _settle(self) -> None:
        """Add those that wait: pairwise update of Chan, Golub and LeVeque about their own mean."""
        if not self._waiting:
            return
        x, self._waiting = torch.cat(self._waiting), []
        sums = x.sum(0, dtype=torch.float64)
        # Once their mean is gone, the product keeps the precision of the vectors themselves.
        add_products(self._products, (x - sums / len(x)).to(torch.promote_types(x.dtype, torch.float32)))
        self._join(len(x), sums)

    def _join(self, count: int, sums: Tensor) -> None:
        if self._count:
            offset = sums / count - self._sums / self._count
            weight = count * self._count / (count + self._count)
            self._products.addr_(offset, offset, alpha=weight)
        self._count += count
        self._sums += sums

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """The covariance, divided by the count less one."""
        self._settle()
        if self._count < 2:
            raise InputError("expected at least 2 vectors", field="x", value=self._count)
        return mirrored(self._products) / (self._count - 1)

    @property
    def isoscore(self) -> float:
        """IsoScore of all vectors."""
        return isoscore_of_covariance(self.matrix)


class Alignment(Moments):
    """`isotropy.alignment` of positive pairs that come in batches."""

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__(1, 1.0)
        self._alpha = alpha

    def update_pairs(self, x: Batch, positive: Batch) -> None:
        """Add pairs; those with a vector of zeros are left out."""
        from isocse.isotropy import alignment_of_pairs

        self.update(alignment_of_pairs(x, positive, self._alpha))


class Sample:
    """A uniform sample of numbered rows without replacement: those with the smallest hash of number and seed.

    The same rows are kept in whatever order and batches they come, and in every stream with the same seed.

    Args:
        size: Rows to keep.
        seed: Of the hash.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.seen = 0
        self.keys = np.zeros(0, dtype=np.uint64)
        self.numbers = np.zeros(0, dtype=np.int64)
        self.rows: Tensor | None = None

    def wanted(self, numbers: Int[np.ndarray, " n"]) -> np.ndarray:
        """Which of the rows with these numbers would be kept now: others need not be computed."""
        keys = hashes(numbers, self.seed)
        if len(self.keys) < self.size:
            return np.ones(len(numbers), dtype=bool)
        return keys < self.keys[-1]

    def update(self, x: Shaped[Tensor, "n ..."], numbers: Int[np.ndarray, " n"]) -> None:
        """Offer rows, by their numbers in the corpus."""
        self.seen += len(numbers)
        self._keep(x, numbers)

    def merge(self, other: Sample) -> None:
        """Take in what another sample of the same seed has seen."""
        self.seen += other.seen
        if other.rows is not None:
            self._keep(other.rows, other.numbers)

    def _keep(self, x: Tensor, numbers: np.ndarray) -> None:
        chosen = self.wanted(numbers)
        if not chosen.any():
            return
        offered = x[torch.as_tensor(chosen)]
        keys = np.concatenate([self.keys, hashes(numbers[chosen], self.seed)])
        order = np.argsort(keys, kind="stable")[: self.size]
        together = offered if self.rows is None else torch.cat([self.rows, offered])
        self.rows = together[torch.as_tensor(order)].clone()
        self.numbers = np.concatenate([self.numbers, numbers[chosen]])[order]
        self.keys = keys[order]


def hashes(numbers: Int[np.ndarray, " n"], seed: int) -> np.ndarray:
    """64 well-mixed bits of each number (SplitMix64), the same on every machine.

    >>> int(hashes(np.array([0]), 0)[0])
    16294208416658607535
    """
    with np.errstate(over="ignore"):
        mixed = numbers.astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def uniforms(numbers: Int[np.ndarray, " n"], seed: int) -> np.ndarray:
    """A number from 0 up to 1 for each number, by hash."""
    return (hashes(numbers, seed) >> np.uint64(11)) * 2.0**-53


def poisson_weights(numbers: Int[np.ndarray, " n"], seed: int, replicates: int) -> np.ndarray:
    """Poisson(1) weights, (replicates, numbers), by hash."""
    steps = np.cumsum(np.exp(-1) / np.cumprod([1.0, *range(1, 12)]))
    keys = hashes(numbers, seed)[None, :] ^ hashes(np.arange(replicates), seed + 1)[:, None]
    draws = uniforms(keys.reshape(-1).view(np.int64), seed + 2).reshape(keys.shape)
    return np.searchsorted(steps, draws, side="right")


@functools.lru_cache(maxsize=2)  # the layers of a model ask for the same ones
def _weights(numbers: bytes, seed: int, replicates: int) -> Int[Tensor, "replicates n"]:
    return torch.as_tensor(poisson_weights(np.frombuffer(numbers, np.int64), seed, replicates))


def _one_group(values: Tensor) -> Int[Tensor, " n"]:
    return torch.zeros(len(values), dtype=torch.int64, device=values.device)


def _units(x: Batch, norms: Float[Tensor, " n"]) -> Batch:
    return x / torch.where(norms > 0, norms, 1.0)[:, None]


__all__ = [
    "Alignment",
    "Covariance",
    "MeanCosine",
    "Moments",
    "Sample",
    "SelfSimilarity",
    "SentenceCosine",
    "Stream",
    "hashes",
    "poisson_weights",
    "uniforms",
]
