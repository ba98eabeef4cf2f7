"""From any model to one whose weights are bit planes, and back to its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from csq import kernels
from csq.planes import BitPlanes
from shared_core import InputError

Model = TypeVar("Model", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear, nn.Embedding, nn.EmbeddingBag)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def parametrize(
    model: Model,
    n_bits: int = 8,
    skip: Iterable[str] = (),
    *,
    init: Literal["pretrained", "scratch"] = "pretrained",
    select: Callable[[str, nn.Module], bool] | None = None,
    mask: Literal["search", "fixed"] = "search",
    gate_init: float = 0.1,
    kernel: Literal["auto", "eager", "compiled"] = "auto",
) -> Model:
    """Replace the weights of a model's layers by trainable bit planes; its class and forward stay.

    Weights of Conv1d to 3d, ConvTranspose, Linear, Embedding, MultiheadAttention and transformers' Conv1D are
    taken. Biases and normalisation stay in floating point: they are folded at export. A weight that layers
    share is represented, trained and counted once.

    Args:
        model: changed in place. Its optimizer must be made afterwards, from `csq.param_groups`.
        n_bits: planes of each weight, 1 to 8. With 7, every outcome fits int8.
        skip: names of layers, as in `model.named_modules()`, or patterns such as `head.*`, to leave as they
            are. Each must match a layer.
        init: `pretrained` starts from the n-bit-rounded weights; `scratch` is the official start for models
            that are trained from random weights and have normalisation. See `csq.BitPlanes`.
        select: further choice: called with a layer's name and module, True to take it.
        mask: `fixed` gives all layers all n planes for good (CSQ-uniform).
        gate_init: see `csq.BitPlanes`.
        kernel: `eager` or `compiled` (torch.compile, which takes some 10 s once, and is cached on disk);
            `auto` compiles where a compiler is found and the model has at least a million such weights. The
            environment variable CSQ_KERNEL overrules `auto`.

    Returns:
        The same model.

    Raises:
        InputError: n_bits outside 1 to 8; nothing to quantize; a layer that is parametrized already, frozen,
            all zero, not finite, uninitialised, no parameter (old-style weight_norm), or an embedding with
            max_norm or sparse gradients. All such layers are named, and the model is left as it was, as it is
            after any other error.

    Example:
        >>> import torch, csq
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> model = csq.parametrize(model)
        >>> list(csq.bit_layers(model))
        ['0', '2']
    """
    _check_arguments(model, n_bits, init, mask, gate_init)
    found = list(_weights(unwrap(model), tuple(skip), select))
    _check_weights(found)
    _check_owners(unwrap(model), found)
    count = sum({id(weight): weight.numel() for *_, weight in found}.values())
    compiled = kernels.choose(kernel, count, found[0][3].device)
    made: dict[int, BitPlanes] = {}  # by the identity of the weight: tied layers share one
    for _, module, _, weight in found:
        planes = made.get(id(weight))
        if planes is None:
            planes = BitPlanes(
                weight, n_bits, init=init, mask=mask, gate_init=gate_init, compiled=compiled
            ).train(module.training)
            made[id(weight)] = planes
    with _all_or_none([module for _, module, *_ in found]):
        for _, module, tensor_name, weight in found:
            torch_parametrize.register_parametrization(module, tensor_name, made[id(weight)], unsafe=True)
    for name in ("_csq_report", "report"):  # of an earlier hardening, which no longer holds
        if type(vars(unwrap(model)).get(name)).__name__ == "Report":
            object.__delattr__(unwrap(model), name)
    return model


@contextmanager
def _all_or_none(modules: list[nn.Module]) -> Iterator[None]:
    """Give modules their classes, parameters and submodules back where the block raises."""
    before = [(module, type(module), dict(module._parameters), dict(module._modules)) for module in modules]
    try:
        yield
    except BaseException:
        for module, kind, parameters, submodules in before:
            module.__class__ = kind
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(submodules)
        raise


def _check_owners(model: nn.Module, found: list[tuple[str, nn.Module, str, Tensor]]) -> None:
    """Refuse to take a weight from one layer and leave it, then another one, to a layer that shares it."""
    taken = {(id(module), tensor_name) for _, module, tensor_name, _ in found}
    names = {id(weight): name for name, _, _, weight in found}
    for owner, module in model.named_modules():
        for tensor_name, parameter in module._parameters.items():
            if id(parameter) in names and (id(module), tensor_name) not in taken:
                raise InputError(
                    f"shares its weight with {owner or 'the model itself'}, which is not taken: skip both",
                    field=names[id(parameter)],
                )


def _check_arguments(model: object, n_bits: int, init: str, mask: str, gate_init: float) -> None:
    if not isinstance(model, nn.Module):
        raise InputError("expected a torch.nn.Module", field="model", value=type(model).__name__)
    if isinstance(n_bits, bool) or not isinstance(n_bits, int) or not 1 <= n_bits <= 8:
        raise InputError("expected a whole number from 1 to 8", field="n_bits", value=n_bits)
    for field, value, known in (
        ("init", init, ("pretrained", "scratch")),
        ("mask", mask, ("search", "fixed")),
    ):
        if value not in known:
            raise InputError(f"expected {' or '.join(known)}", field=field, value=value)
    if not 0 < gate_init <= 10:
        raise InputError("expected a number above 0, at most 10", field="gate_init", value=gate_init)
    if bit_layers(model):
        raise InputError("is parametrized already; call csq.parametrize once", field="model")


def _weights(
    model: nn.Module, skip: tuple[str, ...], select: Callable[[str, nn.Module], bool] | None
) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, tensor name and weight of each layer that is asked for."""
    unused = set(skip)
    layers = [(name, module) for name, module in model.named_modules() if any(_tensor_names(module))]
    if not layers:
        raise InputError("has no Conv, Linear or Embedding layer to quantize", field="model")
    for name, module in layers:
        matched = {pattern for pattern in skip if pattern == name or fnmatchcase(name, pattern)}
        unused -= matched
        if matched or (select is not None and not select(name, module)):
            continue
        for tensor_name in _tensor_names(module):
            if torch_parametrize.is_parametrized(module, tensor_name):
                raise InputError(
                    "has another parametrization; remove it, or name the layer in skip", field=name
                )
            yield name, module, tensor_name, getattr(module, tensor_name)
    if unused:
        raise InputError(
            f"matches no layer; the layers are {', '.join(name for name, _ in layers[:8])}...",
            field="skip",
            value=sorted(unused)[0],
        )


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with its weight as (in, out); GPT-2 has them."""
    kind = torch_parametrize.type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _tensor_names(module: nn.Module) -> Iterator[str]:
    if isinstance(module, _LAYERS) or is_transposed_linear(module):
        yield "weight"
    if isinstance(module, nn.MultiheadAttention):
        for name in _ATTENTION_WEIGHTS:
            if getattr(module, name) is not None:
                yield name


def _check_weights(found: list[tuple[str, nn.Module, str, Tensor]]) -> None:
    if not found:
        raise InputError("leaves no layer to quantize", field="skip or select")
    problems = [
        f"{name or type(module).__name__}: {problem}"
        for name, module, tensor_name, weight in found
        if (problem := _problem(module, tensor_name, weight))
    ]
    if problems:
        raise InputError(f"cannot be quantized; {'; '.join(problems)}", field="model")


def _problem(module: nn.Module, tensor_name: str, weight: Tensor) -> str | None:
    if module._parameters.get(tensor_name) is not weight:
        return (
            "its weight is no parameter, but computed from others (old weight_norm, spectral_norm, "
            "pruning): remove that, or name the layer in skip"
        )
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet (a lazy layer): run the model once first"
    if weight.is_meta:
        return "its weight is on the meta device: load it first"
    if not weight.is_floating_point():
        return f"its weight is of {weight.dtype}, expected floating point"
    if not weight.requires_grad:
        return "its weight is frozen: set requires_grad, or name the layer in skip"
    if not weight.numel():
        return "its weight is empty"
    if not bool(torch.isfinite(weight).all()):
        return "its weight has NaN or infinite values"
    if not bool(weight.any()):
        return "its weight is all zero, which has no scale: initialise it, or name the layer in skip"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the weight in each forward: set it to None, or name the layer in skip"
    if getattr(module, "sparse", False):
        return "sparse gradients cannot reach bit planes: set sparse=False, or name the layer in skip"
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module, out of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def bit_layers(model: nn.Module) -> dict[str, BitPlanes]:
    """The bit planes of a model, by the name of their layer; a weight that layers share stands once.

    Attention's packed weight has its tensor's name added: `encoder.self_attn.in_proj_weight`.
    """
    layers: dict[str, BitPlanes] = {}
    for name, _, tensor_name, planes in places(model):
        if all(planes is not known for known in layers.values()):
            layers[_layer_name(name, tensor_name)] = planes
    return layers


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, BitPlanes]]:
    """Module name, module, tensor name and planes, of each place where planes stand for a weight."""
    for name, module in unwrap(model).named_modules(remove_duplicate=True):
        if torch_parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for tensor_name, chain in lists.items():
                if isinstance(chain[0], BitPlanes):
                    yield name, module, tensor_name, chain[0]


def _layer_name(name: str, tensor_name: str) -> str:
    if tensor_name == "weight":
        return name or "weight"
    return f"{name}.{tensor_name}" if name else tensor_name
