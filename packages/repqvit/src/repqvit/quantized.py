"""`quantize`: a model and calibration images in, the quantized model out.

The result has the structure of the model, integer weights and quantized activations.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from repqvit import calibrate, hosts, tracing
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantLinear
from repqvit.quantizers import Quantizer
from repqvit.recipes import Recipe, named
from shared_core import InputError

Batch = Tensor | Mapping[str, Tensor]

FEW_IMAGES = 8
"""Fewer calibration images than this draw a warning (the paper uses 32)."""


@dataclass(frozen=True)
class LayerReport:
    """One quantized tensor: where it is, how wide, with how many scales, and how well it is kept.

    `sqnr_db` is the signal-to-noise ratio in dB, of an activation on the calibration batch.
    """

    name: str
    role: str
    bits: int
    scales: int
    sqnr_db: float


@dataclass(frozen=True)
class Report:
    """What `quantize` did."""

    recipe: Recipe
    sites: list[tracing.NormSite]
    layers: list[LayerReport]
    floating: list[str] = field(default_factory=list)
    """Layers with weights that stay in floating point: those that calibration did not reach, other kinds."""

    @property
    def changed_sites(self) -> list[tracing.NormSite]:
        """The LayerNorm sites without an obstacle, which therefore take the form that the recipe names."""
        return [site for site in self.sites if not site.obstacle]

    def __str__(self) -> str:
        lines = [
            f"W{self.recipe.w_bits}A{self.recipe.a_bits}, LayerNorm {self.recipe.norm}: "
            f"{len(self.changed_sites)} of {len(self.sites)} LayerNorm sites"
        ]
        lines += [
            f"  {site.norm} is quantized per tensor: {site.obstacle}" for site in self.sites if site.obstacle
        ]
        lines += [f"  {name} stays in floating point" for name in self.floating]
        lines += [
            f"  {layer.name:50} {layer.role:8} {layer.bits} bit {layer.scales:5} scales "
            f"{layer.sqnr_db:6.1f} dB"
            for layer in self.layers
        ]
        return "\n".join(lines)


class QuantizedModel(nn.Module):
    """A model after quantization: called like the original, and of the same structure (`.model`).

    Attributes that it lacks are those of the wrapped model (`config`, `forward_features`, ...).
    """

    def __init__(self, model: nn.Module, report: Report, wiring: tracing.Wiring) -> None:
        super().__init__()
        self.model = model
        self.report = report
        self.wiring = wiring
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model: its arguments and its kind of output, computed with quantized operands."""
        return self.model(*args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write the model to a safetensors file, integer weights packed at their width; see `load`."""
        from repqvit import checkpoint

        checkpoint.save(self, path)


def quantize(
    model: nn.Module,
    calibration: Batch | Iterable[Any],
    recipe: str | Recipe = "repqvit",
    *,
    w_bits: int | None = None,
    a_bits: int | None = None,
) -> QuantizedModel:
    """Quantize a vision transformer after training (RepQ-ViT, ICCV 2023).

    Args:
        model: a ViT, DeiT or Swin (or a detector on top of one) of timm, torchvision or transformers, or one
            written like them; left unchanged. Calibration is in float32 on the model's device.
        calibration: preprocessed training images `(images, channels, height, width)`, or a mapping of keyword
            arguments of the model's forward; 32 in the paper. Several such batches (or those of a data
            loader, whose labels are dropped) is calibrated as one
            batch, at the memory of the largest (see `lockstep`).
        recipe: a name of `recipes.RECIPES` or a `Recipe`.
        w_bits: bit width of weights, 2 to 8; 4 unless given here or by a `Recipe`.
        a_bits: bit width of activations, 2 to 8; 4 unless given here or by a `Recipe`.

    Returns:
        The quantized copy. `.report` tells which LayerNorms were reparameterized, and how well each tensor is
        kept.

    Raises:
        InputError: for a model without a LayerNorm that feeds linear layers, an already quantized one, one
            whose attention cannot be reached, non-finite weights or images, an empty calibration set, bits
            outside 2..8.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
        >>> quantized = quantize(model, torch.randn(8, 3, 224, 224), w_bits=6, a_bits=6)
        >>> len(quantized.report.changed_sites)
        24
        >>> quantized(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """
    recipe = _resolve(recipe, w_bits, a_bits)
    batches = _batches(calibration)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError("weights must be finite", field=name)
    model = prepared_copy(model)
    device = next(model.parameters()).device
    batches = [_to(batch, device) for batch in batches]
    _check_images(batches, model)

    try:
        wiring = tracing.trace(model, lambda m: _forward(m, _first(batches[0])))
    except ValueError as error:
        raise InputError(f"the model does not run on one calibration image: {error}") from error
    _check_layers(model, wiring)
    _check_wiring(wiring, recipe)
    calibrate.install(model, wiring, recipe)
    forwards: list[Callable[[nn.Module], Any]] = [lambda m, b=batch: _forward(m, b) for batch in batches]
    try:
        calibrate.calibrate(model, wiring, recipe, forwards)
    except ValueError as error:
        raise InputError(f"calibration failed: {error}") from error
    return QuantizedModel(model.requires_grad_(False), _report(model, recipe, wiring), wiring)


def _resolve(recipe: str | Recipe, w_bits: int | None, a_bits: int | None) -> Recipe:
    try:
        if isinstance(recipe, str):
            return named(recipe, 4 if w_bits is None else w_bits, 4 if a_bits is None else a_bits)
        widths = {"w_bits": w_bits, "a_bits": a_bits}
        return replace(recipe, **{name: bits for name, bits in widths.items() if bits is not None})
    except ValueError as error:
        raise InputError(str(error)) from error


def prepared_copy(model: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode, out of its wrappers, with explicit attention (`hosts.prepare`)."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(
        model, "_orig_mod"
    ):
        model = model.module if hasattr(model, "module") else model._orig_mod  # pyright: ignore[reportAssignmentType]
    if any(
        type(module).__name__.startswith(("FullyShardedDataParallel", "FSDP")) for module in model.modules()
    ):
        raise InputError("the model is sharded (FSDP): gather its parameters into a plain module first")
    if any(isinstance(module, QuantLinear | QuantConv2d | QuantizedModel) for module in model.modules()):
        raise InputError("the model is already quantized: start again from the floating-point model")
    model = copy.deepcopy(model).float().eval()
    try:
        return hosts.prepare(model)
    except ValueError as error:
        raise InputError(str(error)) from error


def _batches(calibration: Batch | Iterable[Any]) -> list[Batch]:
    batches: list[Any] = [calibration] if isinstance(calibration, Tensor | Mapping) else list(calibration)
    # A data loader gives (images, labels) or (images,).
    batches = [batch[0] if isinstance(batch, tuple | list) and batch else batch for batch in batches]
    if not batches or any(len(_images(batch)) == 0 for batch in batches):
        raise InputError("the calibration set is empty: give about 32 training images")
    return batches


def _images(batch: Any) -> Tensor:
    """The image tensor of a batch."""
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping):
        raise InputError(
            "a calibration batch must be a tensor (images, channels, height, width) or a mapping with one",
            value=type(batch).__name__,
        )
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return value
    raise InputError("no image tensor (images, channels, height, width) in the calibration mapping")


def _to(batch: Batch, device: torch.device) -> Batch:
    """On the device, and in float32 like the model's copy."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)

    if isinstance(batch, Tensor):
        return moved(batch)
    return {name: moved(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _first(batch: Batch) -> Batch:
    """The first image of a batch, enough to see the wiring."""
    if isinstance(batch, Tensor):
        return batch[:1]
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def _check_images(batches: Sequence[Batch], model: nn.Module) -> None:
    for batch in batches:
        images = _images(batch)
        if images.ndim != 4:
            raise InputError(
                "calibration images must be (images, channels, height, width): were labels passed?",
                value=tuple(images.shape),
            )
        if not images.is_floating_point():
            raise InputError(
                "calibration images must be floating point, preprocessed with the model's mean and std",
                value=str(images.dtype),
            )
        if not torch.isfinite(images).all():
            raise InputError("calibration images must be finite")
    count = sum(len(_images(batch)) for batch in batches)
    if count < FEW_IMAGES:
        warnings.warn(f"{count} calibration images are few: the paper uses 32", stacklevel=3)
    low = min(float(_images(batch).min()) for batch in batches)
    high = max(float(_images(batch).max()) for batch in batches)
    if high > 20:
        warnings.warn(
            f"calibration images reach {high:.0f}: they look like 0..255 values that were not normalised",
            stacklevel=3,
        )
    elif low >= 0 and _expects_negative(model):
        warnings.warn(
            f"calibration images lie in [{low:.2f}, {high:.2f}], but the model's mean and std make some "
            "values negative: they look like images that were not normalised",
            stacklevel=3,
        )


def _expects_negative(model: nn.Module) -> bool:
    """Whether the model's preprocessing subtracts a mean: timm says so, transformers' models do."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return any(config.get("mean") or ())
    return type(model).__module__.startswith("transformers.")


def _check_layers(model: nn.Module, wiring: tracing.Wiring) -> None:
    """Refuse layers that compute something else than their class, which would be lost."""
    for name in wiring.layers:
        layer: Any = model.get_submodule(name)
        if parametrize.is_parametrized(layer):
            raise InputError("remove parametrizations first (remove_parametrizations)", field=name)
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise InputError("quantization would drop the layer's forward hooks: remove them", field=name)
        if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            raise InputError(
                f"{type(layer).__name__} computes something else than nn.Linear or nn.Conv2d: fold it first",
                field=name,
            )


def _check_wiring(wiring: tracing.Wiring, recipe: Recipe) -> None:
    if wiring.floating:
        raise InputError(
            "attention must call scaled_dot_product_attention on the outputs of linear layers to be "
            "quantized; found " + "; ".join(wiring.floating[:3])
        )
    if not any(not site.obstacle for site in wiring.sites):
        found = (
            "; ".join(f"{s.norm}: {s.obstacle}" for s in wiring.sites[:3])
            or "no LayerNorm feeds a linear layer"
        )
        raise InputError(
            "no LayerNorm to reparameterize: looked for an nn.LayerNorm whose output only linear layers "
            f"read, as in ViT, DeiT and Swin v1 ({found})"
        )
    if recipe.head_bits is not None and not wiring.heads:
        raise InputError("head_bits is set, but no linear layer gives the model's output", field="head_bits")


def _report(model: nn.Module, recipe: Recipe, wiring: tracing.Wiring) -> Report:
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            weight = module.quantized
            rows.append(LayerReport(name, "weight", weight.bits, weight.scale.numel(), weight.sqnr_db))
            rows.append(_activation(name, "input", module.input_quantizer))
        elif isinstance(module, AttentionQuantizers):
            owner = name.removesuffix(".attention_quantizers")
            rows += [
                _activation(owner, role, getattr(module, role))
                for role in ("query", "key", "softmax", "value")
            ]
    floating = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, QuantLinear | QuantConv2d)
    ]
    return Report(recipe, wiring.sites, rows, floating)


def _activation(name: str, role: str, quantizer: Quantizer) -> LayerReport:
    return LayerReport(name, role, quantizer.bits, quantizer.scale.numel(), quantizer.sqnr_db)
