"""Reference integer kernels: what hardware computes in place of the simulated products of a quantized model.

Inputs are codes, sums are int32, and floating point comes in once, at the end. They are written to be checked
against, not to be fast; `onnx_export` writes models for runtimes that have fast ones.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from repqvit.layers import QuantLinear
from repqvit.quantizers import UniformAffine
from shared_core import InputError

INT32_MAX = 2**31 - 1


def integer_product(
    x_codes: Integer[Tensor, "*batch rows inner"],
    x_zero_point: int,
    w_codes: Integer[Tensor, "outputs inner"],
    w_zero_point: Integer[Tensor, " outputs"],
    x_bits: int = 8,
    w_bits: int = 8,
) -> Integer[Tensor, "*batch rows outputs"]:
    """Sum of (x_k - z_x) (w_k - z_w) over k in int32: codes times codes, zero points taken off afterwards.

    sum (x - z_x)(w - z_w) = sum x w - z_x sum w - z_w (sum x - K z_x); the second term is a constant of the
    weight.

    Args:
        x_codes: activation codes, 0 to 2^x_bits - 1.
        x_zero_point: their one zero point, a code.
        w_codes: weight codes, 0 to 2^w_bits - 1.
        w_zero_point: one zero point for each output, codes.
        x_bits: width of the activation codes, for the overflow bound.
        w_bits: width of the weight codes.

    Raises:
        InputError: if the sum could leave int32: K (2^x_bits - 1) (2^w_bits - 1) must stay below 2^31.
    """
    inner = w_codes.shape[-1]
    if inner * (2**x_bits - 1) * (2**w_bits - 1) > INT32_MAX:
        raise InputError(
            f"a sum of {inner} products of {x_bits}-bit and {w_bits}-bit codes does not fit in int32",
            field="inner",
        )
    x, w, w_zero = x_codes.int(), w_codes.int(), w_zero_point.int()
    of_codes = x @ w.T
    x_share = x_zero_point * w.sum(-1, dtype=torch.int32)
    w_share = (x.sum(-1, keepdim=True, dtype=torch.int32) - inner * x_zero_point) * w_zero
    return of_codes - x_share - w_share


def integer_linear(layer: QuantLinear, x: Float[Tensor, "*batch inner"]) -> Float[Tensor, "*batch outputs"]:
    """A quantized linear layer through integers: encode, `integer_product`, one rescaling, bias.

    Equal to `layer(x)` up to the rounding of the simulated model's floating-point sum.

    Raises:
        InputError: if the activation quantizer is not per tensor with an integer zero point.
    """
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, UniformAffine) or quantizer.scale.numel() != 1:
        raise InputError("an integer product needs one activation scale", value=type(quantizer).__name__)
    zero_point = float(quantizer.zero_point)
    if not zero_point.is_integer():
        raise InputError("an integer product needs an integer zero point", value=zero_point)
    if layer.input_shift is not None:
        x = x + layer.input_shift
    codes = quantizer.encode(x).to(torch.uint8)
    weight = layer.quantized
    flat = codes.reshape(-1, codes.shape[-1])
    total = integer_product(
        flat, int(zero_point), weight.codes, weight.zero_point.int(), quantizer.bits, weight.bits
    )
    out = total.to(x.dtype) * (quantizer.scale * weight.scale)
    out = out.view(*x.shape[:-1], -1)
    return out if layer.bias is None else out + layer.bias


def largest_shift(softmax_bits: int, zero_code: bool) -> int:
    """E, the exponent ceil(q / 2) of the last softmax code q that is not zero."""
    last = 2**softmax_bits - (2 if zero_code else 1)
    return (last + 1) // 2


def log_attention_accumulators(
    softmax_codes: Integer[Tensor, "*batch queries keys"],
    v_codes: Integer[Tensor, "*batch keys width"],
    v_zero_point: int,
    softmax_bits: int,
    v_bits: int,
    zero_code: bool,
) -> tuple[Integer[Tensor, "*batch queries width"], Integer[Tensor, "*batch queries width"]]:
    """The two accumulators of attention's product with log-sqrt2 codes, by additions and shifts (paper, 3.4).

    With the base change, code q is s 2^(-e) for even q and s sqrt2 2^(-e) for odd q, e = ceil(q / 2). The
    factors of even and of odd codes differ, so there are two sums. Right shifts by e would lose bits; the
    sums are kept at 2^E, E the largest
    exponent: sum (v - z_v) 2^(E - e), evaluated from the outermost e inwards (Horner), one shift a step.

    Args:
        softmax_codes: 0 to 2^b, as `quantizers.log_encode` gives them with two steps an octave.
        v_codes: 0 to 2^v_bits - 1.
        v_zero_point: a code.
        softmax_bits: width of the softmax codes.
        v_bits: width of the codes of v.
        zero_code: see `quantizers.log_encode`.

    Returns:
        The int32 sums over the even and over the odd codes, both times 2^E.

    Raises:
        InputError: if a sum could leave int32: keys (2^v_bits - 1) 2^E must stay below 2^31. Widths of 2 to 4
            bits pass with thousands of tokens; from 6 bits on the shifts alone span more than an int32.
    """
    keys = v_codes.shape[-2]
    span = largest_shift(softmax_bits, zero_code)
    if keys * (2**v_bits - 1) << span > INT32_MAX:
        raise InputError(
            f"{keys} tokens of {v_bits}-bit values shifted by up to {span} bits ({softmax_bits}-bit softmax) "
            "do not fit in int32",
            field="softmax_bits",
        )
    zero = 2**softmax_bits - 1 if zero_code else 2**softmax_bits
    values = v_codes.int() - v_zero_point
    codes = softmax_codes.int()
    even = torch.zeros((*codes.shape[:-1], values.shape[-1]), dtype=torch.int32, device=codes.device)
    odd = even.clone()
    for exponent in range(span + 1):
        # A code selects its value or not: the product with a 0/1 matrix is a sum, without multiplication.
        for total, code in ((even, 2 * exponent), (odd, 2 * exponent - 1)):
            total <<= 1
            if 0 <= code < zero:
                total += (codes == code).int() @ values
    return even, odd


def log_attention_product(
    softmax_codes: Integer[Tensor, "*batch queries keys"],
    softmax_scale: Tensor,
    v_codes: Integer[Tensor, "*batch keys width"],
    v_scale: Tensor,
    v_zero_point: int,
    softmax_bits: int,
    v_bits: int,
    zero_code: bool,
) -> Float[Tensor, "*batch queries width"]:
    """Softmax output times v, s s_v 2^(-E) (even + sqrt2 odd), from `log_attention_accumulators`."""
    even, odd = log_attention_accumulators(
        softmax_codes, v_codes, v_zero_point, softmax_bits, v_bits, zero_code
    )
    unit = softmax_scale * v_scale * 2.0 ** -largest_shift(softmax_bits, zero_code)
    return unit * (even + math.sqrt(2) * odd)
