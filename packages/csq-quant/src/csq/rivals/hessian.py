"""Sensitivity of layers from the loss's Hessian, as HAWQ-V2 has it (Dong et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from csq.rivals.ste import levels

_GRID = torch.linspace(0.1, 1.2, 56)
"""Candidates of the largest quantized value, as shares of max |W|."""


def hessian_traces(
    loss: Callable[[], Float[Tensor, ""]],
    weights: Sequence[Float[Tensor, "..."]],
    samples: int,
    generator: torch.Generator,
) -> Float[Tensor, " layers"]:
    """Estimate the trace of each layer's block of the Hessian by Hutchinson's method.

    For random signs v the mean of v_l . (H v)_l is the trace of block l: the cross terms have mean zero.

    Args:
        loss: Computes the loss; the same data each time, twice differentiable in the weights.
        weights: The layers' weights, leaves of the graph that need gradients.
        samples: Draws of v, at least 1; the error falls with the root of their number.
        generator: Of the signs, on the CPU.

    Returns:
        The traces, in the order of the weights.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradients = torch.autograd.grad(loss(), weights, create_graph=True)
    traces = torch.zeros(len(weights))
    # The loss is linear in the other layers.
    curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
    for number in range(samples if curved else 0):
        signs = [(torch.randint(0, 2, tuple(w.shape), generator=generator) * 2 - 1).to(w) for w in weights]
        products = torch.autograd.grad(
            [gradients[i] for i in curved],
            weights,
            grad_outputs=[signs[i] for i in curved],
            retain_graph=number + 1 < samples,
            allow_unused=True,
        )
        for layer, (sign, product) in enumerate(zip(signs, products, strict=True)):
            if product is not None:
                traces[layer] += (sign * product).sum().item()
    return traces / samples


@torch.no_grad()
def rounding_error(weight: Float[Tensor, "*shape"], bits: int) -> float:
    """Return the least ||Q(W) - W||^2 of a symmetric uniform grid of 2^(k+1) - 1 values, over its scale."""
    limit = levels(bits)
    largest = weight.abs().max()
    if largest == 0:
        return 0.0
    errors = [
        (((weight / step).round().clamp(-limit, limit) * step - weight) ** 2).sum()
        for step in _GRID.to(weight) * largest / limit
    ]
    return float(torch.stack(errors).min())


def sensitivities(
    weights: Sequence[Float[Tensor, "..."]], traces: Float[Tensor, " layers"], choices: Sequence[int]
) -> Float[Tensor, "layers choices"]:
    """Return Omega_l(k) = (trace_l / #params_l) ||Q_k(W_l) - W_l||^2 (HAWQ-V2, equation 9).

    A minimum of the loss has no negative trace; one estimated at next to nothing or below counts as a
    thousandth of the largest magnitude, so that every layer gains by more bits.
    """
    floor = 1e-3 * float(traces.abs().max()) or 1.0
    return torch.tensor(
        [
            [max(float(trace), floor) / weight.numel() * rounding_error(weight, bits) for bits in choices]
            for weight, trace in zip(weights, traces, strict=True)
        ],
        dtype=torch.float64,
    )
