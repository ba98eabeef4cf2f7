"""The quantizers of the paper, section 3.1 and 3.4, and those of the methods that it compares with.

Pure functions on tensors first (`*_encode`: values to integer codes, `*_decode`: codes to values), then the
modules that find their parameters from calibration data and keep them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repqvit import lockstep
from repqvit.ranges import (
    PAPER_SEARCH,
    RangeSearch,
    affine_parameters,
    affine_parameters_with_zero,
    fake_quantize,
    fit_affine,
    mean_error,
    percentile_ranges,
)

MIN_BITS, MAX_BITS = 2, 8


def affine_encode(
    x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor, bits: int
) -> Float[Tensor, "*shape"]:
    """Codes q = clip(round(x / s) + z, 0, 2^b - 1): integers (for integer z) in the dtype of x."""
    return ((x / scale).round_() + zero_point).clamp_(0, 2**bits - 1)


def affine_decode(
    codes: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor
) -> Float[Tensor, "*shape"]:
    """Values s (q - z) of codes q."""
    return (codes - zero_point) * scale


def log_encode(
    a: Float[Tensor, "*shape"], scale: Tensor, bits: int, steps_per_octave: int, zero_code: bool
) -> Float[Tensor, "*shape"]:
    """Codes q = round(-k log2(a / s)), k steps an octave: k = 1 is log2, k = 2 is log-sqrt2 (paper, 3.4).

    Codes run from 0 (the value s) upwards. Values too small for the last code become the code 2^b, which
    decodes to 0: the official code's form, with 2^b + 1 levels. With `zero_code` the last of the 2^b codes,
    2^b - 1, is the zero instead: 2^b levels, a code of truly b bits.
    """
    last = 2**bits - 1 if zero_code else 2**bits
    return (a / scale).log2_().mul_(-steps_per_octave).round_().clamp_(0, last)  # a = 0: -log2 is +inf


def log_decode(
    codes: Float[Tensor, "*shape"], scale: Tensor, bits: int, steps_per_octave: int, zero_code: bool
) -> Float[Tensor, "*shape"]:
    """Values s 2^(-q / k) of codes q; the zero code gives 0.

    This is the definition; `log2_parity_decode` is what hardware computes.
    """
    last = 2**bits - 1 if zero_code else 2**bits
    return torch.where(codes >= last, 0.0, scale * torch.exp2(-codes / steps_per_octave))


def log2_parity_decode(
    codes: Float[Tensor, "*shape"], scale: Tensor, bits: int, zero_code: bool
) -> Float[Tensor, "*shape"]:
    """Values of log-sqrt2 codes q through base 2: s~(q) 2^(-ceil(q / 2)) (paper, 3.4).

    Here s~(q) = s [1 + P(q) (sqrt2 - 1)], and P(q) is the parity of q. Equal to `log_decode` with two steps
    an octave; the exponent is an integer, so that the power of two is a shift.
    """
    last = 2**bits - 1 if zero_code else 2**bits
    shift = (codes / 2).ceil_()
    odd = 2 * shift - codes  # 1 where q is odd
    factor = odd.mul_(math.sqrt(2) - 1).add_(1).mul_(scale)
    return torch.where(codes >= last, 0.0, factor.mul_(torch.exp2(shift.neg_())))


def _energy(x: Tensor) -> float:
    """Sum of squares."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square())


class Quantizer(nn.Module):
    """A quantizer that calibrates on the first tensor it sees when armed, and quantizes from then on.

    Subclasses set the buffers `scale` and `zero_point` in `fit` and quantize in `quantize`. States: `off`
    (identity, the state after construction), `armed` (calibrate on the next tensor, then on), `observing`
    (calibrate on the next tensor, then off) and `on`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, got {bits}")
        self.bits = bits
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))
        self.state = "off"
        self.sqnr_db = float("nan")
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Act as the state says: calibrate on x where it asks for that, then quantize x or return it."""
        if self.state == "off":
            return x
        if self.state == "observing":
            lockstep.meet(self, x)
            self.state = "off"
            return x
        if self.state == "armed":
            lockstep.meet(self, x)
        self.calls += 1
        return self.quantize(x)

    def fit_from(self, tensors: Sequence[Tensor]) -> None:
        """Calibrate on the given tensors (together they are the calibration batch) and switch on."""
        signal = sum(_energy(x) for x in tensors)
        if not math.isfinite(signal):
            raise ValueError("non-finite values reached a quantizer: the model overflows on this input")
        self.fit(tensors)
        self.state = "on"
        noise = sum(_energy(self.quantize(x).sub_(x)) for x in tensors)
        self.sqnr_db = 10 * math.log10(signal / noise) if noise and signal else math.inf

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take parameters as given and switch on."""
        self.scale, self.zero_point = scale, zero_point
        self.state = "on"

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Set `scale` and `zero_point` from the parts of the calibration batch; subclasses define it."""
        raise TypeError(f"{type(self).__name__} has no calibration")

    def quantize(self, x: Tensor) -> Tensor:
        """A new tensor with the values of x rounded to the quantizer's levels; subclasses define it."""
        raise TypeError(f"{type(self).__name__} has no quantization")

    def extra_repr(self) -> str:
        """Width, number of scales and state, for the printed model."""
        return f"bits={self.bits}, scales={self.scale.numel()}, {self.state}"


