"""A hardened model in a file: integers at their stored width, the rest as it is, safetensors throughout.

For each quantized weight the file has one bit stream `csq.codes/<name>` (and `csq.codebook/<name>` where that
is smaller); `csq.steps` and `csq.masks` have a row a layer. Other tensors have their own names. The metadata
says how to read them and which inputs are quantized; nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from csq.activations import activation_plan, install_activations, make_quantizer
from csq.file_contents import (
    CODEBOOK,
    CODES,
    DTYPES,
    MASKS,
    STEPS,
    VERSION,
    read_contents,
    read_description,
    sealed,
)
from csq.hardened import attach
from csq.parametrization import bit_layers, unwrap
from csq.size_report import LayerReport, Report, check_unchanged, report, rest_of_file
from csq.storage import pack_codes
from shared_core import InputError
from shared_core.files import atomic_path

Model = TypeVar("Model", bound=nn.Module)


def save(final: nn.Module, path: str | os.PathLike[str], *, notes: Mapping[str, Any] | None = None) -> int:
    """Write a hardened model; the file appears, or replaces an older one, only when it is whole.

    Args:
        final: what `csq.harden` or `csq.load` returned. Its weights must still be those.
        path: the file, by custom `.safetensors`.
        notes: plain values to keep in the file, such as the model's name; `read_notes` gives them back.

    Returns:
        The file's bytes.

    Raises:
        InputError: not a hardened model, weights that changed since, a tensor with one of the file's own
            names, a path that cannot be written.
    """
    if bit_layers(final):
        raise InputError("still has soft gates; save csq.harden(model)", field="model")
    scheme = report(final)
    state = unwrap(final).state_dict()
    check_unchanged(final)
    quantized = {key for layer in scheme.layers for key in layer.tensors}
    tensors, shared = _without_copies({key: t for key, t in state.items() if key not in quantized})
    for key in tensors:
        if key in (STEPS, MASKS) or key.startswith((CODES, CODEBOOK)):
            raise InputError("is a name that the file keeps for itself; rename the tensor", field=key)
    table = []
    for layer in scheme.layers:
        packed = pack_codes(layer.codes.numpy())
        tensors[CODES + layer.name] = torch.from_numpy(packed.stream)
        if packed.codebook is not None:
            tensors[CODEBOOK + layer.name] = torch.from_numpy(packed.codebook)
        dtype = _dtype_name(layer, state[layer.tensors[0]])
        table.append([layer.name, layer.tensors, layer.shape, packed.width, packed.offset, dtype])
    tensors[STEPS] = torch.tensor([layer.step for layer in scheme.layers], dtype=torch.float32)
    tensors[MASKS] = torch.tensor([layer.mask for layer in scheme.layers], dtype=torch.uint8)
    activations = activation_plan(unwrap(final))
    description = {"version": VERSION, "layers": table, "shared": shared, "activations": activations}
    if notes:
        description["notes"] = dict(notes)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, sealed(description, tensors))
    return os.path.getsize(path)


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Fill a plain model (torchvision, timm, transformers or any other) with a file's weights, exactly.

    Args:
        model: of the architecture that was saved, as before `csq.parametrize`; changed in place, but for its
            dtype: in float32, it gets the values that a half-precision model had. The file's
            activation quantizers are put in, unless the model has the same ones already.
        path: a file of `csq.save`.

    Returns:
        The same model, with `report`.

    Raises:
        InputError: no such file, another format or version, a damaged file, a model that does not fit it, as
            where two names of one tied weight have different weights in the file.
    """
    if bit_layers(model):
        raise InputError("has bit planes; load into a plain model", field="model")
    target = unwrap(model)
    most = 2**24 + 16 * max((tensor.numel() for tensor in target.state_dict().values()), default=0)
    contents = read_contents(path, most)
    state = contents.state()
    plan = _missing_quantizers(target, contents.activations, path)
    _check_fit(target, state, plan, path)
    layers = _merge_tied(target, list(contents.layers), state, path)
    install_activations(target, plan)
    target.load_state_dict(state)
    attach(target, Report(tuple(layers), *rest_of_file(contents.rest.values())))
    return model


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that a file was saved with; empty where there were none. Errors as for `load`."""
    return dict(read_description(path).get("notes", {}))


def _dtype_name(layer: LayerReport, weight: Tensor) -> str:
    """What to round to, to have this weight of its codes: its own dtype, as after `.half()`, or the layer's.

    The latter where rounding to its own is not enough: a float32 model may have been loaded from a file of a
    half-precision one.
    """
    exact = torch.equal((layer.codes.float() * layer.step).to(weight.dtype), weight.cpu())
    dtype = weight.dtype if exact else layer.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"expected weights of {', '.join(DTYPES)}", field=layer.tensors[0], value=name)
    return name


def _without_copies(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and which keys are other names of them (tied parameters)."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for first, *others in _names_of_each(state):
        kept[first] = state[first].detach().cpu().contiguous().clone()
        shared.update(dict.fromkeys(others, first))
    return kept, shared


def _names_of_each(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor: several where parameters are tied."""
    names: dict[Any, list[str]] = {}
    for key, tensor in state.items():
        known = tensor.numel() and not tensor.is_meta  # else there is no memory to know it by
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if known else key
        names.setdefault(place, []).append(key)
    return list(names.values())


