"""What makes vectors more isotropic without training: the comparators of contrastive learning.

Each fits on some vectors and gives a map for others: ``fit(name, train)(x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from isocse.vectors import Rows, rows
from shared_core import InputError

Treatment = Literal["none", "center", "all-but-the-top", "whiten", "standardize"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
Map = Callable[[Rows], Tensor]


def fit(name: str, train: Rows, *, components: int | None = None, epsilon: float = 1e-9) -> Map:
    """A map of vectors that makes the training vectors more isotropic.

    Args:
        name: "center" takes the mean away; "all-but-the-top" the mean and the first principal components (Mu
            and Viswanath 2018); "whiten" gives the identity as covariance, `(x - mu) U Lambda^(-1/2)` (Su et
            al. 2021, Huang et al. 2021); "standardize" gives each coordinate variance 1 (Timkey and van
            Schijndel 2021).
        train: Vectors to fit on.
        components: Of all-but-the-top; dimensions / 100, at least 1, where None.
        epsilon: Directions with a variance below this share of the greatest are dropped by whitening, since
            their scale is noise.

    >>> fit("center", torch.tensor([[1.0, 0.0], [3.0, 0.0]]))(torch.tensor([[4.0, 1.0]])).tolist()
    [[2.0, 1.0]]
    """
    if name not in TREATMENTS:
        raise InputError(f"expected one of {', '.join(TREATMENTS)}", field="name", value=name)
    vectors = rows(train, "train", least=2)
    mean = vectors.mean(0)
    if name == "none":
        return lambda x: rows(x)
    if name == "center":
        return lambda x: rows(x) - mean
    centred = vectors - mean
    if name == "standardize":
        deviation = centred.square().mean(0).sqrt()
        scale = torch.where(deviation > 0, deviation, 1.0)
        return lambda x: (rows(x) - mean) / scale
    variances, directions = torch.linalg.eigh(centred.T @ centred / vectors.shape[0])
    if name == "all-but-the-top":
        top = directions[:, -(components or max(1, vectors.shape[1] // 100)) :]
        return lambda x: _without(rows(x) - mean, top)
    kept = variances > epsilon * variances[-1]
    whitening = directions[:, kept] / variances[kept].sqrt()
    return lambda x: (rows(x) - mean) @ whitening


def _without(x: Float[Tensor, "n d"], directions: Float[Tensor, "d k"]) -> Float[Tensor, "n d"]:
    return x - (x @ directions) @ directions.T