class UniformAffine(Quantizer):
    """Uniform asymmetric quantizer of activations (paper, 3.1), per tensor or per channel.

    Args:
        bits: 2 to 8.
        per_channel: one scale and zero point for each index of the last axis, instead of one for the tensor.
        search: how the range is found.
    """

    def __init__(self, bits: int, per_channel: bool = False, search: RangeSearch = PAPER_SEARCH) -> None:
        super().__init__(bits)
        self.per_channel = per_channel
        self.search = search

    def _columns(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1] if self.per_channel else 1)

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Search the range of the whole tensor, widened to hold 0, or of every channel as it is."""
        parameters = affine_parameters if self.per_channel else affine_parameters_with_zero
        fitted = fit_affine([self._columns(x) for x in tensors], self.bits, self.search, parameters)
        self.set_parameters(fitted.scale, fitted.zero_point)

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take parameters as given, of one element or one for each channel, and switch on."""
        super().set_parameters(scale, zero_point)
        self._number_of = (-1, -1)

    def _zero_point(self) -> Tensor | float:
        """One zero point as a number: clamping to numbers is faster, and needs no device synchronization."""
        if self.zero_point.numel() != 1 or self.zero_point.is_meta:
            return self.zero_point
        current = (id(self.zero_point), self.zero_point._version)  # another after `to` or `load_state_dict`
        if self._number_of != current:
            self._number, self._number_of = float(self.zero_point), current
        return self._number

    def quantize(self, x: Tensor) -> Tensor:
        """Values s (q - z) of the codes q of x, in its shape."""
        return fake_quantize(x, self.scale, self._zero_point(), self.bits)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of x."""
        return affine_encode(x, self.scale, self.zero_point, self.bits)


class Log2(Quantizer):
    """Base-2 logarithmic quantizer of post-softmax values: s 2^(-q).

    Args:
        bits: 2 to 8.
        search: how the scale s, the value of code 0, is found; None takes s = 1 (FQ-ViT's form).
        zero_code: see `log_encode`.
    """

    steps_per_octave = 1

    def __init__(self, bits: int, search: RangeSearch | None = PAPER_SEARCH, zero_code: bool = False) -> None:
        super().__init__(bits)
        self.search = search
        self.zero_code = zero_code

    def fit(self, tensors: Sequence[Tensor]) -> None:
        """Choose s by mean squared error, or take 1 without a search; ValueError for negative values."""
        if any((x < 0).any() for x in tensors):
            raise ValueError("a logarithmic quantizer takes probabilities, and negative values reached it")
        if self.search is None:
            self.set_parameters(tensors[0].new_ones(1), tensors[0].new_zeros(1))
            return
        chunks = [x.reshape(-1, 1) for x in tensors]
        percentiles = self.search.percentiles if self.search.kind == "percentile-mse" else (1.0,)
        _, highs = percentile_ranges(chunks, percentiles)
        scales = highs.clamp_min(torch.finfo(highs.dtype).tiny)
        errors = [mean_error(chunks, lambda x, s=scale: self._round_trip(x, s)) for scale in scales]
        best = int(torch.stack(errors).argmin())
        self.set_parameters(scales[best], torch.zeros_like(scales[best]))

    def _round_trip(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._decode(log_encode(x, scale, self.bits, self.steps_per_octave, self.zero_code), scale)

    def _decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return log_decode(codes, scale, self.bits, self.steps_per_octave, self.zero_code)

    def quantize(self, x: Tensor) -> Tensor:
        """Values of the codes of x, in its shape; too small ones become 0."""
        return self._round_trip(x, self.scale)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of x."""
        return log_encode(x, self.scale, self.bits, self.steps_per_octave, self.zero_code)


class LogSqrt2(Log2):
    """Base-sqrt2 logarithmic quantizer (paper, 3.4).

    Its scale is searched for base sqrt2; values are computed in base 2 with the parity factor.
    """

    steps_per_octave = 2

    def _decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return log2_parity_decode(codes, scale, self.bits, self.zero_code)
