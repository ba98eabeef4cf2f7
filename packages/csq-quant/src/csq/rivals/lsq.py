"""Learned step size quantization (LSQ), Esser et al., ICLR 2020, for weights and activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from csq.rivals.ste import levels


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return (x / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        x, step = ctx.saved_tensors
        ratio = x / step
        inside = (ratio > ctx.low) & (ratio < ctx.high)
        # Equation 3: round(v) - v inside the range, the bound outside.
        by_step = ratio.round().clamp(ctx.low, ctx.high) - ratio * inside
        return gradient * inside, (gradient * by_step).sum() * ctx.gradient_scale, None, None, None


def lsq_quantize(
    x: Float[Tensor, "*shape"], step: Float[Tensor, ""], low: int, high: int, gradient_scale: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Return s clip(round(x/s), low, high), with LSQ's gradients (equations 1 to 5).

    d/dx is 1 where low < x/s < high and 0 elsewhere; d/ds is round(x/s) - x/s there, and low or high outside,
    times `gradient_scale`.

    Args:
        x: Values.
        step: s > 0, the distance of neighbouring values.
        low: Smallest integer.
        high: Largest integer.
        gradient_scale: Factor of the step's gradient, 1/sqrt(number of values * high) in the paper.
    """
    return _LearnedStep.apply(x, step, low, high, gradient_scale)  # type: ignore[return-value]


def initial_step(x: Float[Tensor, "..."], high: int) -> Float[Tensor, ""]:
    """Return 2 mean |x| / sqrt(high), the paper's first step; 1 where all values are zero."""
    step = 2 * x.detach().abs().mean() / math.sqrt(high)
    return torch.where(step > 0, step, torch.ones_like(step))


class _PositiveStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_step: Tensor) -> Tensor:
        step = log_step.exp()
        ctx.save_for_backward(step)
        return step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (step,) = ctx.saved_tensors
        return (gradients[0] / step).clamp(-1, 1)


def positive_step(log_step: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return s = exp(log_step), with the gradient g/s for g = dL/ds, not g s, and at most 1.

    Gradient descent then multiplies s by exp(-lr g/s): to first order the paper's s - lr g, and never below
    zero. The paper's own update crosses zero where learning rates are high, the layer's weights vanish, and
    BatchNorm behind it makes all gradients explode: seen with 5-bit stems at lr 0.1.
    """
    return _PositiveStep.apply(log_step)  # type: ignore[return-value]


class LsqWeight(nn.Module):
    """A weight at k paper bits whose step is learned: integers -(2^k - 1) to 2^k - 1.

    The paper's range is -2^(b-1) to 2^(b-1) - 1; this one is symmetric, so that k bits mean the same
    2^(k+1) - 1 values as for CSQ, BSQ and `SteWeight`. The step is updated as `positive_step` has it.

    Args:
        weight: The weight as it is now; sets the first step.
        bits: k, 1 to 8.
    """

    undecayed = ("log_step",)

    def __init__(self, weight: Float[Tensor, "*shape"], bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.limit = levels(bits)
        self.log_step = nn.Parameter(initial_step(weight, self.limit).log())
        self.gradient_scale = 1 / math.sqrt(weight.numel() * self.limit)

    @property
    def step(self) -> Float[Tensor, ""]:
        """The distance of neighbouring values."""
        return positive_step(self.log_step)

    @torch.no_grad()
    def set_step(self, step: float) -> None:
        """Set the distance of neighbouring values, above 0."""
        self.log_step.fill_(math.log(step))

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the quantized weight."""
        return lsq_quantize(weight, self.step, -self.limit, self.limit, self.gradient_scale)

    @torch.no_grad()
    def integers(self, weight: Float[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Shaped[Tensor, ""]]:
        """Return integers from -Q to Q and their scale; the product is what `forward` returns."""
        step = self.step
        return (weight / step).round().clamp(-self.limit, self.limit).to(torch.int32), step
