"""Quantized models on disk: one safetensors file with integer weights packed at their width.

Tensors: for each quantized layer `NAME.weight` (the bit stream), `NAME.quantized.scale` and `.zero_point`;
the scale and zero point of every activation quantizer; and whatever the model keeps in floating point
(LayerNorms, biases, embeddings) under its own name. The header's metadata hold the recipe and the wiring, so
that loading needs no trace.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repqvit import packing
from repqvit.calibrate import install
from repqvit.layers import QuantConv2d, QuantLinear
from repqvit.quantized import LayerReport, QuantizedModel, Report, prepared_copy
from repqvit.quantizers import Quantizer
from repqvit.ranges import RangeSearch
from repqvit.recipes import Recipe
from repqvit.tracing import NormSite, Wiring
from shared_core import InputError, files

_KEY = "repqvit"
_FORMAT = 1


def save(quantized: QuantizedModel, path: str | Path) -> None:
    """Write a quantized model; an existing file is replaced only when the new one is whole."""
    tensors, layers = {}, {}
    state = quantized.model.state_dict()
    for name, module in quantized.model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            weight = module.quantized
            layers[name] = {"bits": weight.bits, "shape": list(weight.codes.shape)}
            stream = packing.pack(weight.codes.cpu().numpy(), weight.bits)
            tensors[f"{name}.weight"] = torch.from_numpy(stream)
            tensors[f"{name}.quantized.zero_point"] = weight.zero_point.to(torch.uint8)
    for key, value in state.items():
        if key not in tensors and not key.endswith(".quantized.codes"):
            tensors[key] = value
    report = asdict(quantized.report)
    for row in report["layers"]:
        row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
    # One key: safetensors writes several in no fixed order, and equal models should be equal files.
    content = {"format": _FORMAT, "layers": layers, "wiring": asdict(quantized.wiring), "report": report}
    metadata = {_KEY: json.dumps(content)}
    with files.atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, metadata)


def load(model: nn.Module, path: str | Path) -> QuantizedModel:
    """Read a quantized model.

    Args:
        model: a model of the architecture that was quantized; its weights do not matter, and it is left
            unchanged. The result is on its device.
        path: a file written by `QuantizedModel.save`.

    Raises:
        InputError: for a file of another kind, a damaged one, or one made for another architecture (it names
            the layers that differ).
    """
    path = Path(path)
    tensors, content = _read(path)
    layers: dict[str, dict[str, Any]] = content["layers"]
    report = _report(content["report"])
    wiring = content["wiring"]
    wiring = Wiring(**{**wiring, "sites": [NormSite(**site) for site in wiring["sites"]]})

    device = next(model.parameters()).device
    model = prepared_copy(model).cpu()
    _check_architecture(model, layers, tensors, path)
    install(model, wiring, report.recipe, calibrated=True)
    for name, layer in layers.items():
        key = f"{name}.weight"
        try:
            codes = packing.unpack(tensors.pop(key).numpy(), layer["bits"], math.prod(layer["shape"]))
        except ValueError as error:
            raise InputError(f"damaged file: {error}", file=path, field=key) from error
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear | QuantConv2d)
        scale, zero_point = (tensors.pop(f"{name}.quantized.{part}") for part in ("scale", "zero_point"))
        module.set_weight(torch.from_numpy(codes).view(layer["shape"]), scale, zero_point.to(scale.dtype))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            scale, zero_point = (tensors.pop(f"{name}.{part}") for part in ("scale", "zero_point"))
            module.set_parameters(scale, zero_point)
    _restore_rest(model, tensors)
    return QuantizedModel(model.eval().requires_grad_(False).to(device), report, wiring)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise InputError("no such file", file=path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"not a readable safetensors file ({error})", file=path) from error
    if _KEY not in metadata:
        raise InputError("not a quantized model of this package", file=path)
    content = json.loads(metadata[_KEY])
    if content["format"] != _FORMAT:
        raise InputError(
            f"written by another version of this package: format must be {_FORMAT}",
            file=path,
            value=content["format"],
        )
    return tensors, content


def _check_architecture(
    model: nn.Module, layers: dict[str, dict[str, Any]], tensors: dict[str, Tensor], path: Path
) -> None:
    problems = []
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            problems.append(f"{name} is missing")
        elif list(module.weight.shape) != layer["shape"]:
            problems.append(f"{name} has shape {list(module.weight.shape)}, the file {layer['shape']}")
    for key, value in model.state_dict().items():
        if key in tensors and key.removesuffix(".weight") not in layers and tensors[key].shape != value.shape:
            problems.append(f"{key} has shape {list(value.shape)}, the file {list(tensors[key].shape)}")
    extra = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d) and n not in layers]
    problems += [f"{n} is not in the file" for n in extra if f"{n}.weight" not in tensors]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise InputError(f"made for another architecture than {type(model).__name__}: {shown}", file=path)


def _restore_rest(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors that stay in floating point where they belong.

    Parameters that the change of variables created (a missing bias, say) are created here, too.
    """
    for key, value in tensors.items():
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _report(content: dict[str, Any]) -> Report:
    recipe = content["recipe"]
    for name in ("search", "weight_search"):
        search = recipe[name]
        recipe[name] = RangeSearch(search["kind"], tuple(search["percentiles"]))
    rows = [
        LayerReport(**{**row, "sqnr_db": float("nan") if row["sqnr_db"] is None else row["sqnr_db"]})
        for row in content["layers"]
    ]
    return Report(
        Recipe(**recipe), [NormSite(**site) for site in content["sites"]], rows, content["floating"]
    )
