"""What the paper compares with: FQ-ViT, PTQ4ViT's twin uniform ranges and SmoothQuant.

All are written on the quantizer classes of the method itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from repqvit.quantizers import Quantizer
from repqvit.ranges import fake_quantize, mean_error, percentile_ranges


class PowerOfTwoFactor(Quantizer):
    """FQ-ViT's quantizer of LayerNorm outputs (Lin et al., 2021, section 3.2): power-of-two factors.

    Each channel has the scale s1 2^k with its own k in 0..3. s1 is an eighth of the min-max scale of the
    whole tensor; k is chosen for each channel by least squared error; there is one zero point. At inference
    the factor is a shift by k bits.
    """

    FACTORS = (1, 2, 4, 8)

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Choose k for every channel of tensors `(..., channels)`; `scale` then holds s1 2^k."""
        chunks = [x.reshape(-1, x.shape[-1]) for x in tensors]
        low, high = (ends.squeeze(0) for ends in percentile_ranges(chunks, [1.0]))
        coarse = (high.amax().clamp_min(0) - low.amin().clamp_max(0)) / (2**self.bits - 1)
        coarse = coarse.clamp_min(torch.finfo(low.dtype).eps)
        zero_point = (-low.amin().clamp_max(0) / coarse).round().reshape(1)
        scales = [coarse * factor / self.FACTORS[-1] for factor in self.FACTORS]
        errors = [
            mean_error(chunks, lambda x, s=s: fake_quantize(x, s, zero_point, self.bits)) for s in scales
        ]
        best = torch.stack(errors).argmin(0)
        self.set_parameters(torch.stack(scales)[best], zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """Round x `(..., channels)` to the levels of each channel's own scale."""
        return fake_quantize(x, self.scale, self.zero_point, self.bits)


class TwinUniformSoftmax(Quantizer):
    """PTQ4ViT's quantizer of post-softmax values (Yuan et al., ECCV 2022, section 3.2): two uniform ranges.

    One bit selects the range. The large values have the step s2 = 1 / 2^(b-1); the small ones s1 = s2 / 2^m,
    where m is chosen by least squared error (PTQ4ViT weights the error by a Hessian; the quantizer is the
    same).
    """

    MAX_EXPONENT = 12

    def _round_trip(self, x: Tensor, fine: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        small = (x / fine).round_().clamp_(0, half - 1).mul_(fine)
        large = (x * half).round_().clamp_(0, half - 1).div_(half)
        return torch.where(x < half * fine, small, large)

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Choose the step s1 of the small values, one for all elements; `scale` holds it."""
        chunks = [x.reshape(-1, 1) for x in tensors]
        exponents = torch.arange(1, self.MAX_EXPONENT + 1, device=chunks[0].device)
        fine = torch.exp2(-(self.bits - 1.0) - exponents.to(chunks[0].dtype))
        errors = torch.cat([mean_error(chunks, lambda x, s=s: self._round_trip(x, s)) for s in fine])
        best = fine[errors.argmin()].reshape(1)
        self.set_parameters(best, torch.zeros_like(best))

    def quantize(self, x: Tensor) -> Tensor:
        """Round x to multiples of s1 below 2^(b-1) s1, and to multiples of s2 from there on."""
        return self._round_trip(x, self.scale)


class TwinUniformGelu(Quantizer):
    """PTQ4ViT's quantizer of post-GELU values: a uniform range for each sign.

    The step of the negative range is s1 = |min| / (2^(b-1) - 1), so that it reaches the minimum; that of the
    positive range is s2 = 2^m s1, where m is chosen by least squared error.
    """

    MAX_EXPONENT = 12

    def _round_trip(self, x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        negative = (x / fine).round_().clamp_(1 - half, 0).mul_(fine)
        positive = (x / coarse).round_().clamp_(0, half - 1).mul_(coarse)
        return torch.where(x < 0, negative, positive)

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Take s1 from the minimum and choose s2; `scale` holds the two, in this order."""
        chunks = [x.reshape(-1, 1) for x in tensors]
        low, _ = percentile_ranges(chunks, [1.0])
        half = 2 ** (self.bits - 1)
        fine = (low.abs() / (half - 1)).reshape(1).clamp_min(torch.finfo(low.dtype).eps)
        coarse = fine * torch.exp2(torch.arange(0, self.MAX_EXPONENT + 1, device=fine.device).to(fine.dtype))
        errors = torch.cat([mean_error(chunks, lambda x, s=s: self._round_trip(x, fine, s)) for s in coarse])
        self.set_parameters(torch.cat([fine, coarse[errors.argmin()].reshape(1)]), torch.zeros_like(fine))

    def quantize(self, x: Tensor) -> Tensor:
        """Round negative values to multiples of s1, the others to multiples of s2."""
        return self._round_trip(x, self.scale[:1], self.scale[1:])


def smoothing_factors(
    activation_max: Float[Tensor, " channels"], weight_max: Float[Tensor, " channels"], alpha: float = 0.5
) -> Float[Tensor, " channels"]:
    """SmoothQuant's factors (Xiao et al., ICML 2023, eq. 4): max|X_j|^alpha / max|W_j|^(1 - alpha).

    Activations are divided by them and the weights' columns multiplied: `reparameterize.change_site` with no
    shift.
    """
    eps = torch.finfo(activation_max.dtype).eps
    factors = activation_max.clamp_min(eps).pow(alpha) / weight_max.clamp_min(eps).pow(1 - alpha)
    return factors.clamp_min(eps)


class AbsoluteMaximum(Quantizer):
    """Observes max|X_j| of each channel of the last axis, which SmoothQuant wants; `scale` holds it."""

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Take max|X_j| over all of the tensors `(..., channels)`."""
        maxima = torch.stack([x.reshape(-1, x.shape[-1]).abs().amax(0) for x in tensors]).amax(0)
        self.set_parameters(maxima, torch.zeros_like(maxima))

    def quantize(self, x: Tensor) -> Tensor:
        """Return x unchanged, as a copy: this class only observes."""
        return x.clone()
