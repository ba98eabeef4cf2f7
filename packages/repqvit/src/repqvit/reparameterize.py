"""LayerNorm scale reparameterization (paper, section 3.3): per-channel activation scales become one, exactly.

A LayerNorm output X' with a scale s_j and zero point z_j for each channel j is replaced by

    X~' = (X' + s r2) / r1,      r1 = s / s~,   r2 = z - z~,

whose quantizer has the one scale s~ and zero point z~ in every channel and yields the very same codes. The
LayerNorm emits X~' by its affine parameters; the linear layers that read it undo the change in their weights
and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PerTensor(NamedTuple):
    """Result of merging per-channel parameters: the one scale and zero point, and the change of variables."""

    scale: Float[Tensor, " 1"]
    zero_point: Float[Tensor, " 1"]
    ratio: Float[Tensor, " channels"]
    """r1 = s / s~."""
    shift: Float[Tensor, " channels"]
    """s r2, in the units of X'."""


def merge_channels(
    scale: Float[Tensor, " channels"],
    zero_point: Float[Tensor, " channels"],
    bits: int,
    round_zero_point: bool = True,
) -> PerTensor:
    """One scale and zero point for all channels: their means (paper, 3.3).

    Args:
        scale: positive scale of each channel.
        zero_point: integer zero point of each channel; may lie outside the codes.
        bits: width of the activation codes, 2 to 8.
        round_zero_point: whether the mean zero point is rounded and clipped to a legal code, so that codes
            are preserved exactly and there are 2^b of them. False leaves it fractional, as the official code
            does: up to 2^b + 1 distinct levels.
    """
    merged_scale = scale.mean().reshape(1)
    merged_zero_point = zero_point.mean().reshape(1)
    if round_zero_point:
        merged_zero_point = merged_zero_point.round().clamp(0, 2**bits - 1)
    return PerTensor(
        merged_scale, merged_zero_point, scale / merged_scale, scale * (zero_point - merged_zero_point)
    )


def change_norm(
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    ratio: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """LayerNorm affine parameters that emit (X' + shift) / ratio: gamma / r1 and (beta + s r2) / r1."""
    return weight / ratio, (bias + shift) / ratio


def change_linear(
    weight: Float[Tensor, "out channels"],
    bias: Float[Tensor, " out"] | None,
    ratio: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
) -> tuple[Float[Tensor, "out channels"], Float[Tensor, " out"]]:
    """Weight and bias that undo the change: W~ = W diag(r1), b~ = b - W (s r2), with the old W in both."""
    undo = weight @ shift
    return weight * ratio, -undo if bias is None else bias - undo


@torch.no_grad()
def change_site(
    norm: nn.LayerNorm,
    linears: Sequence[nn.Linear],
    ratio: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
    defer_shift: bool = False,
) -> Float[Tensor, " channels"] | None:
    """Apply the change of variables in place to a LayerNorm and to all linear layers that read its output.

    Args:
        norm: the LayerNorm; affine parameters that it lacks are created.
        linears: every linear layer fed by it. A bias that one lacks is created.
        ratio: r1, for each channel.
        shift: s r2, for each channel, in the units of the LayerNorm's output.
        defer_shift: leave the shift out of the LayerNorm, because zeros are padded to its output before it
            reaches the linear layers (Swin at sizes that are no multiple of the window): a padded zero must
            become s r2 / r1, too.

    Returns:
        The constant to add to the linear layers' input, s r2 / r1, where deferred; else None.
    """
    weight = torch.ones_like(ratio) if norm.weight is None else norm.weight
    bias = torch.zeros_like(ratio) if norm.bias is None else norm.bias
    new_weight, new_bias = change_norm(weight, bias, ratio, torch.zeros_like(shift) if defer_shift else shift)
    norm.weight, norm.bias = nn.Parameter(new_weight), nn.Parameter(new_bias)
    norm.elementwise_affine = True
    for linear in linears:
        new_weight, new_bias = change_linear(linear.weight, linear.bias, ratio, shift)
        linear.weight, linear.bias = nn.Parameter(new_weight), nn.Parameter(new_bias)
    return shift / ratio if defer_shift else None


def reparameterize_layernorm(
    norm: nn.LayerNorm,
    linears: Sequence[nn.Linear],
    scale: Float[Tensor, " channels"],
    zero_point: Float[Tensor, " channels"],
    bits: int,
    round_zero_point: bool = True,
) -> tuple[Float[Tensor, " 1"], Float[Tensor, " 1"]]:
    """Turn the per-channel quantizer of a LayerNorm's output into a per-tensor one, in place.

    Args:
        norm: LayerNorm over `channels`; changed in place.
        linears: all the linear layers that read its output; changed in place. In floating point the
            composition is the same function as before.
        scale: positive scale of each channel.
        zero_point: integer zero point of each channel; may lie outside the codes.
        bits: width of the activation codes, 2 to 8.
        round_zero_point: see `merge_channels`.

    Returns:
        The scale and the zero point, one element each, of the quantizer of the changed output. With it every
        element has the code that the per-channel quantizer gave to the old output.

    Source: Li et al., RepQ-ViT, ICCV 2023, section 3.3.
    """
    merged = merge_channels(scale, zero_point, bits, round_zero_point)
    change_site(norm, linears, merged.ratio, merged.shift)
    return merged.scale, merged.zero_point
