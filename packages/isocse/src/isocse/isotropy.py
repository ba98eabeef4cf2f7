"""How evenly a set of vectors fills its space: IsoScore, partition function, alignment and uniformity.

Sources: Rudman et al. 2022 (IsoScore), Rudman and Eickhoff 2024 (IsoScore*), Mu and Viswanath 2018 (partition
function), Wang and Isola 2020 (alignment, uniformity).
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from isocse.vectors import OtherRows, Rows, add_products, rows, unit_rows
from shared_core import InputError

POINTS_PER_DIMENSION = 10
"""With fewer points a dimension, IsoScore comes out too low: the sample covariance has too small a rank."""
BLOCK = 512
"""Rows whose products are computed together: they stay in the processor's cache."""
BLOCKS_IN_FLOAT32 = 8
"""With so many blocks or more, products within a block are in float32, and added up in float64."""


def isoscore(x: Rows, *, warn: bool = True) -> float:
    """IsoScore of points as rows: 1 where the covariance is a multiple of the identity, 0 for a line.

    `(PR - 1) / (d - 1)` with the participation ratio `PR = trace(C)^2 / |C|^2` of the covariance C. This
    equals the published definition through the eigenvalues of C exactly (Rudman et al. 2022, section 4), and
    needs none. k equal directions of d give (k - 1) / (d - 1).

    Args:
        x: Points as rows, (points, dimensions). The published function takes them as columns.
        warn: Warn of fewer than 10 points a dimension.

    Raises:
        InputError: There is one dimension, one point, or all points are the same.

    >>> isoscore(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), warn=False)
    1.0
    """
    points = torch.as_tensor(x).detach()
    n, d = points.shape
    if n < 2:
        raise InputError("expected at least 2 vectors", field="x", value=n)
    if warn and n < POINTS_PER_DIMENSION * d:
        warnings.warn(
            f"IsoScore of {n} points in {d} dimensions is too low: use {POINTS_PER_DIMENSION * d} or more, "
            "or isoscore_star",
            stacklevel=2,
        )
    trace, squared_norm = _scatter_moments(points)
    return isoscore_of_moments(trace, squared_norm, d)


def _scatter_moments(points: Float[Tensor, "n d"]) -> tuple[float, float]:
    """Trace and sum of squared entries of the scatter matrix, in blocks of rows."""
    n, d = points.shape
    mean = points.mean(0, dtype=torch.float64)
    if not torch.isfinite(mean).all():
        rows(points)  # tells the row
    if n < d:  # the squared entries of the n x n and of the d x d product are the same: take the smaller one
        centred = points.double() - mean
        return float(centred.square().sum()), float((centred @ centred.T).square().sum())
    # Rounding errors of products in float32 have no common sign, and d^2 entries are added up: of many
    # blocks, 1e-9 of the sum is left.
    exact = torch.float32 if n >= BLOCKS_IN_FLOAT32 * BLOCK else torch.float64
    product, energy = torch.zeros(d, d, dtype=torch.float64, device=points.device), torch.zeros_like(mean)
    for block in points.split(BLOCK):
        centred = block.double() - mean
        energy += centred.square().sum(0)
        add_products(product, centred.to(exact))
    upper = product.triu(1)
    return float(energy.sum()), float(energy.square().sum() + 2 * upper.square().sum())


def isoscore_of_moments(trace: float, squared_norm: float, dimensions: int) -> float:
    """IsoScore from a covariance's trace and the sum of its squared entries; any common factor cancels."""
    if dimensions < 2:
        raise InputError("expected 2 or more dimensions", field="x", value=dimensions)
    if squared_norm <= 0:
        raise InputError("all points are the same: they have no shape", field="x")
    return (trace**2 / squared_norm - 1) / (dimensions - 1)


def isoscore_of_covariance(covariance: Float[Tensor, "d d"]) -> float:
    """IsoScore of points that have this covariance."""
    return isoscore_of_moments(
        float(covariance.trace()), float(covariance.square().sum()), covariance.shape[0]
    )


def isoscore_star(x: Rows, reference: Float[Tensor, "d d"], zeta: float) -> float:
    """IsoScore of few points, with their covariance pulled to a reference: `(1 - zeta) C + zeta R`.

    Args:
        x: Points as rows.
        reference: A covariance of many points of the same kind.
        zeta: 0 is `isoscore`, 1 takes the reference alone.
    """
    if not 0 <= zeta <= 1:
        raise InputError("expected 0 to 1", field="zeta", value=zeta)
    return isoscore_of_covariance((1 - zeta) * covariance(x) + zeta * reference.double())


def covariance(x: Rows) -> Float[Tensor, "d d"]:
    """Covariance of points as rows, divided by their number less one."""
    points = rows(x, least=2)
    centred = points - points.mean(0)
    return centred.T @ centred / (points.shape[0] - 1)


