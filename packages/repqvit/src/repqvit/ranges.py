"""Range search: from a tensor to the scale and zero point of a uniform quantizer, for every channel at once.

The paper's search (official code, `UniformQuantizer.init_quantization_scale`) tries a few symmetric
percentiles and keeps the one with the least mean squared error. Done channel by channel it sorts every
channel several times; here one `topk` of the outermost 0.1 % of all channels together yields all percentiles.

Data come as *chunks*: a sequence of matrices `(samples, channels)` that together are the calibration tensor.
One chunk is the usual case; several give the same percentiles as their concatenation, without concatenating
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Chunks = Sequence[Float[Tensor, "_samples channels"]]

PAPER_PERCENTILES = (0.999, 0.9999, 0.99999)
"""The candidates of the official code; the first of equals wins."""

_GRID_STEPS = 50
"""Candidates of the `mse` search: the min-max range shrunk in steps of 1/50."""
_BINS = 4096
"""Bins of the histogram on which the `mse` grid of a whole tensor is judged: 16 a level at 8 bits."""


@dataclass(frozen=True)
class RangeSearch:
    """How a quantizer finds its range.

    kind:
        `percentile-mse` the paper's: the best of `percentiles` by mean squared error, per channel or per
        tensor; `percentile` the first of `percentiles`, without a choice; `minmax` the extremes; `mse` a grid
        of shrunk min-max ranges, the best by mean squared error (known as OMSE or MSE calibration).
    percentiles: upper percentiles in (0.5, 1]; the lower end is taken at one minus each. 1.0 is the extremes.
    """

    kind: Literal["percentile-mse", "percentile", "minmax", "mse"] = "percentile-mse"
    percentiles: tuple[float, ...] = PAPER_PERCENTILES

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0.5 < p <= 1 for p in self.percentiles):
            raise ValueError(f"percentiles must lie in (0.5, 1], got {self.percentiles}")


PAPER_SEARCH = RangeSearch()


class AffineFit(NamedTuple):
    """Scale and zero point of each channel, and the mean squared error that they leave."""

    scale: Float[Tensor, " channels"]
    zero_point: Float[Tensor, " channels"]
    mse: Float[Tensor, " channels"]


def percentile_ranges(
    chunks: Chunks, percentiles: Sequence[float]
) -> tuple[Float[Tensor, "percentiles channels"], Float[Tensor, "percentiles channels"]]:
    """Lower and upper percentiles of every channel, by linear interpolation between order statistics.

    Equal to `numpy.percentile(x, 100 p, axis=0)` and `numpy.percentile(x, 100 (1 - p), axis=0)`.
    """
    samples = sum(len(chunk) for chunk in chunks)
    # Position of the lower of the two order statistics, counted from the outside of the distribution.
    depth = max(math.ceil((samples - 1) * (1 - p)) for p in percentiles) + 2
    top = _largest(chunks, depth)
    bottom = -_largest([-chunk for chunk in chunks], depth)
    high = torch.stack([_interpolate(top, p, samples) for p in percentiles])
    low = torch.stack([_interpolate(bottom, p, samples) for p in percentiles])
    return low, high


def _largest(chunks: Chunks, count: int) -> Float[Tensor, "count channels"]:
    """The `count` largest values of each channel, descending; fewer where there are fewer samples."""
    tails = [chunk.topk(min(count, len(chunk)), dim=0).values for chunk in chunks]
    if len(tails) == 1:
        return tails[0]
    merged = torch.cat(tails)
    return merged.topk(min(count, len(merged)), dim=0).values


def _interpolate(tail: Float[Tensor, "depth channels"], p: float, samples: int) -> Float[Tensor, " channels"]:
    """Percentile p from a tail that is ordered from the outermost value inwards."""
    position = p * (samples - 1)  # counted from the far end, as numpy does; float64 keeps it exact
    lower = math.floor(position)
    inner = samples - 1 - lower
    outer = max(inner - 1, 0)
    return torch.lerp(tail[inner], tail[outer], position - lower)


def affine_parameters(
    low: Float[Tensor, "*channels"], high: Float[Tensor, "*channels"], bits: int
) -> tuple[Float[Tensor, "*channels"], Float[Tensor, "*channels"]]:
    """Scale s = (M - m) / (2^b - 1) and zero point z = round(-m / s) of the range [m, M] (paper, 3.1).

    The zero point is not clipped: a range that does not straddle 0 has z outside [0, 2^b - 1]. A channel that
    is constant (M = m up to float resolution) gets a scale and zero point that represent the constant
    exactly.
    """
    span = high - low
    magnitude = torch.maximum(low.abs(), high.abs())
    constant = span <= magnitude * 2.0**-20
    eps = torch.finfo(low.dtype).eps
    scale = torch.where(constant, magnitude.clamp_min(eps), span / (2**bits - 1))
    zero_point = torch.where(constant, (high < 0).to(low.dtype), torch.round(-low / scale))
    return scale, zero_point


def affine_parameters_with_zero(
    low: Float[Tensor, "*channels"], high: Float[Tensor, "*channels"], bits: int
) -> tuple[Float[Tensor, "*channels"], Float[Tensor, "*channels"]]:
    """As `affine_parameters`, with the range widened to hold 0: the zero point is then a legal code."""
    return affine_parameters(low.clamp_max(0), high.clamp_min(0), bits)


def symmetric_parameters(
    low: Float[Tensor, "*channels"], high: Float[Tensor, "*channels"], bits: int
) -> tuple[Float[Tensor, "*channels"], Float[Tensor, "*channels"]]:
    """Scale max(|m|, |M|) / (2^(b-1) - 1) of a symmetric quantizer; its zero is the middle code 2^(b-1).

    Most int8 kernels want weights in this form.
    """
    middle = 2 ** (bits - 1)
    magnitude = torch.maximum(low.abs(), high.abs()).clamp_min(torch.finfo(low.dtype).eps)
    return magnitude / (middle - 1), torch.full_like(magnitude, middle)


def fake_quantize(
    x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor | float, bits: int
) -> Float[Tensor, "*shape"]:
    """Values s (clip(round(x / s) + z, 0, 2^b - 1) - z), s and z broadcast against x; halves go to even."""
    # clip(r + z, 0, q) - z is clip(r, -z, q - z): two passes over memory fewer, and the same numbers.
    return (x / scale).round_().clamp_(-zero_point, 2**bits - 1 - zero_point).mul_(scale)


def squared_error(chunks: Chunks, scale: Tensor, zero_point: Tensor, bits: int) -> Float[Tensor, " channels"]:
    """Mean squared error of each channel after quantization."""
    return mean_error(chunks, lambda x: fake_quantize(x, scale, zero_point, bits))


def mean_error(chunks: Chunks, reconstruct: Callable[[Tensor], Tensor]) -> Float[Tensor, " channels"]:
    """Mean squared error of each channel between the chunks and their reconstruction (a new tensor)."""
    total = torch.zeros(chunks[0].shape[1], dtype=torch.float64, device=chunks[0].device)
    for chunk in chunks:
        # Summed pairwise in its own precision (torch does), to 1e-7; converting every value to float64 costs
        # more than all the rest of the search.
        total += reconstruct(chunk).sub_(chunk).square_().sum(0)
    return (total / sum(len(chunk) for chunk in chunks)).to(chunks[0].dtype)


def _candidates(chunks: Chunks, search: RangeSearch) -> tuple[Tensor, Tensor]:
    match search.kind:
        case "percentile-mse":
            return percentile_ranges(chunks, search.percentiles)
        case "percentile":
            return percentile_ranges(chunks, search.percentiles[:1])
        case "minmax":
            return percentile_ranges(chunks, [1.0])
        case "mse":
            low, high = percentile_ranges(chunks, [1.0])
            shrink = torch.linspace(1, 1 / _GRID_STEPS, _GRID_STEPS, dtype=low.dtype, device=low.device)
            return shrink[:, None] * low, shrink[:, None] * high


def _histogram_error(chunks: Chunks) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Mean squared error as a function of scale, zero point and bits, from a histogram of one channel.

    The grid has many candidates and a tensor many values; the histogram keeps the tails, which a sample would
    miss.
    """
    low = min(float(chunk.min()) for chunk in chunks)
    high = max(float(chunk.max()) for chunk in chunks)
    counts = torch.stack([torch.histc(chunk, _BINS, low, high) for chunk in chunks]).sum(
        0, dtype=torch.float64
    )
    width = (high - low) / _BINS
    centers = low + width * (torch.arange(_BINS, dtype=chunks[0].dtype, device=chunks[0].device) + 0.5)

    def error(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        squares = (fake_quantize(centers, scale, zero_point, bits) - centers).square_()
        return ((squares * counts).sum() / counts.sum()).to(centers.dtype).reshape(1)

    return error


def fit_affine(
    chunks: Chunks,
    bits: int,
    search: RangeSearch,
    parameters: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = affine_parameters,
) -> AffineFit:
    """Scale and zero point of every channel by the given search, over the very chunks that will be quantized.

    parameters: turns a range into scale and zero point; the symmetric weight scheme passes its own.
    """
    lows, highs = _candidates(chunks, search)
    if search.kind == "mse" and chunks[0].shape[1] == 1:
        error = _histogram_error(chunks)
    else:
        error = partial(squared_error, chunks)
    fits = []
    for low, high in zip(lows, highs, strict=True):
        scale, zero_point = parameters(low, high, bits)
        fits.append(AffineFit(scale, zero_point, error(scale, zero_point, bits)))
    errors = torch.stack([fit.mse for fit in fits])
    best = errors.argmin(dim=0)  # the first of equals, as in the official code

    def chosen(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).gather(0, best[None]).squeeze(0)

    return AffineFit(
        chosen([f.scale for f in fits]), chosen([f.zero_point for f in fits]), errors.amin(dim=0)
    )
