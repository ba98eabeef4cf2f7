"""Rows of vectors: checked, in float64, and of unit length where a cosine needs them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shared_core import InputError

Rows = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
"""Vectors as rows, a tensor or an array of any float type."""
OtherRows = Float[Tensor, "n_other d_other"] | Float[np.ndarray, "n_other d_other"]
"""The same, where sizes are compared with those of other rows."""


def rows(x: Rows | OtherRows, name: str = "x", least: int = 1) -> Float[Tensor, "n d"]:
    """The rows in float64.

    Args:
        x: Vectors as rows.
        name: What they are called in an error.
        least: Fewest rows that the caller can use.

    Raises:
        InputError: There are fewer rows, or a number is NaN or infinite.
    """
    found = torch.as_tensor(x).detach().double()
    if found.shape[0] < least:
        raise InputError(f"expected at least {least} vectors", field=name, value=found.shape[0])
    if not torch.isfinite(found.sum()) and not torch.isfinite(found).all():  # a finite sum tells of all
        row = int((~torch.isfinite(found)).any(1).nonzero()[0])
        raise InputError(f"expected finite numbers, row {row} has NaN or infinity", field=name)
    return found


def unit_rows(x: Rows, name: str = "x", least: int = 2) -> Float[Tensor, "m d"]:
    """The rows divided by their length, in float64; rows of zeros, which have no direction, are left out.

    Raises:
        InputError: As `rows`; or too few rows are not zero.
    """
    found = rows(x, name)
    norms = found.norm(dim=1)
    kept = found[norms > 0] / norms[norms > 0, None]
    if kept.shape[0] < least:
        raise InputError(
            f"expected at least {least} vectors that are not zero", field=name, value=kept.shape[0]
        )
    return kept


COLUMN_BLOCKS = 6
"""Blocks of columns in which `x^T x` is computed: of n blocks, (n - 1) / 2n of the product is left out."""


def add_products(total: Float[Tensor, "d d"], x: Float[Tensor, "n d"]) -> None:
    """Add `x^T x` to the blocks of `total` on the diagonal and right of it; the others are its mirror image.

    Args:
        total: In float64. Products of a batch are in the type of x, so that it may be float32 for speed.
        x: Rows.
    """
    d = x.shape[1]
    for start, end in _column_blocks(d):
        total[start:end, start:] += x[:, start:end].T @ x[:, start:]


def mirrored(total: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The whole symmetric matrix from what `add_products` made."""
    upper = total.triu()
    return upper + upper.triu(1).T


def _column_blocks(d: int) -> list[tuple[int, int]]:
    edges = [d * n // COLUMN_BLOCKS for n in range(COLUMN_BLOCKS + 1)] if d >= 16 * COLUMN_BLOCKS else [0, d]
    return list(itertools.pairwise(edges))
