"""From soft gates to the exact quantized model: plain modules, no parametrization, no cost at run time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from csq.parametrization import bit_layers, places, unwrap
from csq.size_report import REPORT_ATTRIBUTE, LayerReport, Report, hard_layers, report
from shared_core import InputError

Model = TypeVar("Model", bound=nn.Module)

SMALL_GAP = 0.05
"""Relative change of weights by hardening from which the trained model is not the hardened one."""


def harden(
    model: Model, bn_loader: Iterable[Any] | None = None, *, contiguous: bool = False, bn_batches: int = 200
) -> Model:
    """The exact quantized model: each weight is `step · code`, all gates 1[m >= 0].

    Args:
        model: what `csq.parametrize` returned, trained; left unchanged.
        bn_loader: training batches from which BatchNorm's statistics are estimated anew, as the weights move
            by the last soft residue. A batch is a tensor, a sequence whose first item is one, or a mapping of
            the keyword arguments of forward (labels included or not).
        contiguous: keep each layer's planes as a run from its highest selected one (see `csq.Schedule`).
        bn_batches: how many batches at most.

    Returns:
        A copy with the classes and forward of the model before `csq.parametrize`. Its `report` (also
        `csq.report`) has each layer's planes, bits and stored bits.

    Raises:
        InputError: not parametrized, or weights that are not finite.

    Example:
        >>> import torch, csq
        >>> final = csq.harden(csq.parametrize(torch.nn.Linear(8, 4), n_bits=2))
        >>> type(final).__name__, final.report.layers[0].mask_text, final.report.average_stored_bits
        ('Linear', '11', 3.0)
    """
    source = unwrap(model)
    if not bit_layers(source):
        raise InputError("has no bit planes; call csq.parametrize first", field="model")
    _check_finite(source)
    layers = tuple(hard_layers(source, contiguous))
    _warn(source, layers)
    made = replace(report(source), layers=layers)
    # Planes are shared with the copy, not copied: they are most of the memory and about to go.
    final = copy.deepcopy(source, {id(planes): planes for planes in bit_layers(source).values()})
    _replace(final, layers)
    attach(final, made)
    if bn_loader is not None:
        reestimate_batchnorm(final, bn_loader, bn_batches)
    return final  # pyright: ignore[reportReturnType]


def attach(model: nn.Module, made: Report) -> None:
    """Let `csq.report(model)`, and `model.report` if that name is free, give the report."""
    object.__setattr__(model, REPORT_ATTRIBUTE, made)
    if isinstance(getattr(model, "report", None), Report) or not hasattr(model, "report"):
        object.__setattr__(model, "report", made)


@torch.no_grad()
def weight_gap(model: nn.Module) -> dict[str, float]:
    """How far each layer's soft weight is from its hard one: |W_soft - W_hard| / |W_soft|, by norms."""
    return _gaps(model, tuple(hard_layers(model)))


@torch.no_grad()
def _gaps(model: nn.Module, layers: tuple[LayerReport, ...]) -> dict[str, float]:
    soft = bit_layers(model)
    gaps = {}
    for layer in layers:
        weight = soft[layer.name]().float().cpu()
        gaps[layer.name] = float((weight - layer.weight().float()).norm() / weight.norm().clamp_min(1e-30))
    return gaps


def _warn(model: nn.Module, layers: tuple[LayerReport, ...]) -> None:
    empty = [layer.name for layer in layers if not any(layer.mask)]
    if empty:
        warnings.warn(
            f"{', '.join(empty)}: no plane is selected, the weight is zero; see min_bits of csq.Schedule",
            stacklevel=3,
        )
    gap = max(_gaps(model, layers).values())
    first = next(iter(bit_layers(model).values()))
    _, steps, _, beta_max, *_ = first.plan.tolist()
    beta, done = float(first.temperature), int(first.step)
    # A plan that never began is no training cut short; without a plan only the gap can tell.
    short = done > 0 and (beta < beta_max * (1 - 1e-6) or done < steps)
    if short or gap > SMALL_GAP:
        planned = f" of {steps:g}" if steps else ""
        warnings.warn(
            f"hardened at temperature {beta:.3g} after {done}{planned} scheduled steps: the largest change "
            f"of a layer's weight is {gap:.1%}, so the hardened model may do worse than the trained one",
            stacklevel=3,
        )


def _check_finite(model: nn.Module) -> None:
    broken = [
        name for name, planes in bit_layers(model).items()
        if not all(bool(torch.isfinite(p).all()) for p in planes.parameters())
    ]  # fmt: skip
    if broken:
        raise InputError(f"gates are not finite in {', '.join(broken)}: the training diverged", field="model")


def _replace(model: nn.Module, layers: tuple[LayerReport, ...]) -> None:
    """Put plain parameters where planes stand, and give modules their own classes back."""
    by_planes = {id(planes): layer for planes, layer in zip(bit_layers(model).values(), layers, strict=True)}
    parameters: dict[int, nn.Parameter] = {}
    for _, module, tensor_name, planes in list(places(model)):
        parameter = parameters.get(id(planes))
        if parameter is None:
            weight = by_planes[id(planes)].weight().to(planes.mask.device)
            parameter = parameters[id(planes)] = nn.Parameter(weight)
        lists: Any = module.parametrizations
        del lists[tensor_name]
        if not len(lists):
            # The class with the property is shared with the model that was copied: leave it as it is.
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            _register_left(module, parameters, tensor_name, parameter)
        else:
            module.__dict__.setdefault("_csq_waiting", {})[tensor_name] = parameter


def _register_left(
    module: nn.Module, parameters: dict[int, nn.Parameter], tensor_name: str, parameter: nn.Parameter
) -> None:
    waiting = module.__dict__.pop("_csq_waiting", {})
    for name, value in {**waiting, tensor_name: parameter}.items():
        module.register_parameter(name, value)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any], batches: int = 200) -> nn.Module:
    """Replace BatchNorm's running statistics by plain averages over up to `batches` training batches.

    All else stays in evaluation mode (no dropout). A model without BatchNorm is left as it is.

    Raises:
        InputError: no batch, or a batch of one image where a layer needs more to have a variance.
    """
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]  # fmt: skip
    if not norms:
        return model
    device = next(model.parameters()).device
    with _averaging(model, norms):
        seen = 0
        for batch in loader:
            try:
                _call(model, batch, device)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputError(
                    "BatchNorm needs more than one value a channel; give batches of two images or more",
                    field="bn_loader",
                ) from error
            seen += 1
            if seen == batches:
                break
        if not seen:
            raise InputError("has no batch", field="bn_loader")
    return model


@contextmanager
def _averaging(model: nn.Module, norms: list[Any]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        yield
    except BaseException:
        for norm, _, state in before:
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(
            **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        )
    else:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        model(images.to(device))
