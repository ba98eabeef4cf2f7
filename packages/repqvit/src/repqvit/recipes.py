"""What is quantized how: one immutable `Recipe`, and named recipes.

The names cover the paper's method, this package's variants of it, and the methods that it compares with.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field, replace
from typing import Literal

from repqvit import baselines
from repqvit.quantizers import MAX_BITS, MIN_BITS, Log2, LogSqrt2, Quantizer, UniformAffine
from repqvit.ranges import RangeSearch

NormForm = Literal["reparameterized", "per-tensor", "per-channel", "power-of-two-factor", "smooth"]
SoftmaxForm = Literal["log-sqrt2", "log2", "log2-unscaled", "uniform", "twin-uniform"]


@dataclass(frozen=True)
class Recipe:
    """Bit widths and forms of all quantizers of a model.

    Args:
        w_bits: weights, per output channel; 2 to 8.
        a_bits: activations, per tensor; 2 to 8.
        norm: LayerNorm outputs that feed linear layers. `reparameterized` is RepQ-ViT; `per-channel` its
            accurate and undeployable start; `per-tensor` the plain one; `power-of-two-factor` FQ-ViT;
            `smooth` SmoothQuant.
        softmax: post-softmax values. `log-sqrt2` is RepQ-ViT.
        gelu: post-GELU values, `uniform` or PTQ4ViT's `twin-uniform`.
        search: range search of activations; see `RangeSearch`.
        weight_search: range search of weights.
        weight_scheme: `asymmetric` is the paper's; `symmetric` suits more integer kernels.
        order: `fp-first` collects LayerNorm ranges on the floating-point model, reparameterizes, then
            calibrates everything else in one pass; `official` is the order of the official code, whose first
            pass runs with the un-reparameterized weights already quantized.
        round_zero_point: see `reparameterize.merge_channels`.
        zero_code: see `quantizers.log_encode`.
        stem_bits: input of the first layer; the paper keeps 8.
        norm_bits: width of LayerNorm outputs, where it differs from a_bits.
        softmax_bits: width of post-softmax values, where it differs from a_bits.
        head_bits: width of the heads' weights and inputs, where it differs (other papers keep 8).
        smooth_alpha: SmoothQuant's migration strength.
    """

    w_bits: int = 4
    a_bits: int = 4
    norm: NormForm = "reparameterized"
    softmax: SoftmaxForm = "log-sqrt2"
    gelu: Literal["uniform", "twin-uniform"] = "uniform"
    search: RangeSearch = field(default_factory=RangeSearch)
    weight_search: RangeSearch = field(default_factory=RangeSearch)
    weight_scheme: Literal["asymmetric", "symmetric"] = "asymmetric"
    order: Literal["fp-first", "official"] = "fp-first"
    round_zero_point: bool = True
    zero_code: bool = False
    stem_bits: int = 8
    norm_bits: int | None = None
    softmax_bits: int | None = None
    head_bits: int | None = None
    smooth_alpha: float = 0.5

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "stem_bits", "norm_bits", "softmax_bits", "head_bits"):
            bits = getattr(self, name)
            if bits is None:
                continue
            if not (isinstance(bits, numbers.Integral) and MIN_BITS <= int(bits) <= MAX_BITS):
                raise ValueError(f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
            object.__setattr__(self, name, int(bits))  # numpy's integers are no JSON

    def activation_quantizer(self, bits: int | None = None) -> Quantizer:
        """For any other activation: uniform, one scale, of width a_bits unless another is given."""
        return UniformAffine(bits or self.a_bits, search=self.search)

    @property
    def changes_variables(self) -> bool:
        """Whether LayerNorms and the linear layers after them are changed to suit one scale."""
        return self.norm in ("reparameterized", "smooth")

    def norm_quantizer(self, after_change: bool = False) -> Quantizer:
        """For a LayerNorm output that can take the recipe's form, before or after the change of variables."""
        bits = self.norm_bits or self.a_bits
        if after_change and self.changes_variables:
            return UniformAffine(bits, search=self.search)
        if self.norm == "power-of-two-factor":
            return baselines.PowerOfTwoFactor(bits)
        if self.norm == "smooth":
            return baselines.AbsoluteMaximum(bits)
        return UniformAffine(
            bits, per_channel=self.norm in ("reparameterized", "per-channel"), search=self.search
        )

    def softmax_quantizer(self) -> Quantizer:
        """For post-softmax values, in the recipe's form."""
        bits = self.softmax_bits or self.a_bits
        match self.softmax:
            case "log-sqrt2":
                return LogSqrt2(bits, self.search, self.zero_code)
            case "log2":
                return Log2(bits, self.search, self.zero_code)
            case "log2-unscaled":
                return Log2(bits, None, self.zero_code)
            case "uniform":
                return UniformAffine(bits, search=self.search)
            case "twin-uniform":
                return baselines.TwinUniformSoftmax(bits)


_PLAIN = Recipe(norm="per-tensor", softmax="uniform")

RECIPES: dict[str, Recipe] = {
    "repqvit": Recipe(),
    "repqvit-strict": Recipe(zero_code=True),
    "repqvit-official": Recipe(order="official", round_zero_point=False),
    "channelwise": Recipe(norm="per-channel"),
    "minmax": replace(_PLAIN, search=RangeSearch("minmax"), weight_search=RangeSearch("minmax")),
    "percentile": replace(_PLAIN, search=RangeSearch("percentile", (0.9999,))),
    "mse": replace(_PLAIN, search=RangeSearch("mse")),
    "percentile-mse": _PLAIN,
    "percentile-mse-log2": replace(_PLAIN, softmax="log2"),
    "fq-vit": Recipe(norm="power-of-two-factor", softmax="log2-unscaled"),
    "twin-uniform": Recipe(norm="per-tensor", softmax="twin-uniform", gelu="twin-uniform"),
    "smoothquant": Recipe(norm="smooth", softmax="uniform"),
}
"""Named recipes, at W4A4. `repqvit` is the method with integer zero points and the fp-first order.

`repqvit-strict` also takes the zero of the softmax out of the 2^b codes, which the paper has beside them.
`repqvit-official` reproduces the official code's numbers, `channelwise` is the method without
reparameterization.
"""


def named(name: str, w_bits: int = 4, a_bits: int = 4) -> Recipe:
    """The named recipe at the given widths. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return replace(RECIPES[name], w_bits=w_bits, a_bits=a_bits)
