"""Uniform quantization by the straight-through estimator, as DoReFa-Net and BSQ's finetuning have it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from shared_core import InputError


def levels(bits: int) -> int:
    """Return Q = 2^k - 1, the largest integer of k paper bits: values are -Q to Q, 2^(k+1) - 1 of them.

    BSQ and CSQ count magnitude bits. Every rival here is given the same values for the same count.

    Raises:
        InputError: bits is not within 1 to 8.

    >>> [2 * levels(k) + 1 for k in (1, 2, 3)]
    [3, 7, 15]
    """
    if not 1 <= bits <= 8:
        raise InputError("expected 1 to 8 bits a weight", field="bits", value=bits)
    return (1 << bits) - 1


class RoundStraightThrough(torch.autograd.Function):
    """Rounding to the nearest integer (ties to even) whose gradient is the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: object, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Round."""
        return x.round()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """Pass the gradient on."""
        return gradients[0]


def round_straight_through(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round to integers; the gradient passes unchanged."""
    return RoundStraightThrough.apply(x)  # type: ignore[return-value]


class SteWeight(nn.Module):
    """W -> S/Q round(Q |W|/S) sign W with S = max |W| and Q = 2^k - 1; the gradient passes unchanged.

    S follows the weights and is a constant for the gradient. This is max scaling: with one bit most weights
    round to zero, which is what the method is known for.

    Args:
        bits: k, 1 to 8.

    Source: Zhou et al. 2016 (DoReFa-Net); in this form Yang et al. 2021 (BSQ), finetuning.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.limit = levels(bits)
        self.bits = bits

    def scale(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """Return the distance of neighbouring values, S/Q; 1 where all weights are zero."""
        largest = weight.detach().abs().max()
        return torch.where(largest > 0, largest / self.limit, torch.ones_like(largest))

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the quantized weight."""
        scale = self.scale(weight)
        return round_straight_through(weight / scale) * scale

    @torch.no_grad()
    def integers(self, weight: Float[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Shaped[Tensor, ""]]:
        """Return integers from -Q to Q and their scale; the product is what `forward` returns."""
        scale = self.scale(weight)
        return (weight / scale).round().to(torch.int32), scale
