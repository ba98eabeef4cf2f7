"""BSQ, Yang et al., ICLR 2021: bit planes trained by straight-through rounding and pruned by group lasso."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from csq.rivals.lsq import positive_step
from csq.rivals.ste import round_straight_through

PLANES = 8
"""Planes that a layer may have at most: growth on overflow ends here."""


class BsqWeight(nn.Module):
    """W = s round(sum_b 2^b (p_b - n_b)) / (2^n - 1), planes p, n continuous in [0, 2] (section 3.2).

    The planes start as the bits of the given weight, rounded to 8 bits, and the scale as max |W|. The number
    n of planes in use changes at `requantize` only; planes n to 7 are zero. Everything that changes is in
    the state dict.

    Args:
        weight: The weight of a trained model.
    """

    undecayed = ("planes", "log_scale")

    planes: Tensor
    n_planes: Tensor
    steps_done: Tensor

    def __init__(self, weight: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        weight = weight.detach()
        largest = weight.abs().max()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        self.log_scale = nn.Parameter(scale.log())
        integers = (weight / scale * (2**PLANES - 1)).round().to(torch.int64)
        self.planes = nn.Parameter(_bits(integers).to(weight.dtype))
        self.register_buffer("n_planes", torch.tensor(PLANES))
        self.register_buffer("steps_done", torch.tensor(0))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """s, learned in the form that never crosses zero (`csq.rivals.lsq.positive_step`)."""
        return positive_step(self.log_scale)

    @property
    def bits(self) -> int:
        """The number of planes in use, BSQ's bits of the layer."""
        return int(self.n_planes)

    def _sum(self) -> Float[Tensor, "*shape"]:
        """The sum over planes before rounding, lowest place value first."""
        total = torch.zeros_like(self.planes[0, 0])
        for place in range(self.bits):
            total = total + (self.planes[0, place] - self.planes[1, place]) * 2.0**place
        return total

    def right_inverse(self, weight: Float[Tensor, "*shape"]) -> tuple[()]:
        """Asked by torch which tensors to keep beside the planes: none."""
        return ()

    def forward(self) -> Float[Tensor, "*shape"]:
        """Return the quantized weight."""
        return self.scale / ((1 << self.bits) - 1) * round_straight_through(self._sum())

    @torch.no_grad()
    def integers(self) -> tuple[Int[Tensor, "*shape"], Shaped[Tensor, ""]]:
        """Return the integers and their scale; the product is what `forward` returns."""
        return self._sum().round().to(torch.int32), self.scale / ((1 << self.bits) - 1)

    def lasso(self) -> Float[Tensor, ""]:
        """Return sum_b sqrt(1e-8 + ||[p_b; n_b]||^2) over the planes in use (equation 4)."""
        used = self.planes[:, : self.bits]
        return (used.square().transpose(0, 1).flatten(1).sum(1) + 1e-8).sqrt().sum()

    @torch.no_grad()
    def clip(self) -> None:
        """Put the planes back into [0, 2]; to be done after every step of the optimizer."""
        self.planes.clamp_(0, 2)

    @torch.no_grad()
    def requantize(self, min_bits: int = 1) -> int:
        """Make the planes binary again and drop empty ones at both ends (section 3.3); return their number.

        The weight stays the same: an overflow above 2^n - 1 grows planes, up to 8 (above, integers are cut
        off), dropped low planes go into the scale.

        Args:
            min_bits: Planes that a layer keeps, also where all of its integers are zero.
        """
        integers = self._sum().round().to(torch.int64)
        step = self.scale / ((1 << self.bits) - 1)
        limit = (1 << PLANES) - 1
        integers = integers.clamp(-limit, limit)
        magnitude = integers.abs()
        used = [place for place in range(PLANES) if bool(((magnitude >> place) & 1).any())]
        low = used[0] if used else 0
        bits = max(used[-1] - low + 1 if used else 0, min_bits)
        integers = integers.sign() * (magnitude >> low)
        self.planes.copy_(_bits(integers))
        self.log_scale.copy_((step * (1 << low) * ((1 << bits) - 1)).log())
        self.n_planes.fill_(bits)
        return bits


def _bits(integers: Int[Tensor, "*shape"]) -> Int[Tensor, "2 planes *shape"]:
    """Binary digits of the positive integers and of the negative ones, lowest first."""
    places = torch.arange(PLANES, device=integers.device).view(-1, *[1] * integers.dim())
    return torch.stack([(side.clamp_min(0) >> places) & 1 for side in (integers, -integers)])


def bsq_penalty(layers: Iterable[BsqWeight]) -> Float[Tensor, ""]:
    """Return sum_l (#params_l #bits_l / #params) lasso_l, the memory-weighted group lasso (equation 5)."""
    layers = list(layers)
    sizes = [layer.planes[0, 0].numel() for layer in layers]
    terms = [
        layer.lasso() * (size * layer.bits / sum(sizes)) for layer, size in zip(layers, sizes, strict=True)
    ]
    return torch.stack(terms).sum()