def isoscore_error(x: Rows, count: int | None = None) -> float:
    """Standard error of `isoscore`, by the delta method: each point's influence on trace and norm.

    A sampling error alone: it does not have the bias of few points.

    Args:
        x: Points as rows.
        count: Points that the score was made of, where x is a sample of them.
    """
    points = rows(x, least=3)
    n, d = points.shape
    centred = (points - points.mean(0)).float()  # enough for an error
    scatter = centred.T @ centred / n
    trace, squared = scatter.trace(), scatter.square().sum()
    energy = centred.square().sum(1)
    along = ((centred @ scatter) * centred).sum(1)
    ratio = trace.square() / squared
    influence = 2 * ratio * (energy / trace - along / squared)
    return float(influence.std() / (count or n) ** 0.5 / (d - 1))


def partition_isotropy(x: Rows) -> float:
    """Least to greatest partition function `Z(c) = sum_w exp(c . w)` (Mu and Viswanath 2018).

    c runs over the unit eigenvectors of `X^T X` with both signs: an eigenvector's sign is arbitrary, so a
    ratio over one sign is not a function of X. 1 is isotropic. Neither scale nor an offset is taken out: both
    change it.

    >>> round(partition_isotropy(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 6)
    1.0
    """
    sums = _partition_terms(rows(x)).sum(0)
    return float(sums.min() / sums.max())


def partition_with_error(x: Rows, generator: torch.Generator, replicates: int = 100) -> tuple[float, float]:
    """`partition_isotropy` and its standard error, by resampling rows; the eigenvectors stay."""
    terms = _partition_terms(rows(x, least=2))
    n = terms.shape[0]
    drawn = torch.randint(0, n, (replicates, n), generator=generator)
    weights = torch.zeros(replicates, n, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones(replicates, n, dtype=torch.float64))
    whole, sums = terms.sum(0), weights @ terms
    return float(whole.min() / whole.max()), float((sums.min(1).values / sums.max(1).values).std())


def _partition_terms(x: Float[Tensor, "n d"]) -> Float[Tensor, "n twice"]:
    """`exp(c . w)` of each row w and direction c, divided by the greatest of all."""
    columns = torch.linalg.eigh(x.T @ x).eigenvectors  # columns, not rows, are the eigenvectors
    exponents = x @ columns
    greatest = exponents.abs().max()
    return torch.cat([exponents - greatest, -exponents - greatest], dim=1).exp_()


def uniformity(x: Rows, t: float = 2.0) -> float:
    """`log mean_{i<j} exp(-t |u_i - u_j|^2)` of unit vectors (Wang and Isola 2020): lower is more uniform.

    Makes an n by n matrix: meant for samples.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), 6)
    -8.0
    """
    return float(_kernel_means(unit_rows(x), t).mean().log())


def uniformity_with_error(x: Rows, t: float = 2.0) -> tuple[float, float]:
    """`uniformity` of a sample and its standard error, from each point's mean over its pairs (Hoeffding)."""
    by_point = _kernel_means(unit_rows(x, least=3), t)
    mean = by_point.mean()
    return float(mean.log()), float(2 * by_point.std() / len(by_point) ** 0.5 / mean)


def _kernel_means(units: Float[Tensor, "n d"], t: float) -> Float[Tensor, " n"]:
    """By row, the mean of `exp(-t |u - v|^2)` over all others, where `|u - v|^2 = 2 - 2 u . v`."""
    kernels = (units @ units.T).sub_(1).mul_(2 * t).exp_()
    return (kernels.sum(1) - kernels.diagonal()) / (len(kernels) - 1)


def alignment(x: Rows, positive: OtherRows, alpha: float = 2.0) -> float:
    """`mean |u(x) - u(x+)|^alpha` over positive pairs (Wang and Isola 2020): lower is more aligned.

    Pairs with a vector of zeros are left out.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).__round__(6)
    2.0
    """
    values = alignment_of_pairs(x, positive, alpha)
    if len(values) == 0:
        raise InputError("expected at least one pair of vectors that are not zero", field="x", value=0)
    return float(values.mean())


def alignment_of_pairs(x: Rows, positive: OtherRows, alpha: float = 2.0) -> Float[Tensor, " m"]:
    """`|u(x) - u(x+)|^alpha` of each positive pair without a vector of zeros."""
    first, second = rows(x), rows(positive, "positive")
    if first.shape != second.shape:
        raise InputError(
            f"expected as many as x, {tuple(first.shape)}", field="positive", value=tuple(second.shape)
        )
    norms = torch.stack([first.norm(dim=1), second.norm(dim=1)])
    kept = (norms > 0).all(0)
    units = [part[kept] / norm[kept, None] for part, norm in zip((first, second), norms, strict=True)]
    return (units[0] - units[1]).norm(dim=1).pow(alpha)
