"""Find where the method applies by watching one forward pass, not by module names.

The LayerNorm outputs are followed through the operations that only move values (views, permutations, padding,
window partition) to their consumers. A LayerNorm is a *site* when linear layers read its output; it can be
reparameterized when nothing else does. The same pass finds the attention modules (where
`scaled_dot_product_attention` is called), the first layer (which keeps an 8-bit input) and the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NATIVE: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]  # absent from torch's stubs
_MOVES_VALUES: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.view,
        Tensor.reshape,
        torch.reshape,
        Tensor.flatten,
        torch.flatten,
        Tensor.unflatten,
        Tensor.permute,
        torch.permute,
        Tensor.transpose,
        torch.transpose,
        Tensor.contiguous,
        Tensor.clone,
        Tensor.to,
        Tensor.float,
        Tensor.unbind,
        Tensor.roll,
        torch.roll,
        Tensor.squeeze,
        Tensor.unsqueeze,
        torch.unsqueeze,
        Tensor.expand,
        Tensor.detach,
        F.dropout,
        torch.dropout,
        F.pad,
        _NATIVE.pad,
        Tensor.__getitem__,
    }
)
_COMBINES = frozenset(
    {
        torch.add,
        Tensor.add,
        Tensor.__add__,
        Tensor.__truediv__,
        torch.div,
        Tensor.div,
        Tensor.__mul__,
        torch.mul,
        Tensor.mul,
        torch.sigmoid,
        Tensor.sigmoid,
        torch.mean,
        Tensor.mean,
        Tensor.squeeze,
    }
)
_PADS = frozenset({F.pad, _NATIVE.pad})
_ATTENTION = F.scaled_dot_product_attention
_SOFTMAX = frozenset({torch.softmax, F.softmax, Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum})


@dataclass
class NormSite:
    """A LayerNorm whose output is read by linear layers."""

    norm: str
    linears: list[str]
    padded: bool = False
    """Zeros may be padded to the output before the linear layers read it."""
    obstacle: str = ""
    """Why it cannot be reparameterized; empty where it can."""


@dataclass
class Wiring:
    """What one forward pass showed, by module name, in order of first use."""

    sites: list[NormSite] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    """Linear and Conv2d modules that were called; the first is the stem."""
    heads: list[str] = field(default_factory=list)
    """Linear modules whose output is (part of) the model's output."""
    attentions: list[str] = field(default_factory=list)
    """Modules that call scaled_dot_product_attention."""
    gelus: list[str] = field(default_factory=list)
    """Linear modules that read the output of a GELU."""
    floating: list[str] = field(default_factory=list)
    """Products that stay in floating point, in words."""


