"""The modules that a quantized model is made of: linear and convolution layers, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repqvit.quantizers import Quantizer, affine_decode, affine_encode
from repqvit.ranges import (
    PAPER_SEARCH,
    RangeSearch,
    affine_parameters_with_zero,
    fit_affine,
    symmetric_parameters,
)


class QuantizedWeight(nn.Module):
    """Integer codes of a weight with a scale and zero point for each output channel.

    `codes` is uint8 `(out, in...)`, `scale` and `zero_point` are `(out,)`; the weight is scale (codes -
    zero_point).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, symmetric: bool = False, search: RangeSearch = PAPER_SEARCH) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.search = search
        for name in ("codes", "scale", "zero_point"):
            self.register_buffer(name, torch.empty(0))
        self.sqnr_db = float("nan")

    @torch.no_grad()
    def fit(self, weight: Float[Tensor, " out *rest"]) -> Float[Tensor, " out *rest"]:
        """Search the range of every output channel, keep the codes, and return the dequantized weight."""
        rows = weight.detach().flatten(1)
        parameters = symmetric_parameters if self.symmetric else affine_parameters_with_zero
        fitted = fit_affine([rows.T], self.bits, self.search, parameters)
        self.scale, self.zero_point = fitted.scale, fitted.zero_point
        codes = affine_encode(rows, self.scale[:, None], self.zero_point[:, None], self.bits)
        self.codes = codes.to(torch.uint8).view(weight.shape)
        noise = float(fitted.mse.sum()) * rows.shape[1]
        signal = float(rows.square().sum())
        self.sqnr_db = 10 * math.log10(signal / noise) if noise and signal else math.inf
        return self.dequantize()

    def dequantize(self) -> Float[Tensor, " out *rest"]:
        """The floating-point weight that the codes stand for: scale (codes - zero_point), row by row."""
        per_row = (-1, *[1] * (self.codes.ndim - 1))
        return affine_decode(
            self.codes.to(self.scale.dtype), self.scale.view(per_row), self.zero_point.view(per_row)
        )


class _WithQuantizedWeight:
    """A layer whose `weight` is the original one until `quantize_weight`, then the dequantized one."""

    weight: Tensor
    quantized: QuantizedWeight

    def quantize_weight(self) -> None:
        self.weight = nn.Parameter(self.quantized.fit(self.weight), requires_grad=False)

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        self.quantized.codes, self.quantized.scale, self.quantized.zero_point = codes, scale, zero_point
        self.weight = nn.Parameter(self.quantized.dequantize(), requires_grad=False)


class QuantLinear(_WithQuantizedWeight, nn.Linear):
    """`nn.Linear` with a quantizer on its input and a quantized weight.

    `input_shift`, where set, is added to the input first: see `reparameterize.change_site`.
    """

    def __init__(self, source: nn.Linear, input_quantizer: Quantizer, quantized: QuantizedWeight) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        self.weight = source.weight
        self.bias = source.bias
        self.input_quantizer = input_quantizer
        self.quantized = quantized
        self.input_shift: Tensor | None
        self.register_buffer("input_shift", None)

    def forward(self, input: Tensor) -> Tensor:
        """Shift and quantize an input `(..., in_features)`, then multiply it with the present `weight`."""
        x = input if self.input_shift is None else input + self.input_shift
        return F.linear(self.input_quantizer(x), self.weight, self.bias)


class QuantConv2d(_WithQuantizedWeight, nn.Conv2d):
    """`nn.Conv2d` with a per-tensor quantizer on its input and a quantized weight; see `QuantLinear`."""

    def __init__(self, source: nn.Conv2d, input_quantizer: Quantizer, quantized: QuantizedWeight) -> None:
        super().__init__(
            source.in_channels,
            source.out_channels,
            source.kernel_size,  # pyright: ignore[reportArgumentType]  # torch types it as a plain tuple
            source.stride,  # pyright: ignore[reportArgumentType]
            source.padding,  # pyright: ignore[reportArgumentType]
            source.dilation,  # pyright: ignore[reportArgumentType]
            source.groups,
            bias=False,
            padding_mode=source.padding_mode,  # pyright: ignore[reportArgumentType]
            device="meta",
        )
        self.weight = source.weight
        self.bias = source.bias
        self.input_quantizer = input_quantizer
        self.quantized = quantized

    def forward(self, input: Tensor) -> Tensor:
        """Quantize an input `(batch, in_channels, height, width)`, then convolve it with `weight`."""
        return self._conv_forward(self.input_quantizer(input), self.weight, self.bias)


class AttentionQuantizers(nn.Module):
    """The four operands of attention's two matrix products: q, k, the softmax output, and v."""

    def __init__(self, query: Quantizer, key: Quantizer, softmax: Quantizer, value: Quantizer) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.softmax = softmax
        self.value = value

    @property
    def off(self) -> bool:
        """Whether the operands are left as they are; the softmax quantizer's state stands for all four."""
        return self.softmax.state == "off"

    def forward(
        self,
        query: Float[Tensor, "... queries width"],
        key: Float[Tensor, "... keys width"],
        value: Float[Tensor, "... keys value_width"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "... queries value_width"]:
        """`scaled_dot_product_attention` with quantized operands.

        q is quantized before the scaling by 1/sqrt(d); a constant factor changes nothing for a per-tensor
        quantizer.
        """
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (self.query(query) * scale) @ self.key(key).transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~attn_mask, float("-inf"))
            else:
                logits = logits + attn_mask
        probabilities = self.softmax(logits.softmax(dim=-1))
        return F.dropout(probabilities, dropout_p) @ self.value(value)


class _Redirect(TorchFunctionMode):
    """Within it, calls of scaled_dot_product_attention go to the given quantizers."""

    def __init__(self, attention: AttentionQuantizers) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _QuantizedAttention:
    """Mixed in before a host's attention class: its forward, with redirected scaled_dot_product_attention."""

    attention_quantizers: AttentionQuantizers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.attention_quantizers.off:
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        with _Redirect(self.attention_quantizers):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def quantize_attention(module: nn.Module, quantizers: AttentionQuantizers) -> None:
    """Make an attention module use the quantizers, in place.

    It stays an instance of its class: its new class is a subclass, as with torch's parametrizations.
    """
    cls = type(module)
    module.__class__ = type(f"Quantized{cls.__name__}", (_QuantizedAttention, cls), {})
    module.attention_quantizers = quantizers
