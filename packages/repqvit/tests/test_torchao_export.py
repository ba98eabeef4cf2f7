from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hosted_models import build, images, logits

import repqvit
from repqvit import torchao_export
from repqvit.layers import QuantLinear
from repqvit.recipes import Recipe
from repqvit.torchao_export import _saturates, to_torchao
from shared_core import InputError

RECIPE = Recipe(w_bits=7, a_bits=8, weight_scheme="symmetric")


@pytest.mark.parametrize(
    ("name", "bits"), [("timm-vit", 8), ("timm-swin-padded", 7), ("torchvision-vit", 4), ("hf-vit", 7)]
)
@torch.no_grad()
def test_every_linear_layer_computes_what_the_simulation_computes(name, bits):
    if bits == 8 and _saturates(torch.device("cpu")):
        pytest.skip("8-bit weights are for x86 processors with VNNI instructions, and for others than x86")
    x = images(name)
    quantized = repqvit.quantize(build(name), x, replace(RECIPE, w_bits=bits))
    fast = to_torchao(quantized)
    layers = {n: m for n, m in quantized.model.named_modules() if isinstance(m, QuantLinear)}
    inputs: dict[str, torch.Tensor] = {}
    for layer_name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, a, n=layer_name: inputs.__setitem__(n, a[0]))
    expected = logits(quantized(x))
    for layer_name, layer in layers.items():
        # On the quantizer's grid: torchao's x * (1 / s) may round to the other side of x / s.
        shift = 0 if layer.input_shift is None else layer.input_shift
        x_on_grid = layer.input_quantizer(inputs[layer_name] + shift) - shift
        found, wanted = fast.get_submodule(layer_name)(x_on_grid), layer(x_on_grid)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    # The operands of attention are quantized in the simulation alone.
    difference = logits(fast(x)) - expected
    assert difference.square().mean() < 0.1 * expected.square().mean()
    assert not any(isinstance(m, QuantLinear) for m in fast.modules())
    assert torch.equal(logits(quantized(x)), expected)  # left unchanged


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(w_bits=7, a_bits=8), "ignores zero points of weights"),
        (replace(RECIPE, a_bits=6), "activations have 8 bits.*6"),
        (replace(RECIPE, norm="per-channel"), "one scale for an activation tensor"),
        (replace(RECIPE, round_zero_point=False), "needs an integer zero point"),
    ],
)
def test_what_torchao_cannot_run_is_refused(recipe, message):
    quantized = repqvit.quantize(build("timm-vit"), images("timm-vit"), recipe)
    with pytest.raises(InputError, match=message):
        to_torchao(quantized)


def test_a_processor_that_would_give_wrong_outputs_draws_a_warning(monkeypatch):
    wide = repqvit.quantize(build("timm-vit"), images("timm-vit"), replace(RECIPE, w_bits=8))
    narrow = repqvit.quantize(build("timm-vit"), images("timm-vit"), RECIPE)
    monkeypatch.setattr(torchao_export, "_saturates", lambda device: True)
    with pytest.warns(UserWarning, match="products saturate.*quantize with w_bits=7"):
        to_torchao(wide)
    to_torchao(narrow)  # a warning would be an error


def test_a_missing_library_is_named(monkeypatch):
    quantized = repqvit.quantize(build("timm-vit"), images("timm-vit"), RECIPE)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install 'repqvit\[torchao\]'"):
        to_torchao(quantized)
