"""Rogue dimensions: the few coordinates that make up most of the mean cosine, and what is left without them.

Sources: Timkey and van Schijndel 2021, sections 3 and 4; Xiao, Long, Al Moubayed 2023 (arXiv 2212.09170).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isocse.vectors import Rows, rows, unit_rows
from shared_core import InputError

Pairs = Literal["off_diagonal", "all"]


@dataclass(frozen=True)
class Contributions:
    """How much each dimension adds to the mean cosine.

    Attributes:
        absolute: By dimension; they add up to the mean cosine.
        error: Standard error of the mean cosine, where it was given.
    """

    absolute: Float[Tensor, " d"]
    error: float | None = None

    @property
    def mean_cosine(self) -> float:
        """What the contributions add up to."""
        return float(self.absolute.sum())

    @property
    def reliable(self) -> bool:
        """Whether the mean cosine is 3 standard errors or more away from 0, so that shares mean something."""
        return self.error is None or abs(self.mean_cosine) >= 3 * self.error

    @property
    def share(self) -> Float[Tensor, " d"]:
        """By dimension, its share of the mean cosine; they add up to 1, and single ones may be negative.

        Raises:
            InputError: The mean cosine is too near to 0: a share would be one of noise.
        """
        if not self.reliable or self.mean_cosine == 0:
            raise InputError(
                "a share of it means nothing, it is within 3 standard errors of 0: use the absolute values",
                field="mean cosine",
                value=round(self.mean_cosine, 6),
            )
        return self.absolute / self.mean_cosine

    def top(self, count: int) -> Int[Tensor, " k"]:
        """The dimensions with the greatest contributions, greatest first."""
        return self.absolute.argsort(descending=True, stable=True)[:count]


def dimension_contributions(
    x: Rows, *, pairs: Pairs = "off_diagonal", error: float | None = None
) -> Contributions:
    """What each dimension contributes to the mean cosine of all pairs of rows.

    Args:
        x: Two or more vectors as rows.
        pairs: "off_diagonal" leaves out pairs of a row with itself (Timkey's expectation over random pairs);
            "all" has them, as the paper's published code.
        error: Standard error of the mean cosine; with it, shares of a value near 0 are refused.

    >>> dimension_contributions(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).share.tolist()
    [1.0, 0.0]
    """
    units = unit_rows(x)
    return contributions_of_sums(units.sum(0), units.square().sum(0), units.shape[0], pairs, error)


def contributions_of_sums(
    sums: Float[Tensor, " d"],
    squares: Float[Tensor, " d"],
    n: float,
    pairs: Pairs = "off_diagonal",
    error: float | None = None,
) -> Contributions:
    """`dimension_contributions` from `sum u`, `sum u^2` (by coordinate) and the number of vectors."""
    if pairs == "all":
        return Contributions(sums.square() / n**2, error)
    return Contributions((sums.square() - squares) / (n * (n - 1)), error)


def remove_dimensions(x: Rows, dimensions: Sequence[int] | Int[Tensor, " k"]) -> Float[Tensor, "n rest"]:
    """The rows without some coordinates.

    >>> remove_dimensions(torch.tensor([[1.0, 2.0, 3.0]]), [1]).tolist()
    [[1.0, 3.0]]
    """
    vectors = rows(x)
    removed = [int(k) for k in dimensions]
    if any(not 0 <= k < vectors.shape[1] for k in removed):
        raise InputError(f"expected 0 to {vectors.shape[1] - 1}", field="dimensions", value=removed)
    kept = torch.ones(vectors.shape[1], dtype=torch.bool)
    kept[removed] = False
    return vectors[:, kept]


def informativity(x: Rows, dimensions: Sequence[int] | Int[Tensor, " k"]) -> float:
    """Squared correlation of all pairs' cosines with and without some dimensions.

    Near 1 the dimensions carried no information about which vectors are alike (Timkey and van Schijndel).
    Makes an n by n matrix: meant for samples.
    """
    whole, left = (_centred_cosines(part) for part in (rows(x, least=3), remove_dimensions(x, dimensions)))
    spreads = [float(values.square().mean()) ** 0.5 for values in (whole, left)]
    if min(spreads) < 1e-12:
        raise InputError("all cosines are alike, so there is nothing to correlate", field="x")
    return (float((whole * left).mean()) / (spreads[0] * spreads[1])) ** 2


def standardize(x: Rows) -> Float[Tensor, "n d"]:
    """Each coordinate with mean 0 and variance 1 (z-scores); one that is constant becomes 0."""
    vectors = rows(x, least=2)
    centred = vectors - vectors.mean(0)
    deviation = centred.square().mean(0).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)


def _centred_cosines(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Cosines of all pairs less their mean; 0 on the diagonal, whose pairs do not count."""
    units = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    cosines = (units @ units.T).fill_diagonal_(0)
    return cosines.sub_(cosines.sum() / (len(x) * (len(x) - 1))).fill_diagonal_(0)
