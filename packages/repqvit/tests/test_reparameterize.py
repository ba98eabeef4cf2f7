from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repqvit import reparameterize_layernorm
from repqvit.quantizers import affine_encode
from repqvit.ranges import RangeSearch, fit_affine
from repqvit.reparameterize import change_site, merge_channels


def site(channels=12, outputs=(7, 5), bias=True, seed=0):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels).exp() * torch.randn(channels).sign())
        norm.bias.normal_(0, 2)
    return norm.double(), [nn.Linear(channels, n, bias=bias).double() for n in outputs]


def fit(norm, x, bits):
    with torch.no_grad():
        y = norm(x)
    return y, fit_affine([y.reshape(-1, y.shape[-1])], bits, RangeSearch())


@given(st.integers(3, 8), st.booleans(), st.integers(0, 2**31))
def test_the_site_computes_the_same_function_and_the_same_codes(bits, bias, seed):
    norm, linears = site(bias=bias, seed=seed)
    x = torch.randn(40, 3, 12, dtype=torch.float64)
    before, fitted = fit(norm, x, bits)
    codes = affine_encode(before, fitted.scale, fitted.zero_point, bits)
    outputs = [linear(before) for linear in linears]

    scale, zero_point = reparameterize_layernorm(norm, linears, fitted.scale, fitted.zero_point, bits)

    assert scale.numel() == zero_point.numel() == 1
    assert 0 <= zero_point.item() <= 2**bits - 1
    assert zero_point == zero_point.round()
    after = norm(x)
    for linear, expected in zip(linears, outputs, strict=True):
        torch.testing.assert_close(linear(after), expected, rtol=1e-9, atol=1e-9)
    # The codes are integers of a rounding: a value within float error of a boundary may fall to either side.
    on_boundary = ((before / fitted.scale) % 1 - 0.5).abs() < 1e-9
    new_codes = affine_encode(after, scale, zero_point, bits)
    assert torch.equal(new_codes[~on_boundary], codes[~on_boundary])


def test_a_fractional_zero_point_gives_more_than_2_to_the_b_levels():
    norm, linears = site(channels=64)
    x = torch.randn(4000, 64, dtype=torch.float64)
    _, fitted = fit(norm, x, 4)
    scale, zero_point = reparameterize_layernorm(
        norm, linears, fitted.scale, fitted.zero_point, 4, round_zero_point=False
    )
    torch.testing.assert_close(zero_point, fitted.zero_point.mean().reshape(1))
    assert affine_encode(norm(x), scale, zero_point, 4).unique().numel() == 17


def test_means_are_taken_over_channels_and_the_zero_point_is_made_legal():
    merged = merge_channels(torch.tensor([1.0, 3.0]), torch.tensor([43.0, -19.0]), 4)
    assert (merged.scale.item(), merged.zero_point.item()) == (2, 12)
    assert merged.ratio.tolist() == [0.5, 1.5]
    assert merged.shift.tolist() == [31.0, -93.0]
    assert merge_channels(torch.tensor([1.0]), torch.tensor([43.0]), 4).zero_point.item() == 15


def test_a_deferred_shift_turns_padded_zeros_into_what_padding_was_before():
    norm, (linear,) = site(outputs=(7,))
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    ratio = torch.rand(12, dtype=torch.float64) + 0.5
    shift = torch.randn(12, dtype=torch.float64)
    padded_before = nn.functional.pad(norm(x), (0, 0, 0, 2))
    expected = linear(padded_before)
    input_shift = change_site(norm, [linear], ratio, shift, defer_shift=True)
    padded_after = nn.functional.pad(norm(x), (0, 0, 0, 2)) + input_shift
    torch.testing.assert_close(padded_after, (padded_before + shift) / ratio)
    torch.testing.assert_close(linear(padded_after), expected)


@pytest.mark.parametrize("affine", [{"elementwise_affine": False}, {"bias": False}])
def test_a_norm_without_affine_parameters_gets_them(affine):
    norm = nn.LayerNorm(4, **affine)
    linear = nn.Linear(4, 3, bias=False)
    x = torch.randn(5, 4)
    expected = linear(norm(x))
    assert change_site(norm, [linear], torch.full((4,), 2.0), torch.ones(4)) is None
    torch.testing.assert_close(linear(norm(x)), expected)
    torch.testing.assert_close(norm(x), (nn.functional.layer_norm(x, (4,)) + 1) / 2)


def test_a_dead_channel_survives():
    norm, linears = site()
    with torch.no_grad():
        norm.weight[3] = norm.bias[3] = 0
        norm.weight[5], norm.bias[5] = 0, -2.5
    x = torch.randn(100, 12, dtype=torch.float64)
    before, fitted = fit(norm, x, 4)
    expected = linears[0](before)
    reparameterize_layernorm(norm, linears, fitted.scale, fitted.zero_point, 4)
    torch.testing.assert_close(linears[0](norm(x)), expected, rtol=1e-9, atol=1e-9)
