from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repqvit.baselines import PowerOfTwoFactor, TwinUniformGelu, TwinUniformSoftmax
from repqvit.quantizers import (
    Log2,
    LogSqrt2,
    UniformAffine,
    affine_decode,
    affine_encode,
    log2_parity_decode,
    log_decode,
    log_encode,
)

BITS = [2, 3, 4, 5, 6, 7, 8]


def calibrated(quantizer, x):
    quantizer.fit_from([x])
    return quantizer


@given(st.integers(2, 8), st.floats(0.01, 10), st.integers(0, 255), st.integers(0, 2**31))
def test_affine_codes_are_those_of_the_formula(bits, scale, zero, seed):
    zero = min(zero, 2**bits - 1)
    x = 5 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
    codes = affine_encode(x, torch.tensor(scale), torch.tensor(float(zero)), bits)
    expected = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, 0, 2**bits - 1)
    np.testing.assert_array_equal(codes.numpy(), expected)
    values = affine_decode(codes, torch.tensor(scale), torch.tensor(float(zero)))
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert ((values - x).abs()[inside] <= scale / 2 * (1 + 1e-5)).all()


def test_rounding_is_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    assert affine_encode(x, torch.tensor(1.0), torch.tensor(8.0), 4).tolist() == [8, 10, 10, 8]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_code", [True, False])
def test_log_sqrt2_through_base_2_with_parity_equals_its_definition(bits, zero_code):
    codes = torch.arange(2**bits + (not zero_code), dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    definition = log_decode(codes, scale, bits, 2, zero_code)
    torch.testing.assert_close(
        log2_parity_decode(codes, scale, bits, zero_code), definition, rtol=1e-12, atol=0
    )
    expected = [0.7 * math.sqrt(2) ** -q for q in range(len(codes) - 1)] + [0.0]
    torch.testing.assert_close(definition, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_log_codes_are_the_nearest_power_in_the_exponent(steps, rng):
    a = torch.rand(10_000, generator=rng)
    codes = log_encode(a, torch.tensor(1.0), 4, steps, zero_code=False)
    kept = codes < 16
    ratio = a / log_decode(codes, torch.tensor(1.0), 4, steps, zero_code=False)
    assert (ratio[kept].log2().abs() <= 0.5 / steps + 1e-5).all()
    assert (a[~kept] <= 2 ** (-15.5 / steps) * (1 + 1e-5)).all()


def test_zero_and_above_scale_probabilities():
    a = torch.tensor([0.0, 1.0, 0.3])
    for zero_code in (True, False):
        codes = log_encode(a, torch.tensor(0.5), 4, 2, zero_code)
        values = log_decode(codes, torch.tensor(0.5), 4, 2, zero_code)
        assert values[0].item() == 0
        assert values[1].item() == 0.5  # saturates at the scale


def _quantizers(bits):
    return {
        "uniform": UniformAffine(bits),
        "log2": Log2(bits, zero_code=True),
        "log-sqrt2": LogSqrt2(bits, zero_code=True),
        "log2-unscaled": Log2(bits, None, zero_code=True),
        "twin-softmax": TwinUniformSoftmax(bits),
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", list(_quantizers(4)))
def test_a_quantizer_of_b_bits_gives_at_most_2_to_the_b_values(name, bits, rng):
    probabilities = (6 * torch.randn(50, 8, 30, generator=rng)).softmax(-1)
    quantizer = calibrated(_quantizers(bits)[name], probabilities)
    assert quantizer(probabilities).unique().numel() <= 2**bits


def test_the_official_form_of_log_sqrt2_has_one_level_more(rng):
    probabilities = (6 * torch.randn(50, 8, 30, generator=rng)).softmax(-1)
    quantizer = calibrated(LogSqrt2(4), probabilities)
    assert quantizer(probabilities).unique().numel() == 17


@pytest.mark.parametrize("name", ["uniform", "log2", "log-sqrt2"])
def test_quantizing_twice_changes_nothing(name, rng):
    probabilities = (6 * torch.randn(50, 8, 30, generator=rng)).softmax(-1)
    quantizer = calibrated(_quantizers(4)[name], probabilities)
    once = quantizer(probabilities)
    torch.testing.assert_close(quantizer(once), once, rtol=1e-6, atol=0)


def test_log_sqrt2_keeps_peaked_probabilities_better_than_uniform_at_4_bits(rng):
    probabilities = (6 * torch.randn(50, 8, 60, generator=rng)).softmax(-1)
    quantizers = _quantizers(4)

    def relative_error(name):
        approx = calibrated(quantizers[name], probabilities)(probabilities)
        large = probabilities > 0.01
        return ((approx - probabilities).abs() / probabilities)[large].mean()

    assert relative_error("log-sqrt2") < relative_error("log2") < relative_error("uniform")


def test_the_log_scale_is_the_best_of_the_three_percentiles(rng):
    probabilities = (4 * torch.randn(200, 8, 30, generator=rng)).softmax(-1)
    quantizer = calibrated(LogSqrt2(4, zero_code=True), probabilities)
    flat = probabilities.flatten().double().numpy()
    errors = {}
    for p in (99.9, 99.99, 99.999):
        scale = np.percentile(flat, p)
        codes = np.clip(np.rint(-2 * np.log2(flat / scale)), 0, 15)
        values = np.where(codes == 15, 0, scale * 2 ** (-codes / 2))
        errors[scale] = np.mean((values - flat) ** 2)
    assert quantizer.scale.item() == pytest.approx(min(errors, key=errors.get), rel=1e-5)


def test_negative_values_do_not_pass_for_probabilities():
    with pytest.raises(ValueError, match="negative values reached it"):
        LogSqrt2(4).fit_from([torch.tensor([0.5, -0.1])])


def test_power_of_two_factors_are_chosen_a_channel(rng):
    x = torch.randn(4000, 4, generator=rng) * torch.tensor([1.0, 0.5, 0.25, 0.11])
    quantizer = calibrated(PowerOfTwoFactor(6), x)
    factors = (quantizer.scale / quantizer.scale.min()).log2()
    torch.testing.assert_close(factors, factors.round(), rtol=0, atol=1e-5)
    assert (factors.diff() <= 0).all()
    assert factors[0] > factors[-1]
    assert quantizer.zero_point.numel() == 1


def test_twin_uniform_keeps_small_probabilities_that_uniform_drops(rng):
    probabilities = (3 * torch.randn(50, 8, 100, generator=rng)).softmax(-1)
    small = probabilities < 0.02
    twin, uniform = (
        calibrated(q, probabilities)(probabilities)[small] for q in (TwinUniformSoftmax(4), UniformAffine(4))
    )
    exact = probabilities[small]
    assert (twin - exact).square().mean() < (uniform - exact).square().mean()


def test_twin_uniform_gelu_covers_both_signs(rng):
    x = torch.nn.functional.gelu(3 * torch.randn(5000, generator=rng))
    approx = calibrated(TwinUniformGelu(5), x)(x)
    assert approx.unique().numel() <= 32
    assert approx[x < -0.1].max() < 0
    negative = x < 0
    uniform = calibrated(UniformAffine(5), x)(x)
    error, uniform_error = ((a - x)[negative].square().mean() for a in (approx, uniform))
    assert error < 0.1 * uniform_error


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_widths_outside_2_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        UniformAffine(bits)


def test_non_finite_activations_are_named():
    with pytest.raises(ValueError, match="non-finite values reached a quantizer"):
        UniformAffine(4).fit_from([torch.tensor([1.0, float("inf")])])


def test_signal_to_noise_ratio_is_that_of_the_definition(rng):
    x = torch.randn(1000, generator=rng)
    quantizer = calibrated(UniformAffine(6), x)
    noise = (quantizer(x) - x).square().sum()
    assert quantizer.sqnr_db == pytest.approx(10 * math.log10(x.square().sum() / noise), abs=1e-3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantizer_moves_to_another_device_with_its_model(rng, per_channel):
    quantizer = calibrated(UniformAffine(4, per_channel), torch.randn(9, 3, generator=rng)).to("meta")
    assert quantizer(torch.empty(2, 3, device="meta")).is_meta
