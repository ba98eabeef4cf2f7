"""Which layer gets how many bits: HAWQ's integer program, and chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from shared_core import InputError


def cheapest_allocation(
    costs: Float[np.ndarray, "layers choices"], sizes: Float[np.ndarray, "layers choices"], budget: float
) -> list[int]:
    """Choose for each layer one option so that the sum of costs is least and that of sizes within budget.

    An integer program, solved to optimality (HAWQ-V3, section 3.4) by scipy's HiGHS.

    Args:
        costs: What a choice costs, e.g. its sensitivity; any sign.
        sizes: What it weighs, e.g. bits times weights.
        budget: What all choices may weigh together.

    Returns:
        The number of the choice, for each layer.

    Raises:
        InputError: The lightest choices weigh more than the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = costs.shape
    least = float(sizes.min(axis=1).sum())
    if least > budget:
        raise InputError(f"expected at least {least:g}, what the smallest choices weigh", value=budget)
    span = float(np.abs(costs).max()) or 1.0  # sensitivities may be tiny beside the solver's tolerances
    one_a_layer = np.kron(np.eye(layers), np.ones(choices))
    result = milp(
        (costs / span).ravel(),
        integrality=np.ones(layers * choices),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_a_layer, 1, 1),
            LinearConstraint(sizes.ravel()[None] / budget, -np.inf, 1 + 1e-12),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return result.x.reshape(layers, choices).argmax(axis=1).tolist()


def random_allocation(
    weights: Sequence[int], target_bits: float, generator: np.random.Generator, max_bits: int = 8
) -> list[int]:
    """Draw bits of layers at random so that their mean over weights is at most, and close to, the target.

    All layers start at one bit; a layer that still fits, drawn at random, gets one more, until none fits.
    The mean is then below the target by less than one bit of the smallest layer that is not full.

    Args:
        weights: Numbers of weights of the layers.
        target_bits: Mean bits a weight, 1 to `max_bits`.
        generator: Of the draws.
        max_bits: Bits that a layer gets at most.

    Raises:
        InputError: The target is out of range.
    """
    if not 1 <= target_bits <= max_bits:
        raise InputError(f"expected 1 to {max_bits}", field="target_bits", value=target_bits)
    bits = [1] * len(weights)
    room = target_bits * sum(weights) - sum(weights)
    while fitting := [i for i, n in enumerate(weights) if n <= room and bits[i] < max_bits]:
        layer = fitting[int(generator.integers(len(fitting)))]
        bits[layer] += 1
        room -= weights[layer]
    return bits
