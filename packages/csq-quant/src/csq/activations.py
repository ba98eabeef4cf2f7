"""Activation quantizers PACT and LSQ, put before the layers of any model, static at inference.

Each convolution and linear layer gets a quantizer of its input as the submodule `input_quantizer`, called by
a hook: the model keeps its class and its forward, and state dict, copies and export see the quantizer. What
non-negative inputs are (behind a ReLU) and what signed ones (behind a GELU or LayerNorm) is read off one
example batch. Ranges are parameters: nothing depends on the batch that is being classified. (The official
code scales by the maximum of each batch, also of test batches; that is not offered.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csq.rivals.lsq import initial_step, lsq_quantize, positive_step
from shared_core import InputError

_SHARES = torch.linspace(0.2, 1.0, 33)
"""Shares of the largest magnitude that are tried as the first clipping value."""


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest integer: 0 to 2^a - 1, or -2^(a-1) + 1 to 2^(a-1) - 1 where signed.

    >>> integer_range(4, signed=False), integer_range(4, signed=True)
    ((0, 15), (-7, 7))
    """
    if signed:
        return -(1 << (bits - 1)) + 1, (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = low < 0
        step = alpha / high
        return (x / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        x, alpha = ctx.saved_tensors
        above = x >= alpha
        below = x <= -alpha if ctx.signed else x < 0
        by_alpha = gradient * above
        if ctx.signed:
            by_alpha = by_alpha - gradient * below
        return gradient * ~(above | below), by_alpha.sum().view(alpha.shape), None, None


def pact(x: Float[Tensor, "*shape"], alpha: Float[Tensor, ""], bits: int, signed: bool = False) -> Tensor:
    """Return round(clip(x, 0, alpha) / s) s with s = alpha / (2^a - 1) (PACT, section 3.1 and equation 3).

    d/dx is 1 where x is within (0, alpha) and 0 elsewhere, d/dalpha is 1 where x >= alpha. Signed, not in
    the paper: clip(x, -alpha, alpha), s = alpha / (2^(a-1) - 1), and d/dalpha = -1 at the lower end.

    Args:
        x: Activations.
        alpha: The clipping value, above 0.
        bits: a, 2 to 16 (1 is allowed where not signed).
        signed: Whether values below zero are kept.

    Source: Choi et al. 2018, arXiv 1805.06085.
    """
    return _Pact.apply(x, alpha, *integer_range(bits, signed))  # type: ignore[return-value]


class _AtLeast(torch.autograd.Function):
    """A bound from below that lets the gradient through, so that what reached it can leave it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _at_least(x: Float[Tensor, ""], bound: float) -> Float[Tensor, ""]:
    return _AtLeast.apply(x, bound)  # type: ignore[return-value]


class ActivationQuantizer(nn.Module):
    """What PACT and LSQ have in common: integers from `low` to `high` times `scale`.

    Args:
        bits: a, 1 to 16; signed ones from 2 on.
        signed: Whether values below zero are kept.
    """

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        if not (2 if signed else 1) <= bits <= 16:
            raise InputError(
                "expected 1 to 16 bits an activation, 2 to 16 where signed", field="bits", value=bits
            )
        self.bits, self.signed = bits, signed
        self.low, self.high = integer_range(bits, signed)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The distance of neighbouring values."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What `install_activations` makes this quantizer of, but for the range, which is learned."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Bits and sign, as `print(model)` shows them."""
        return f"bits={self.bits}, signed={self.signed}"


class PactQuantizer(ActivationQuantizer):
    """PACT: the clipping value alpha is learned, and pulled down by the optimizer's weight decay.

    Args:
        bits, signed: As for `ActivationQuantizer`.
        alpha: First clipping value; the paper's code starts at 10.
    """

    def __init__(self, bits: int, signed: bool = False, alpha: float = 10.0) -> None:
        super().__init__(bits, signed)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def settings(self) -> dict[str, Any]:
        """Method, bits and sign."""
        return {"method": "pact", "bits": self.bits, "signed": self.signed}

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Alpha / high."""
        return _at_least(self.alpha, 1e-6) / self.high

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return quantized activations."""
        return pact(x, _at_least(self.alpha, 1e-6), self.bits, self.signed)


class LsqQuantizer(ActivationQuantizer):
    """LSQ: the step is learned, updated as `csq.rivals.lsq.positive_step` has it.

    Args:
        bits, signed: As for `ActivationQuantizer`.
        step: First step.
        features: Activations of one sample; the step's gradient is scaled by 1/sqrt(features high).
    """

    undecayed = ("log_step",)

    def __init__(self, bits: int, signed: bool = False, step: float = 1.0, features: int = 1) -> None:
        super().__init__(bits, signed)
        self.log_step = nn.Parameter(torch.tensor(float(step)).log())
        self.features = features
        self.gradient_scale = 1 / math.sqrt(features * self.high)

    def settings(self) -> dict[str, Any]:
        """Method, bits, sign and features."""
        return {"method": "lsq", "bits": self.bits, "signed": self.signed, "features": self.features}

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The learned step."""
        return positive_step(self.log_step)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return quantized activations."""
        return lsq_quantize(x, self.scale, self.low, self.high, self.gradient_scale)


@torch.no_grad()
def clipping_value(x: Float[Tensor, "..."], bits: int, signed: bool) -> float:
    """Return the alpha of the least squared error on `x`, out of 33 shares of the largest |x|."""
    low, high = integer_range(bits, signed)
    largest = x.abs().max()
    if largest == 0:
        return 1.0
    candidates = _SHARES.to(x) * largest
    errors = [(((x / (a / high)).round().clamp(low, high) * (a / high) - x) ** 2).sum() for a in candidates]
    return float(candidates[torch.stack(errors).argmin()])


def quantize_activations(
    model: nn.Module,
    bits: int,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    method: Literal["pact", "lsq"] = "pact",
    *,
    input_bits: int | None = 8,
    alpha: float | None = None,
    skip: Iterable[str] = (),
) -> nn.Module:
    """Quantize the inputs of every convolution and linear layer of a model, in place.

    Args:
        model: Any model, with weights parametrized or not.
        bits: a, 1 to 16; 32 leaves the model as it is.
        example: A batch: a tensor, a tuple of arguments, or a mapping of keyword arguments. It decides which
            inputs are signed, and where clipping starts.
        method: "pact" or "lsq".
        input_bits: Bits of the layer that is called first, whose input is the data; None leaves it alone.
        alpha: PACT's first clipping value (the official code's is 10); the one of the least squared error on
            the example where None.
        skip: Names of layers whose input stays as it is.

    Returns:
        The same model.

    Raises:
        InputError: Bits out of range, an unknown method or name in `skip`, activations that are quantized
            already, or no layer to put a quantizer before.

    Warns:
        UserWarning: Layers that the model does not call as modules (as nn.MultiheadAttention does with its
            projections) keep their floating-point inputs; it names them.

    >>> model = quantize_activations(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 4,
    ...                              torch.randn(8, 3))
    >>> model[2].input_quantizer
    PactQuantizer(bits=4, signed=False)
    """
    if bits == 32:
        return model
    plan = plan_activations(model, bits, example, method, input_bits=input_bits, alpha=alpha, skip=skip)
    return install_activations(model, plan)


def plan_activations(
    model: nn.Module,
    bits: int,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    method: Literal["pact", "lsq"] = "pact",
    *,
    input_bits: int | None = 8,
    alpha: float | None = None,
    skip: Iterable[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return the quantizers that `quantize_activations` would install, as plain values, by layer.

    Arguments and errors are those of `quantize_activations`. A model of the same structure gets the same
    quantizers by `install_activations`, without an example: so a checkpoint can be resumed.
    """
    if method not in ("pact", "lsq"):
        raise InputError("expected pact or lsq", field="method", value=method)
    for field, width in (("bits", bits), ("input_bits", input_bits)):
        if width is not None and not 1 <= width <= 16:
            raise InputError("expected 1 to 16 bits an activation, or 32 for none", field=field, value=width)
    skip = set(skip)
    layers = {name: module for name, module in model.named_modules() if _takes_activations(module)}
    if unknown := skip - layers.keys():
        raise InputError(
            f"no convolution or linear layer is called {', '.join(sorted(unknown))}", field="skip"
        )
    if any(hasattr(module, "input_quantizer") for module in layers.values()):
        raise InputError("activations are quantized already", field="model", value=type(model).__name__)
    chosen = {name: module for name, module in layers.items() if name not in skip}
    seen = _observe(model, chosen, example)
    if not seen:
        raise InputError("calls no convolution or linear layer", field="model", value=type(model).__name__)
    if missed := sorted(chosen.keys() - seen.keys()):
        warnings.warn(
            f"not called as modules, so their inputs stay in floating point: {', '.join(missed)}",
            stacklevel=3,
        )
    widths = [input_bits, *[bits] * (len(seen) - 1)]
    return {
        name: _settings(method, width, x, alpha if number else None)
        for number, ((name, x), width) in enumerate(zip(seen.items(), widths, strict=True))
        if width is not None
    }


def install_activations(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put the quantizers of a plan before the layers, in place, and return the model.

    Raises:
        InputError: The model lacks a layer of the plan.
    """
    modules = dict(model.named_modules())
    if missing := plan.keys() - modules.keys():
        raise InputError(
            f"has no layer {', '.join(sorted(missing))}", field="model", value=type(model).__name__
        )
    for name, settings in plan.items():
        device = next((p.device for p in modules[name].parameters()), None)
        modules[name].add_module("input_quantizer", make_quantizer(settings).to(device))
        modules[name].register_forward_pre_hook(_quantize_input)
    return model


def check_settings(settings: object, field: str) -> None:
    """Check an entry of a plan as `activation_plan` gives it, read from a file.

    Raises:
        InputError: It is none; `field` is what the message begins with.
    """
    keys = [("pact", {"method", "bits", "signed"}), ("lsq", {"method", "bits", "signed", "features"})]
    if not isinstance(settings, Mapping) or (settings.get("method"), settings.keys()) not in keys:
        raise InputError("expected the settings of pact or lsq", field=field, value=settings)
    if type(settings["signed"]) is not bool:
        raise InputError("expected true or false", field=f"{field}: signed", value=settings["signed"])
    least = 2 if settings["signed"] else 1
    if type(settings["bits"]) is not int or not least <= settings["bits"] <= 16:
        raise InputError(f"expected {least} to 16", field=f"{field}: bits", value=settings["bits"])
    features = settings.get("features", 1)
    if type(features) is not int or features < 1:
        raise InputError("expected a whole number above 0", field=f"{field}: features", value=features)


def make_quantizer(settings: Mapping[str, Any]) -> ActivationQuantizer:
    """Return the quantizer that an entry of a plan stands for."""
    kinds = {"pact": PactQuantizer, "lsq": LsqQuantizer}
    return kinds[settings["method"]](**{k: v for k, v in settings.items() if k != "method"})


def activation_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the quantizers that a model has, by layer, as `install_activations` takes them.

    Ranges, which are parameters, are left out: a state dict has them.
    """
    return {
        name: quantizer.settings()
        for name, module in model.named_modules()
        if isinstance(quantizer := getattr(module, "input_quantizer", None), ActivationQuantizer)
    }


def _takes_activations(module: nn.Module) -> bool:
    layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    # transformers' own, known by name so that transformers need not be imported
    return layer or any(
        base.__name__ == "Conv1D" and "transformers" in base.__module__ for base in type(module).__mro__
    )


def _quantize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = layer.input_quantizer
    return (quantizer(inputs[0]), *inputs[1:])


def _settings(method: str, bits: int, x: Tensor, alpha: float | None) -> dict[str, Any]:
    signed = bool((x < 0).any())
    high = ActivationQuantizer(bits, signed).high
    shared = {"method": method, "bits": bits, "signed": signed}
    if method == "pact":
        return shared | {"alpha": clipping_value(x, bits, signed) if alpha is None else alpha}
    return shared | {"step": float(initial_step(x, high)), "features": x[0].numel()}


@torch.no_grad()
def _observe(model: nn.Module, layers: dict[str, nn.Module], example: Any) -> dict[str, Tensor]:
    """The first input of each layer, in the order of the calls."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and name not in seen:
                seen[name] = inputs[0].detach().float()

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _own_statistics(model):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return seen


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm that has seen no batch yet normalize by the example's statistics, and keep none of them.

    With its initial statistics it passes what it gets: activations of an untrained network shrink from layer
    to layer, and ranges read off them would cut off nearly all that training then sends through.
    """
    fresh: list[Any] = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.num_batches_tracked is not None
        and not int(module.num_batches_tracked)
    ]  # fmt: skip
    kept = [(norm, norm.momentum) for norm in fresh]

    def normalize(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm.training = inputs[0].numel() > inputs[0].shape[1]  # one value a channel has no variance

    handles = [norm.register_forward_pre_hook(normalize) for norm in fresh]
    for norm in fresh:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()
            norm.eval()
