"""The two loops over bit planes: what runs in every step of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[..., None]


def forward(compiled: bool, like: Tensor) -> Kernel:
    """The kernel that adds planes into a weight."""
    return add_planes


def backward(compiled: bool, like: Tensor) -> Kernel:
    """The kernel that writes the gradients of planes."""
    return plane_gradients


def add_planes(
    positive: Tensor, negative: Tensor, factors: Tensor, temperature: Tensor, total: Tensor
) -> None:
    """Total += Σ_b factor_b [sigmoid(β m_p^b) - sigmoid(β m_n^b)], planes `(planes, weights)`."""
    bits = torch.mul(positive, temperature).sigmoid_()
    bits.sub_(torch.mul(negative, temperature).sigmoid_())
    total.addmv_(bits.T, factors)


def plane_gradients(
    positive: Tensor,
    negative: Tensor,
    factors: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    d_positive: Tensor,
    d_negative: Tensor,
    inner: Tensor,
) -> None:
    """Write ±factor_b p(1-p) G into d_positive and d_negative, and Σ_i (p_i - q_i) G_i into inner."""
    p = torch.mul(positive, temperature).sigmoid_()
    q = torch.mul(negative, temperature).sigmoid_()
    slope = torch.outer(factors, upstream)
    torch.ops.aten.sigmoid_backward.grad_input(slope, p, grad_input=d_positive)
    torch.ops.aten.sigmoid_backward.grad_input(slope.neg_(), q, grad_input=d_negative)
    inner.copy_(p.sub_(q) @ upstream)


def choose(kernel: str, weights: int) -> bool:
    """Whether to use the fused kernel for a model of so many weights."""
    return False
