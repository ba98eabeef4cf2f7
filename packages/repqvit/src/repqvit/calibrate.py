"""Calibration: give every quantizer of a prepared model its parameters (paper, algorithm 1).

`install` puts quantizers in; `calibrate` runs the batch through them in the order that the recipe says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repqvit import baselines, lockstep
from repqvit.hosts import set_submodule
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantizedWeight, QuantLinear, quantize_attention
from repqvit.quantizers import Quantizer, UniformAffine
from repqvit.recipes import Recipe
from repqvit.reparameterize import change_site, merge_channels
from repqvit.tracing import NormSite, Wiring

Forward = Callable[[nn.Module], Any]


def install(model: nn.Module, wiring: Wiring, recipe: Recipe, calibrated: bool = False) -> None:
    """Replace layers and attention in place by quantizing ones; all quantizers are off.

    Args:
        model: after `hosts.prepare`.
        wiring: of that model.
        recipe: which quantizer goes where.
        calibrated: whether to install the quantizers that a calibrated model ends with (one scale on a
            LayerNorm output that has been reparameterized), ready to be given their parameters.
    """
    changeable = [site for site in wiring.sites if not site.obstacle]
    norm_quantizers = {}
    for site in changeable:
        # One for all linear layers that read the same LayerNorm.
        quantizer = recipe.norm_quantizer(after_change=calibrated)
        norm_quantizers.update(dict.fromkeys(site.linears, quantizer))
    for name in wiring.layers:
        source = model.get_submodule(name)
        head = recipe.head_bits if name in wiring.heads else None
        if name in norm_quantizers:
            quantizer = norm_quantizers[name]
        elif name == wiring.layers[0]:
            quantizer = UniformAffine(recipe.stem_bits, search=recipe.search)
        elif name in wiring.gelus and recipe.gelu == "twin-uniform":
            quantizer = baselines.TwinUniformGelu(recipe.a_bits)
        else:
            quantizer = recipe.activation_quantizer(head)
        weight = QuantizedWeight(
            head or recipe.w_bits, recipe.weight_scheme == "symmetric", recipe.weight_search
        )
        layer = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
        set_submodule(model, name, layer(source, quantizer, weight))  # pyright: ignore[reportArgumentType]
    for name in wiring.attentions:
        quantizers = AttentionQuantizers(
            recipe.activation_quantizer(),
            recipe.activation_quantizer(),
            recipe.softmax_quantizer(),
            recipe.activation_quantizer(),
        )
        quantize_attention(model.get_submodule(name), quantizers)


def calibrate(model: nn.Module, wiring: Wiring, recipe: Recipe, forwards: Sequence[Forward]) -> None:
    """Find the parameters of all quantizers, in place.

    Args:
        model: after `install`, in evaluation mode.
        wiring: of the model before `install`.
        recipe: what to do.
        forwards: each runs the model on a part of the calibration batch.
    """
    sites = [site for site in wiring.sites if not site.obstacle]
    if not recipe.changes_variables:
        if recipe.norm == "per-channel" and recipe.order == "fp-first":
            observe_norms(model, wiring, forwards)
            for site in sites:
                _linears(model, site)[0].input_quantizer.state = "on"
        _quantize_weights(model, wiring.layers)
        _arm_and_run(model, forwards)
    elif recipe.order == "official" and recipe.norm == "reparameterized":
        original = {name: model.get_submodule(name).weight for site in sites for name in site.linears}
        _quantize_weights(model, wiring.layers)
        _arm_and_run(model, forwards)
        for name, weight in original.items():
            model.get_submodule(name).weight = weight
        for site in sites:
            reparameterize(model, site, recipe)
        _quantize_weights(model, original)  # the rows have changed: search their ranges again
    else:
        observe_norms(model, wiring, forwards)
        for site in sites:
            (_smooth if recipe.norm == "smooth" else reparameterize)(model, site, recipe)
        _quantize_weights(model, wiring.layers)
        _arm_and_run(model, forwards)


def observe_norms(model: nn.Module, wiring: Wiring, forwards: Sequence[Forward]) -> None:
    """Calibrate the quantizers of changeable LayerNorm outputs on the floating-point model; they stay off."""
    for site in wiring.sites:
        if not site.obstacle:
            _linears(model, site)[0].input_quantizer.state = "observing"
    lockstep.run([lambda f=f: f(model) for f in forwards])


def _linears(model: nn.Module, site: NormSite) -> list[QuantLinear]:
    return [model.get_submodule(name) for name in site.linears]  # pyright: ignore[reportReturnType]


def _quantize_weights(model: nn.Module, names: Sequence[str] | dict[str, Any]) -> None:
    for name in names:
        model.get_submodule(name).quantize_weight()  # pyright: ignore[reportCallIssue]


def _arm_and_run(model: nn.Module, forwards: Sequence[Forward]) -> None:
    """Calibrate all quantizers without parameters in one pass, each on inputs that are already quantized."""
    for module in model.modules():
        if isinstance(module, Quantizer) and not module.scale.numel():
            module.state = "armed"
    lockstep.run([lambda f=f: f(model) for f in forwards])


def _change(model: nn.Module, site: NormSite, ratio: Tensor, shift: Tensor) -> None:
    linears = _linears(model, site)
    norm = model.get_submodule(site.norm)
    assert isinstance(norm, nn.LayerNorm)
    input_shift = change_site(norm, linears, ratio, shift, defer_shift=site.padded)
    for linear in linears:
        linear.input_shift = input_shift


def reparameterize(model: nn.Module, site: NormSite, recipe: Recipe) -> None:
    """Merge the per-channel quantizer of a site into a per-tensor one, in place.

    What changes is the LayerNorm, the linear layers that read it, and the input quantizer that they share.
    """
    linears = _linears(model, site)
    per_channel = linears[0].input_quantizer
    merged = merge_channels(
        per_channel.scale, per_channel.zero_point, per_channel.bits, recipe.round_zero_point
    )
    _change(model, site, merged.ratio, merged.shift)
    per_tensor = recipe.norm_quantizer(after_change=True)
    per_tensor.set_parameters(merged.scale, merged.zero_point)
    per_tensor.sqnr_db = per_channel.sqnr_db  # the same codes
    for linear in linears:
        linear.input_quantizer = per_tensor


def _smooth(model: nn.Module, site: NormSite, recipe: Recipe) -> None:
    linears = _linears(model, site)
    weight_max = torch.stack([linear.weight.detach().abs().amax(0) for linear in linears]).amax(0)
    observed = linears[0].input_quantizer
    factors = baselines.smoothing_factors(observed.scale, weight_max, recipe.smooth_alpha)
    _change(model, site, factors, torch.zeros_like(factors))
    per_tensor = recipe.norm_quantizer(after_change=True)
    for linear in linears:
        linear.input_quantizer = per_tensor