@dataclass
class _Origin:
    norm: str
    width: int
    padded: bool = False
    pooled: bool = False


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wiring = Wiring()
        self.stack: list[str] = []
        self.origins: dict[int, _Origin] = {}
        # What computed a tensor, by the tensor's id: "softmax" or "gelu".
        self.producers: dict[int, str] = {}
        # The linear layers that alone computed a tensor, up to sums and elementwise functions of them.
        self.linears: dict[int, set[str]] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.consumers: dict[str, set[str]] = {}
        self.norm_calls: dict[str, int] = {}
        self.layer_calls: dict[str, int] = {}
        self.sites: dict[str, NormSite] = {}
        self.weight_owners: dict[int, set[str]] = {}  # several where layers are tied
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                self.weight_owners.setdefault(id(module.weight), set()).add(name)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not outputs:
            return result  # a shape, a dtype, a flag: not a use of the values
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._note_kind(func, inputs, outputs)
        here = self.stack[-1] if self.stack else ""
        inside_linear = func is F.linear and here in self._owners(inputs)
        for tensor in inputs:
            origin = self.origins.get(id(tensor))
            if origin is not None and not inside_linear:
                self._follow(func, args, kwargs or {}, origin, outputs)
        return result

    def _owners(self, inputs: list[Tensor]) -> set[str]:
        """The layers whose weight is among the inputs of a linear or convolution call."""
        return next((self.weight_owners[id(t)] for t in inputs if id(t) in self.weight_owners), set())

    def _note_kind(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        here = self.stack[-1] if self.stack else ""
        if func is _ATTENTION:
            if here not in self.wiring.attentions:
                self.wiring.attentions.append(here)
        elif func in _SOFTMAX:
            self._produce(outputs, "softmax")
        elif func is F.gelu or func is _NATIVE.gelu:
            self._produce(outputs, "gelu")
        elif func in _COMBINES and inputs and all(id(t) in self.linears for t in inputs):
            self._derive(outputs, set().union(*(self.linears[id(t)] for t in inputs)))
        elif func in _PRODUCTS and any(self.producers.get(id(t)) == "softmax" for t in inputs):
            self.wiring.floating.append(f"softmax @ values in {here or 'the model'}")
        elif func in (F.linear, F.conv2d):
            owners = self._owners(inputs)
            if owners and here not in owners:
                self.wiring.floating.append(
                    f"the weight of {min(owners)}, used directly in {here or 'the model'}"
                )

    def _derive(self, outputs: list[Tensor], linears: set[str]) -> None:
        self.alive.extend(outputs)
        self.linears.update({id(t): linears for t in outputs})

    def _produce(self, outputs: list[Tensor], what: str) -> None:
        self.alive.extend(outputs)
        self.producers.update({id(t): what for t in outputs})

    def _follow(self, func: Any, args: tuple, kwargs: dict, origin: _Origin, outputs: list[Tensor]) -> None:
        same_width = all(t.ndim and t.shape[-1] == origin.width for t in outputs)
        if func in _MOVES_VALUES and same_width and _keeps_last_axis(func, args, kwargs):
            moved = _Origin(
                origin.norm,
                origin.width,
                origin.padded or func in _PADS,
                origin.pooled or func is Tensor.__getitem__,
            )
            self.alive.extend(outputs)
            self.origins.update({id(t): moved for t in outputs})
        else:
            name = getattr(func, "__name__", str(func))
            self.consumers.setdefault(origin.norm, set()).add(name)

    def enter(self, name: str, module: nn.Module, args: tuple) -> None:
        self.stack.append(name)
        if not isinstance(module, nn.Linear | nn.Conv2d) or not args:
            return
        self.layer_calls[name] = self.layer_calls.get(name, 0) + 1
        if name not in self.wiring.layers:
            self.wiring.layers.append(name)
        if self.producers.get(id(args[0])) == "gelu" and isinstance(module, nn.Linear):
            self.wiring.gelus.append(name)
        origin = self.origins.get(id(args[0]))
        if origin is None:
            return
        if isinstance(module, nn.Conv2d):
            self.consumers.setdefault(origin.norm, set()).add("a convolution")
            return
        site = self.sites.setdefault(origin.norm, NormSite(origin.norm, []))
        if name not in site.linears:
            site.linears.append(name)
        site.padded |= origin.padded
        if origin.pooled:
            self.consumers.setdefault(origin.norm, set()).add("token selection before the linear layer")

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        if isinstance(module, nn.LayerNorm) and isinstance(output, Tensor):
            self.norm_calls[name] = self.norm_calls.get(name, 0) + 1
            self.alive.append(output)
            self.origins[id(output)] = _Origin(name, output.shape[-1])
        elif isinstance(module, nn.Linear) and isinstance(output, Tensor):
            self._derive([output], {name})
        elif isinstance(output, Tensor) and isinstance(module, nn.GELU):
            self._produce([output], "gelu")


def _keeps_last_axis(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call that moves values, with an output as wide as its input, leaves channels in their order.

    Views and reshapes do: in row-major order the channel is the position modulo the width.
    """
    if not args:
        return False
    last = args[0].ndim - 1
    if func in (Tensor.permute, torch.permute):
        order = kwargs.get("dims", args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
        return order[-1] % (last + 1) == last
    if func in (Tensor.transpose, torch.transpose):
        axes = [*args[1:], *(kwargs[k] for k in ("dim0", "dim1") if k in kwargs)]
        return all(axis % (last + 1) != last for axis in axes)
    if func in (Tensor.roll, torch.roll):
        axes = kwargs.get("dims", args[2] if len(args) > 2 else ())
        axes = [axes] if isinstance(axes, int) else list(axes)
        return bool(axes) and all(axis % (last + 1) != last for axis in axes)
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        reaches_last = len(index) > last or any(part is Ellipsis for part in index)
        return not reaches_last or index[-1] is Ellipsis or index[-1] == slice(None)
    return True


@contextmanager
def _hooks(model: nn.Module, watcher: _Watcher) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, n=name: watcher.enter(n, m, a)))
        handles.append(module.register_forward_hook(lambda m, a, out, n=name: watcher.leave(n, m, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(model: nn.Module, forward: Callable[[nn.Module], Any]) -> Wiring:
    """Run `forward(model)` once and describe the model's wiring.

    The model must be in evaluation mode and have gone through `hosts.prepare`.
    """
    watcher = _Watcher(model)
    with _hooks(model, watcher), watcher:
        output = forward(model)
    wiring = watcher.wiring
    for tensor in (t for t in tree_leaves(output) if isinstance(t, Tensor)):
        origin = watcher.origins.get(id(tensor))
        if origin is not None:
            watcher.consumers.setdefault(origin.norm, set()).add("the model's output")
        wiring.heads += sorted(watcher.linears.get(id(tensor), set()) - set(wiring.heads))
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            owners.setdefault(id(module.weight), []).append(name)
    for site in watcher.sites.values():
        site.obstacle = _obstacle(
            site, watcher, {n for group in owners.values() if len(group) > 1 for n in group}
        )
        wiring.sites.append(site)
    return wiring


def _obstacle(site: NormSite, watcher: _Watcher, tied: set[str]) -> str:
    others = sorted(watcher.consumers.get(site.norm, ()))
    if others:
        return f"its output also goes to {', '.join(others)}"
    if any(linear in watcher.wiring.heads for linear in site.linears):
        return "it feeds the head, whose input the paper quantizes per tensor"
    if watcher.norm_calls[site.norm] > 1:
        return "it is used more than once in a forward pass"
    for linear in site.linears:
        if watcher.layer_calls[linear] > 1:
            return f"{linear} is used more than once in a forward pass"
        if linear in tied:
            return f"the weight of {linear} is shared with another layer"
    return ""
