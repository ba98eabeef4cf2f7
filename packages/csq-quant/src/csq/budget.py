"""The average precision of a scheme, and how to bring a scheme that missed its target to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from csq.storage import file_bits, paper_bits, stored_bits

Array = np.ndarray

Budget = Literal["weights", "layers", "bytes"]

TOLERANCE = 0.02
"""`settle` brings the average within this share of the target."""


RARE = 0.01
"""Share of a layer's weights that may change their value for the file's sake."""


class Average:
    """Average precision of hard masks, by one way of counting (see `csq.Schedule`).

    Args:
        weights: number of weights of each layer.
        planes: planes of each weight.
        budget: `weights`, `layers` or `bytes`.
    """

    def __init__(self, weights: Sequence[int], planes: int, budget: Budget) -> None:
        counts = torch.tensor(weights, dtype=torch.float64)
        self.shares = (
            torch.full_like(counts, 1 / len(counts)) if budget == "layers" else counts / counts.sum()
        )
        self.cost: Callable[[tuple[bool, ...]], int] = cache(stored_bits) if budget == "bytes" else paper_bits
        # One entry a mask, so that a device counts without asking the host.
        every = [tuple(bool(index >> plane & 1) for plane in range(planes)) for index in range(2**planes)]
        self._costs = torch.tensor([float(self.cost(mask)) for mask in every], dtype=torch.float64)

    def __call__(self, selected: Bool[Tensor, "layers planes"]) -> Float[Tensor, ""]:
        """The average, on the masks' device."""
        device = selected.device
        place = 2 ** torch.arange(selected.shape[1], device=device)
        return (self._costs.to(device)[(selected * place).sum(1)] * self.shares.to(device)).sum()


def top_run(row: Bool[Tensor, " planes"]) -> Bool[Tensor, " planes"]:
    """As many planes as are selected, in one run from the highest selected one down.

    Where too few planes lie below it, the run reaches above it instead.
    """
    count, run = int(row.sum()), torch.zeros_like(row)
    if count:
        top = max(int(row.nonzero().max()), count - 1)
        run[top - count + 1 : top + 1] = True
    return run


def settle(
    selected: Bool[Tensor, "layers planes"],
    masks: Float[Tensor, "layers planes"],
    average: Average,
    target: float,
    *,
    min_bits: int = 1,
    contiguous: bool = False,
    cost: Callable[[int, tuple[bool, ...]], float] | None = None,
) -> tuple[Bool[Tensor, "layers planes"], float]:
    """Switch planes off, or on, until the average is within 2 % of the target, the least decided first.

    No switch carries the average past the target by more than the tolerance: large layers come near, small
    ones close the gap. The target stays missed where no switch fits, as with one single layer.

    Args:
        selected: the scheme of the search.
        masks: m_B; a plane with a small |m_B| is undecided.
        average: how precision is counted.
        target: the average wanted.
        min_bits: planes that each layer keeps.
        contiguous: switch only at the ends of runs.
        cost: bits a weight of a layer (by its number) with a mask, where more is known than the mask; else
            `average` counts.

    Returns:
        The scheme, and its average.
    """
    cost = cost or (lambda _, row: average.cost(row))
    rows = [tuple(map(bool, row)) for row in selected.tolist()]
    shares: list[float] = average.shares.tolist()
    order = [divmod(flat, selected.shape[1]) for flat in masks.abs().flatten().argsort().tolist()]
    slack = TOLERANCE * target
    gap = sum(share * cost(layer, rows[layer]) for layer, share in enumerate(shares)) - target
    for wanted in (False, True):  # first off, then on
        sign, moved = (1 if wanted else -1), True
        while moved:  # a run's new end may be a plane that was passed over
            moved = False
            for layer, plane in order:
                if sign * gap >= 0:
                    break
                row = rows[layer]
                tried = (*row[:plane], wanted, *row[plane + 1 :])
                change = shares[layer] * (cost(layer, tried) - cost(layer, row))
                fits = sign * change > 0 and sign * (gap + change) <= slack
                if fits and sum(tried) >= min_bits and not (contiguous and _has_gap(tried)):
                    rows[layer], gap, moved = tried, gap + change, True
    return torch.tensor(rows), target + gap


def rare_values(codes: Int16[np.ndarray, "..."]) -> tuple[float, Array, Array]:
    """The rarest values of a layer that save most in the file, for each weight that has to change.

    Args:
        codes: of the layer.

    Returns:
        Bits a weight that giving them up saves, the places of the weights that have them, and for each the
        place of a weight with the nearest value that stays; 0 and no places where at most `RARE` of the
        weights save nothing.
    """
    flat = codes.reshape(-1)
    values, counts = np.unique(flat, return_counts=True)
    order, before = counts.argsort(kind="stable"), file_bits(flat)
    best = (0.0, np.empty(0, int), np.empty(0, int))
    least = 0.0
    for dropped in range(1, len(values)):
        if counts[order[:dropped]].sum() > RARE * flat.size:
            break
        kept = values[np.sort(order[dropped:])]
        weights = np.flatnonzero(~np.isin(flat, kept))
        nearest = kept[np.abs(kept[None].astype(int) - flat[weights, None]).argmin(1)]
        changed = flat.copy()
        changed[weights] = nearest
        saved = before - file_bits(changed)
        if saved / len(weights) > least:
            least = saved / len(weights)
            best = (saved, weights, np.array([np.argmax(flat == value) for value in nearest]))
    return best


def _has_gap(mask: tuple[bool, ...]) -> bool:
    on = [plane for plane, selected in enumerate(mask) if selected]
    return bool(on) and on[-1] - on[0] + 1 != len(on)
