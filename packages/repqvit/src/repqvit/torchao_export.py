"""Deployment within PyTorch: linear layers as torchao's int8 tensors with static activation scales.

torchao multiplies int8 activations by int8 weights, with one scale and zero point for the activation tensor
(which reparameterization provides) and a symmetric scale for each weight row.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repqvit.hosts import set_submodule
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantLinear
from repqvit.quantized import QuantizedModel
from repqvit.quantizers import UniformAffine
from shared_core import InputError

_OFFSET = 128  # codes are 0..255 here and -128..127 in torchao


def to_torchao(quantized_model: QuantizedModel) -> nn.Module:
    """Turn a model with 8-bit activations into one whose linear layers run in torchao's int8 kernels.

    Everything else is floating point: the patch embedding has its dequantized weight, and attention is the
    host's own `scaled_dot_product_attention` on unquantized operands. `torch.compile` fuses the activation
    quantization into the kernels around it.

    Args:
        quantized_model: of `quantize(model, images, Recipe(w_bits=8, a_bits=8, weight_scheme="symmetric"))`,
            or with fewer w_bits, which are stored in 8; left unchanged.

    Returns:
        A model called like the original.

    Warns:
        UserWarning: for 8-bit weights on an x86 processor without VNNI instructions. Products are added there
            in pairs, in 16 bits: 255 (127 + 127) does not fit, and the outputs are far off; with weights of 7
            bits 255 (64 + 64) does fit, and they are exact everywhere.

    Raises:
        InputError: torchao is missing; weights have zero points, which its kernel ignores; activations are
            narrower than 8 bits, which it would not clip; an activation has more than one scale.

    Example:
        >>> import timm, torch, repqvit
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10, img_size=32).eval()
        >>> recipe = repqvit.Recipe(w_bits=7, a_bits=8, weight_scheme="symmetric")
        >>> fast = to_torchao(repqvit.quantize(model, torch.randn(8, 3, 32, 32), recipe))
        >>> fast(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    try:
        import torchao.quantization  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("torchao is not installed: pip install 'repqvit[torchao]'") from error
    model = copy.deepcopy(quantized_model.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            set_submodule(model, name, _Int8Linear(name, module))
        elif isinstance(module, QuantConv2d):
            module.input_quantizer.state = "off"
        elif isinstance(module, AttentionQuantizers):
            for quantizer in (module.query, module.key, module.softmax, module.value):
                quantizer.state = "off"
    layers = [module for module in quantized_model.modules() if isinstance(module, QuantLinear)]
    if any(layer.quantized.bits == 8 for layer in layers) and _saturates(layers[0].weight.device):
        warnings.warn(
            "int8 products saturate on this processor (x86 without VNNI instructions): with 8-bit weights "
            "the outputs will be wrong here; quantize with w_bits=7, or run the model elsewhere",
            stacklevel=2,
        )
    return model


def _saturates(device: torch.device) -> bool:
    """Whether the kernel that torchao calls on this machine adds pairs of products in 16 bits."""
    from torchao.kernel import int_scaled_matmul

    inner = 32
    largest = torch.full((inner, inner), 127, dtype=torch.int8, device=device)
    sums = int_scaled_matmul(largest, largest, torch.ones(1, 1, device=device))
    return bool((sums != inner * 127**2).any())


def _check(name: str, layer: QuantLinear) -> None:
    activation, weight = layer.input_quantizer, layer.quantized
    if not weight.symmetric:
        raise InputError(
            "torchao's int8 product ignores zero points of weights: quantize with "
            'Recipe(weight_scheme="symmetric")',
            field=name,
        )
    if not isinstance(activation, UniformAffine) or activation.scale.numel() != 1:
        raise InputError("torchao takes one scale for an activation tensor", field=name)
    if activation.bits != 8:
        raise InputError(
            "torchao's static int8 activations have 8 bits, and would not clip narrower codes",
            field=name,
            value=activation.bits,
        )
    if float(activation.zero_point) != round(float(activation.zero_point)):
        raise InputError("torchao needs an integer zero point: see Recipe.round_zero_point", field=name)


class _Int8Linear(nn.Linear):
    """`nn.Linear` whose weight is a torchao `Int8Tensor`; see `QuantLinear`."""

    def __init__(self, name: str, layer: QuantLinear) -> None:
        _check(name, layer)
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(_int8_weight(layer), requires_grad=False)
        self.bias = layer.bias
        self.input_shift: Tensor | None
        self.register_buffer("input_shift", layer.input_shift)

    def forward(self, input: Tensor) -> Tensor:
        """The product on rows: torchao's activation scale fixes the number of axes."""
        x = input if self.input_shift is None else input + self.input_shift
        return F.linear(x.reshape(-1, self.in_features), self.weight, self.bias).unflatten(0, x.shape[:-1])


def _int8_weight(layer: QuantLinear) -> Any:
    from torchao.quantization import PerTensor
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        Int8Tensor,
        QuantizeTensorToInt8Kwargs,
    )

    weight, activation = layer.quantized, layer.input_quantizer
    middle = 2 ** (weight.bits - 1)
    codes = (weight.codes.to(torch.int16) - middle).to(torch.int8)
    return Int8Tensor(
        codes,
        weight.scale[:, None],
        block_size=[1, layer.in_features],
        dtype=torch.float32,
        zero_point=torch.zeros_like(weight.scale[:, None], dtype=torch.int8),
        act_quant_scale=activation.scale.view(1, 1),
        act_quant_zero_point=(activation.zero_point - _OFFSET).to(torch.int8).view(1, 1),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(
            granularity=PerTensor(), mapping_type=MappingType.ASYMMETRIC
        ),
    )
