"""Tables and pictures of what quantization did to each layer, for `repqvit inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repqvit.evaluation import norm_ranges
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantizedWeight, QuantLinear
from repqvit.quantized import Batch, QuantizedModel, prepared_copy
from repqvit.quantizers import Quantizer, UniformAffine
from repqvit.tracing import NormSite


@dataclass(frozen=True)
class TensorRow:
    """One quantized tensor; `scale` and `zero_point` are the smallest and the largest of its channels."""

    name: str
    role: str
    bits: int
    form: str
    scales: int
    scale: tuple[float, float]
    zero_point: tuple[float, float]
    sqnr_db: float


def tensor_rows(quantized: QuantizedModel) -> list[TensorRow]:
    """Every quantized tensor of the model, layer by layer in the order of the module tree."""
    sqnr = {(row.name, row.role): row.sqnr_db for row in quantized.report.layers}
    return [
        TensorRow(
            name,
            role,
            part.bits,
            type(part).__name__ if isinstance(part, Quantizer) else _weight_form(part),
            part.scale.numel(),
            _ends(part.scale),
            _ends(part.zero_point),
            sqnr.get((name, role), math.nan),
        )
        for name, role, part in _parts(quantized.model)
    ]


def _parts(model: nn.Module) -> Iterator[tuple[str, str, Quantizer | QuantizedWeight]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            yield name, "weight", module.quantized
            yield name, "input", module.input_quantizer
        elif isinstance(module, AttentionQuantizers):
            owner = name.removesuffix(".attention_quantizers")
            for role in ("query", "key", "softmax", "value"):
                yield owner, role, getattr(module, role)


def _weight_form(weight: QuantizedWeight) -> str:
    return "symmetric" if weight.symmetric else "UniformAffine"


def _ends(values: Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (math.nan, math.nan)


@dataclass(frozen=True)
class NormRanges:
    """Channel ranges of a LayerNorm's output: in floating point, and as quantized linear layers read it."""

    site: NormSite
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]
    quantizer: Quantizer

    @property
    def spread_before(self) -> float:
        """The widest channel's range over the median one's, in the floating-point model."""
        return _spread(self.before)

    @property
    def spread_after(self) -> float:
        """The same in the quantized model: 1 would suit one scale best."""
        return _spread(self.after)


def _spread(ranges: tuple[Tensor, Tensor]) -> float:
    width = ranges[1] - ranges[0]
    return float(width.max() / width.median().clamp_min(torch.finfo(width.dtype).tiny))


def compare_norms(reference: nn.Module, quantized: QuantizedModel, images: Batch) -> list[NormRanges]:
    """Channel ranges at every changed site before and after, on a batch."""
    sites = quantized.report.changed_sites
    names = [site.norm for site in sites]
    before = norm_ranges(prepared_copy(reference), names, images)
    after = norm_ranges(quantized.model, names, images)
    found = []
    for site in sites:
        linear = quantized.model.get_submodule(site.linears[0])
        assert isinstance(linear, QuantLinear)
        low, high = after[site.norm]
        if linear.input_shift is not None:  # added after the padding, see `reparameterize.change_site`
            shift = linear.input_shift.cpu()
            low, high = low + shift, high + shift
        found.append(NormRanges(site, before[site.norm], (low, high), linear.input_quantizer))
    return found


def draw_norms(ranges: list[NormRanges], folder: Path) -> list[Path]:
    """One picture a site: the range of each channel, and the histogram of their widths, before and after."""
    from shared_core import plot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for item in ranges:
        figure, axes = plot.figure(2, 2, width=1200, height=800, title=f"Output of {item.site.norm}")
        widths = [high - low for low, high in (item.before, item.after)]
        for column, (low, high) in enumerate((item.before, item.after)):
            order = (high - low).argsort()
            channels = torch.arange(len(order)).numpy()
            above, below = axes[column], axes[2 + column]
            above.fill_between(
                channels, low[order].numpy(), high[order].numpy(), step="mid", color=plot.COLOURS[column]
            )
            above.set(xlabel="channel, by width of its range", ylabel="minimum to maximum")
            below.hist(widths[column].numpy(), bins=40, color=plot.COLOURS[column])
            below.set(xlabel="width of a channel's range", ylabel="channels")
        axes[0].set_title(f"before: widest / median channel = {item.spread_before:.1f}")
        axes[1].set_title(f"after: widest / median channel = {item.spread_after:.1f}")
        if isinstance(item.quantizer, UniformAffine) and item.quantizer.scale.numel() == 1:
            for end in _representable(item.quantizer):
                axes[1].axhline(end, color="#000000", linewidth=1, linestyle="--")
            axes[1].set_title(
                f"after: widest / median channel = {item.spread_after:.1f}; dashed: ends of the "
                f"{item.quantizer.bits}-bit codes"
            )
        path = folder / f"{item.site.norm}.png"
        plot.save(figure, path)
        drawn.append(path)
    return drawn


def _representable(quantizer: UniformAffine) -> tuple[float, float]:
    """The smallest and the largest value that the quantizer's codes stand for."""
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    return -zero_point * scale, (2**quantizer.bits - 1 - zero_point) * scale
