"""What a deep look does to the state (the paper's transition), as a pure function.

After action a: every region that was not looked at learns from the look, s_i <- f_global(s_i, s_a, v_a) with
s_a as it was before; then s_a <- v_a. Rows that were looked at earlier stay exactly what the look gave.
"""

from typing import get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rlogist.modules import GlobalUpdate, Update
from shared_core import InputError

TARGET_SIMILARITY = 0.95
"""Cosine of s_i and s_a from which `targeted` updates a region (SASHA, arXiv 2507.05077)."""


def look(
    states: Float[Tensor, "batch regions dim"],
    observed: Bool[Tensor, "batch regions"],
    action: Int64[Tensor, " batch"],
    seen: Float[Tensor, "batch dim"],
    f_global: GlobalUpdate,
    update: Update = "global",
) -> tuple[Float[Tensor, "batch regions dim"], Bool[Tensor, "batch regions"]]:
    """State and observed flags after a deep look at one region of each slide.

    Args:
        states: S_t. Not changed.
        observed: m_t. Not changed.
        action: The region that was looked at.
        seen: v_a = f_local of its deep patches.
        f_global: The cross-resolution update.
        update: `global` for RLogist; `targeted` updates only regions like s_a (SASHA's, not RLogist's);
            `none` is the ablation.

    Returns:
        S_{t+1}, m_{t+1}.
    """
    batch = torch.arange(len(states), device=states.device)
    before = states[batch, action]
    after = states
    if update != "none":
        changed = ~observed
        if update == "targeted":
            changed = changed & (cosine_similarity(states, before.unsqueeze(1), dim=-1) >= TARGET_SIMILARITY)
        after = torch.where(changed.unsqueeze(-1), f_global(states, before, seen), states)
    marked = torch.zeros_like(observed)
    marked[batch, action] = True
    return torch.where(marked.unsqueeze(-1), seen.unsqueeze(1), after), observed | marked


def episode_length(regions: int, rho: float) -> int:
    """T = max(1, ceil(rho N)), the number of deep looks at a slide of N regions; 0 for one without any.

    >>> episode_length(200, 0.1), episode_length(3, 0.1), episode_length(0, 0.1)
    (20, 1, 0)

    Raises:
        InputError: rho is not in (0, 1].
    """
    check_rho(rho)
    # Exact: 0.1 * 70 is 7.000000000000001 in floats, and its ceiling 8.
    numerator, denominator = _fraction(rho)
    return min(regions, max(1, -(-regions * numerator // denominator)))


def check_rho(rho: float) -> None:
    """Raise InputError unless rho is in (0, 1]."""
    if not 0 < rho <= 1:
        raise InputError("expected a share of regions above 0 and at most 1", field="rho", value=rho)


def check_update(update: str) -> None:
    """Raise InputError unless `update` is one of the forms."""
    if update not in get_args(Update):
        raise InputError(f"expected one of {', '.join(get_args(Update))}", field="update", value=update)


def _fraction(rho: float) -> tuple[int, int]:
    from fractions import Fraction

    exact = Fraction(repr(float(rho)))
    return exact.numerator, exact.denominator
