"""The integer kernels against Python's integers, and against the simulated model."""

from __future__ import annotations

import math

import hosted_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repqvit import quantize
from repqvit.integer import (
    integer_linear,
    integer_product,
    largest_shift,
    log_attention_accumulators,
    log_attention_product,
)
from repqvit.layers import QuantLinear
from repqvit.quantizers import affine_decode, log2_parity_decode
from shared_core import InputError


def draw(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 1000), st.integers(1, 40))
def test_product_of_codes_equals_python_integers(x_bits: int, w_bits: int, seed: int, inner: int) -> None:
    x, w = draw(2**x_bits, 3, inner, seed=seed), draw(2**w_bits, 4, inner, seed=seed + 1)
    w_zero = draw(2**w_bits, 4, seed=seed + 2)
    z = seed % 2**x_bits
    expected = [
        [
            sum((a - z) * (b - zw) for a, b in zip(row, column, strict=True))
            for column, zw in zip(w.tolist(), w_zero.tolist(), strict=True)
        ]
        for row in x.tolist()
    ]
    assert integer_product(x, z, w, w_zero, x_bits, w_bits).tolist() == expected


def test_a_sum_that_could_leave_int32_is_refused() -> None:
    limit = (2**31 - 1) // 255**2
    x, w = draw(256, 1, limit), draw(256, 1, limit)
    integer_product(x, 0, w, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"33026 products of 8-bit and 8-bit codes does not fit in int32"):
        integer_product(
            draw(256, 1, limit + 1), 0, draw(256, 1, limit + 1), torch.zeros(1, dtype=torch.uint8)
        )


@pytest.mark.parametrize(("name", "bits"), [("timm-swin-padded", 4), ("hf-vit", 8)])
def test_integer_linear_equals_the_simulated_layer_in_a_whole_model(name: str, bits: int) -> None:
    model = quantize(hosted_models.build(name), hosted_models.images(name), w_bits=bits, a_bits=bits)
    checked = []

    def check(layer: QuantLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        scale = float(output.abs().max())
        torch.testing.assert_close(integer_linear(layer, inputs[0]), output, rtol=0, atol=2e-6 * scale)
        checked.append(layer.input_shift is not None)

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(check)
    model(hosted_models.images(name, 2))
    assert len(checked) > 10
    assert any(checked) == ("swin" in name)


def test_integer_linear_refuses_a_scale_for_each_channel() -> None:
    model = quantize(hosted_models.build("timm-vit"), hosted_models.images("timm-vit"), "channelwise")
    with pytest.raises(InputError, match="one activation scale"):
        integer_linear(model.get_submodule("model.blocks.0.attn.qkv"), torch.randn(2, 32))


@given(st.integers(2, 4), st.integers(2, 8), st.booleans(), st.integers(1, 40), st.integers(0, 1000))
def test_attention_accumulators_equal_python_integers(
    bits: int, v_bits: int, zero_code: bool, keys: int, seed: int
) -> None:
    zero = 2**bits - 1 if zero_code else 2**bits
    codes, v = draw(zero + 1, 3, keys, seed=seed), draw(2**v_bits, keys, 5, seed=seed + 1)
    z = seed % 2**v_bits
    span = largest_shift(bits, zero_code)
    expected = {0: [[0] * 5 for _ in range(3)], 1: [[0] * 5 for _ in range(3)]}
    for query, row in enumerate(codes.tolist()):
        for q, values in zip(row, v.tolist(), strict=True):
            if q == zero:
                continue
            exponent = math.ceil(q / 2)
            for column, value in enumerate(values):
                expected[q % 2][query][column] += (value - z) << (span - exponent)
    even, odd = log_attention_accumulators(codes, v, z, bits, v_bits, zero_code)
    assert even.dtype == odd.dtype == torch.int32
    assert (even.tolist(), odd.tolist()) == (expected[0], expected[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_code", [True, False])
def test_attention_product_equals_the_simulated_one(bits: int, zero_code: bool) -> None:
    zero = 2**bits - 1 if zero_code else 2**bits
    codes, v = draw(zero + 1, 2, 4, 50, 50), draw(2**bits, 2, 4, 50, 16, seed=1)
    scale, v_scale, z = torch.tensor([0.83]), torch.tensor([0.07]), 2**bits // 3
    probabilities = log2_parity_decode(codes.float(), scale, bits, zero_code)
    expected = probabilities @ affine_decode(v.float(), v_scale, torch.tensor(z))
    found = log_attention_product(codes, scale, v, v_scale, z, bits, bits, zero_code)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_extreme_codes_at_the_overflow_bound_do_not_wrap() -> None:
    keys = (2**31 - 1) // (15 << 8)  # 4 bits, no zero code: E = 8
    codes = torch.zeros(1, keys, dtype=torch.uint8)  # code 0: the largest shift
    v = torch.full((keys, 1), 15, dtype=torch.uint8)
    even, odd = log_attention_accumulators(codes, v, 0, 4, 4, zero_code=False)
    assert (int(even), int(odd)) == (keys * 15 << 8, 0)
    with pytest.raises(InputError, match=r"559241 tokens of 4-bit values shifted by up to 8 bits"):
        log_attention_accumulators(codes.new_zeros(1, keys + 1), v.new_zeros(keys + 1, 1), 0, 4, 4, False)
    with pytest.raises(InputError, match=r"8-bit softmax\) do not fit in int32"):
        log_attention_accumulators(codes[:, :8], v[:8], 0, 8, 8, zero_code=True)