def _merge_tied(
    model: nn.Module, layers: list[LayerReport], state: dict[str, Tensor], path: str | os.PathLike[str]
) -> list[LayerReport]:
    """One layer for each weight of the model, also where the file has equal ones under several names."""
    for first, *others in _names_of_each(model.state_dict()):
        for other in others:
            if not torch.equal(state[first], state[other]):
                raise InputError(
                    f"has different weights for {first} and {other}, which are tied in the model", file=path
                )
        names = {first, *others}
        found = [layer for layer in layers if names & set(layer.tensors)]
        if others and found:
            merged = replace(found[0], tensors=tuple(dict.fromkeys((*found[0].tensors, first, *others))))
            layers = [merged if layer is found[0] else layer for layer in layers if layer not in found[1:]]
    return layers


def _missing_quantizers(
    model: nn.Module, plan: dict[str, dict[str, Any]], path: str | os.PathLike[str]
) -> dict[str, dict[str, Any]]:
    """The plan of a file, for a model without quantizers; nothing, for one that has these."""
    own = activation_plan(model)
    if not own:
        return plan
    for name in sorted(own.keys() | plan.keys()):
        # Features only scale the gradient of LSQ's step: a network for another image size has others.
        here, there = ({**p.get(name, {}), "features": None} for p in (own, plan))
        if here != there:
            raise InputError(
                f"{name}: inputs are {_quantizer_words(plan.get(name))} in the file and "
                f"{_quantizer_words(own.get(name))} in the model; load into a model without quantizers",
                file=path,
            )
    return {}


def _quantizer_words(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "not quantized"
    return f"{settings['method']} of {settings['bits']} bits, {'' if settings['signed'] else 'un'}signed"


def _check_fit(
    model: nn.Module,
    state: dict[str, Tensor],
    plan: dict[str, dict[str, Any]],
    path: str | os.PathLike[str],
) -> None:
    """Check names and shapes of a model that will have the plan's quantizers."""
    modules = dict(model.named_modules())
    if absent := sorted(plan.keys() - modules.keys()):
        raise InputError(f"holds another architecture: the model has no layer {absent[0]}", file=path)
    own = model.state_dict()
    for name, settings in plan.items():
        prefix = f"{name}.input_quantizer." if name else "input_quantizer."
        own |= make_quantizer(settings).state_dict(prefix=prefix)
    kinds = [
        f"{key} is {state[key].dtype} in the file, {own[key].dtype} in the model"
        for key in sorted(own.keys() & state.keys())
        if state[key].dtype != own[key].dtype
        and not (state[key].is_floating_point() and own[key].is_floating_point())
    ]
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if missing or surplus or shapes or kinds:
        problems = [f"the file lacks {', '.join(missing[:3])}"] if missing else []
        problems += [f"the model lacks {', '.join(surplus[:3])}"] if surplus else []
        raise InputError(
            f"holds another architecture: {'; '.join(problems + sorted(shapes)[:3] + kinds[:3])}", file=path
        )
