"""Rival weight quantizers on the layers that csq takes, and back to plain layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from csq.hardened import attach as attach_report
from csq.hardened import reestimate_batchnorm
from csq.parametrization import _check_weights, _layer_name, _weights, unwrap
from csq.rivals.bsq import PLANES, BsqWeight
from csq.rivals.lsq import LsqWeight
from csq.rivals.ste import SteWeight
from csq.size_report import LayerReport, Report, rest_of_model
from shared_core import InputError

Rival = SteWeight | LsqWeight | BsqWeight


def weights(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the weights that `csq.parametrize` would take, by layer; a shared one stands once.

    Raises:
        InputError: As `csq.parametrize` does.
    """
    found: dict[str, Tensor] = {}
    for name, _, tensor_name, weight in _weights(unwrap(model), tuple(skip), None):
        if all(weight is not known for known in found.values()):
            found[_layer_name(name, tensor_name)] = weight
    return found


def attach(
    model: nn.Module,
    make: Callable[[str, Tensor], Rival],
    skip: Iterable[str] = (),
    *,
    check: bool = True,
) -> nn.Module:
    """Put a quantizer on every weight that `csq.parametrize` would take, in place.

    Args:
        model: A model without parametrizations.
        make: Called with the layer's name and its weight; gives the quantizer. Layers that share a weight
            share its quantizer.
        skip: Layers to leave, as for `csq.parametrize`.
        check: Whether weights must have a scale; False takes layers that a search has emptied.

    Returns:
        The same model.

    Raises:
        InputError: As `csq.parametrize` does.
    """
    found = list(_weights(unwrap(model), tuple(skip), None))
    if check:
        _check_weights(found)
    made: dict[int, Rival] = {}
    for name, module, tensor_name, weight in found:
        rival = made.get(id(weight))
        if rival is None:
            rival = make(_layer_name(name, tensor_name), weight).to(weight.device)
            made[id(weight)] = rival
        torch_parametrize.register_parametrization(
            module, tensor_name, rival, unsafe=isinstance(rival, BsqWeight)
        )
    return model


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Rival]]:
    """Layer name, module, tensor name and quantizer of each place where a rival makes a weight."""
    for name, module in unwrap(model).named_modules():
        if torch_parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for tensor_name, chain in lists.items():
                if isinstance(chain[0], Rival):
                    yield _layer_name(name, tensor_name), module, tensor_name, chain[0]


def rival_layers(model: nn.Module) -> dict[str, Rival]:
    """Return the rivals' quantizers by layer; one that layers share stands once."""
    layers: dict[str, Rival] = {}
    for name, _, _, rival in places(model):
        if all(rival is not known for known in layers.values()):
            layers[name] = rival
    return layers


@torch.no_grad()
def hard_layers(model: nn.Module) -> Iterator[LayerReport]:
    """Each quantized weight as whole numbers and a step; k paper bits are the k lowest of 8 planes.

    Raises:
        InputError: The model has no rival's quantizer.
    """
    layers = rival_layers(model)
    if not layers:
        raise InputError("has no weight with a rival's quantizer", field="model", value=type(model).__name__)
    keys: dict[int, list[str]] = {}
    modules = dict(unwrap(model).named_modules())
    names = {id(module): name for name, module in modules.items()}
    for _, module, tensor_name, rival in places(model):
        name = names[id(module)]
        keys.setdefault(id(rival), []).append(f"{name}.{tensor_name}" if name else tensor_name)
    for name, module, tensor_name, rival in places(model):
        if name in layers:
            chain: Any = getattr(module.parametrizations, tensor_name)
            codes, step = rival.integers(*() if isinstance(rival, BsqWeight) else (chain.original,))
            mask = tuple(plane < rival.bits for plane in range(PLANES))
            dtype = getattr(module, tensor_name).dtype
            yield LayerReport(
                name, tuple(keys[id(rival)]), mask, float(step), codes.to(torch.int16).cpu(), dtype
            )


@torch.no_grad()
def detach(model: nn.Module) -> nn.Module:
    """Replace each rival's quantizer by the weight that it gives now, an ordinary parameter; in place."""
    found = list(places(model))
    values = {id(rival): getattr(module, tensor_name).clone() for _, module, tensor_name, rival in found}
    parameters = {key: nn.Parameter(value) for key, value in values.items()}
    for _, module, tensor_name, rival in found:
        torch_parametrize.remove_parametrizations(module, tensor_name)
        delattr(module, tensor_name)
        module.register_parameter(tensor_name, parameters[id(rival)])
    return model


def harden(model: nn.Module, bn_loader: Iterable[Any] | None = None) -> nn.Module:
    """Turn a model with a rival's quantizers into plain modules with exact weights, in place.

    Its `report` counts bits as that of `csq.harden` does, and `csq.save` writes it.

    Args:
        model: What `attach` returned, trained.
        bn_loader: Batches from which BatchNorm's statistics are estimated anew, as for `csq.harden`.

    Returns:
        The same model.
    """
    for rival in rival_layers(model).values():
        if isinstance(rival, BsqWeight):
            rival.requantize()  # between two re-quantizations, sums may pass what the planes in use can make
    layers = tuple(hard_layers(model))
    detach(model)
    attach_report(model, Report(layers, *rest_of_model(model, layers)))
    return model if bn_loader is None else reestimate_batchnorm(model, bn_loader)
