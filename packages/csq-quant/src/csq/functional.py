"""The bit-level weight as a function of its gates, with its gradients in closed form.

CSQ, Section 3: with bit planes b = 0..n-1 of place value 2^b and the gate f_β(m) = sigmoid(β m),

    W = s / (2^n - 1) · Σ_b 2^b [ f_β(m_p^b) - f_β(m_n^b) ] f_β(m_B^b).

Written plainly, autograd keeps about five copies of every plane for the backward pass. Here one function
keeps its arguments only, recomputes the gates in the backward pass and adds planes into one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from csq import kernels

CHUNK = 2**18
"""Elements of a temporary: planes of small layers are worked on together, large layers plane by plane."""


def bit_weight(
    positive: Float[Tensor, " planes *shape"],
    negative: Float[Tensor, " planes *shape"],
    mask: Float[Tensor, " planes"],
    scale: Float[Tensor, ""],
    temperature: float | Float[Tensor, ""],
    *,
    compiled: bool = False,
) -> Float[Tensor, "*shape"]:
    """The soft weight of a layer: bits and bit-selection mask relaxed at one temperature (CSQ, Section 3).

    Args:
        positive: gates m_p, plane b (place value 2^b) first axis, least significant first.
        negative: gates m_n.
        mask: the layer's bit-selection gates m_B.
        scale: s, above 0.
        temperature: β, from 1 (soft) to 200 (as good as 0/1).
        compiled: use the fused kernel of torch.compile, where there is a compiler.

    Returns:
        W, differentiable once in the gates, the mask and the scale.

    Example:
        >>> import torch
        >>> bits = torch.tensor([[1.0], [-1.0], [1.0]])  # 101 in binary, least significant first
        >>> none = -torch.ones(3, 1)
        >>> bit_weight(bits, none, torch.ones(3), torch.tensor(7.0), 200.0)
        tensor([5.])
    """
    gates = torch.sigmoid(mask * temperature)
    return plane_sum(positive, negative, gates, scale, temperature, compiled=compiled)


def plane_sum(
    positive: Float[Tensor, " planes *shape"],
    negative: Float[Tensor, " planes *shape"],
    gates: Float[Tensor, " planes"],
    scale: Float[Tensor, ""],
    temperature: float | Float[Tensor, ""],
    live: Sequence[int] | None = None,
    *,
    compiled: bool = False,
    buffers: GradientBuffers | None = None,
) -> Float[Tensor, "*shape"]:
    """`bit_weight` for mask gates that are given in [0, 1], soft or fixed.

    Args:
        positive: m_p, least significant plane first.
        negative: m_n.
        gates: the value of each plane's mask gate.
        scale: s.
        temperature: β of the weight gates.
        live: the planes to compute, ascending; the others are taken as switched off, cost nothing and get the
            gradient 0. All planes unless given.
        compiled: as in `bit_weight`.
        buffers: memory to reuse for gradients, step after step.
    """
    planes = tuple(range(len(gates))) if live is None else tuple(live)
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=positive.dtype, device=positive.device)
    return _PlaneSum.apply(positive, negative, gates, scale, temperature, planes, compiled, buffers)  # pyright: ignore[reportReturnType]


def naive_bit_weight(
    positive: Float[Tensor, " planes *shape"],
    negative: Float[Tensor, " planes *shape"],
    mask: Float[Tensor, " planes"],
    scale: Float[Tensor, ""],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, "*shape"]:
    """The formula as one writes it first, differentiated by autograd: judge and peer of `bit_weight`."""
    n = len(mask)
    values = 2.0 ** torch.arange(n, dtype=mask.dtype, device=mask.device)
    bits = torch.sigmoid(temperature * positive) - torch.sigmoid(temperature * negative)
    planes = values * torch.sigmoid(temperature * mask)
    return scale / (2**n - 1) * (planes.view(-1, *[1] * (positive.dim() - 1)) * bits).sum(0)


class _PlaneSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        positive: Tensor,
        negative: Tensor,
        gates: Tensor,
        scale: Tensor,
        temperature: Tensor,
        live: tuple[int, ...],
        compiled: bool,
        buffers: GradientBuffers | None,
    ) -> Tensor:
        ctx.save_for_backward(positive, negative, gates, scale, temperature)
        ctx.live, ctx.compiled, ctx.buffers = live, compiled, buffers
        # Products of place values and 0/1 gates are whole numbers, exact in float32; the step comes last. A
        # weight whose gates have all closed is therefore step · integer, to the last bit.
        factors = gates * place_values(gates)
        total = positive.new_zeros(positive[0].numel())
        kernel = kernels.forward(compiled)
        for part in _parts(live, total.numel(), compiled):
            kernel(_rows(positive, part), _rows(negative, part), factors[part].detach(), temperature, total)
        return (total * step_size(scale, len(gates))).view(positive.shape[1:])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # d loss / d argument, in closed form
        if torch.is_grad_enabled():
            raise RuntimeError(
                "csq's weights are differentiable once: use create_graph=False, or csq.functional."
                "naive_bit_weight where second derivatives are needed"
            )
        positive, negative, gates, scale, temperature = ctx.saved_tensors
        (upstream,) = outputs
        n, step = len(gates), step_size(scale, len(gates))
        upstream = upstream.to(positive.dtype).reshape(-1).detach()
        values = place_values(gates)
        factors = gates * values * step * temperature
        d_positive, d_negative = _empty(ctx.buffers, positive), _empty(ctx.buffers, negative)
        inner = torch.zeros_like(gates)  # Σ_i (p_i - q_i) G_i of each plane
        kernel = kernels.backward(ctx.compiled)
        for part in _parts(ctx.live, upstream.numel(), ctx.compiled):
            into = _written(d_positive, part), _written(d_negative, part)
            rows = _rows(positive, part), _rows(negative, part)
            kernel(*rows, factors[part].detach(), temperature, upstream, *into, inner[part].detach())
        for dead in set(range(n)) - set(ctx.live):
            d_positive[dead].zero_()
            d_negative[dead].zero_()
        d_gates = values * step * inner
        d_scale = (gates * values * inner).sum() / (2**n - 1)
        return d_positive, d_negative, d_gates, d_scale, None, None, None, None


class GradientBuffers:
    """Memory for the gradients of one layer's planes, used again when nothing else holds on to it.

    Gradients of 2n planes are large, and fresh memory of that size costs the CPU more in page faults than the
    gradients take to compute. (On a GPU, torch's allocator keeps memory already.)
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.UntypedStorage, int]] = []

    def empty(self, like: Tensor) -> Tensor:
        """A tensor as `like`, of any content."""
        for storage, own_uses in self._kept:
            if storage.nbytes() == like.nbytes and _uses(storage) == own_uses:
                return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, like.stride())  # pyright: ignore[reportArgumentType, reportCallIssue]
        made = torch.empty_like(like, memory_format=torch.contiguous_format)
        if len(self._kept) < 2:  # one for each sign; more are asked for where gradients are accumulated
            storage = made.untyped_storage()
            self._kept.append((storage, _uses(storage) - 1))
        return made

    def __deepcopy__(self, memo: object) -> GradientBuffers:
        return GradientBuffers()


def _uses(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]


def _empty(buffers: GradientBuffers | None, like: Tensor) -> Tensor:
    on_cpu = like.device.type == "cpu" and not torch.compiler.is_compiling()
    if buffers is None or not on_cpu or not like.is_contiguous():
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return buffers.empty(like)


def place_values(gates: Float[Tensor, " planes"]) -> Float[Tensor, " planes"]:
    """2^b of each plane, a constant of dtype and device of `gates`."""
    return torch.exp2(torch.arange(len(gates), device=gates.device, dtype=gates.dtype))


def step_size(scale: Float[Tensor, ""], planes: int) -> Float[Tensor, ""]:
    """The weight of one unit in the last plane: s / (2^n - 1)."""
    return scale / (2**planes - 1)


def _rows(planes: Tensor, part: slice) -> Tensor:
    # Detached: the compiler tells views by the shapes of what they view, and would compile anew for each.
    return (planes[part].flatten(1) if planes.dim() > 1 else planes[part].unsqueeze(1)).detach()


def _written(planes: Tensor, part: slice) -> Tensor:
    """A view to write through: it raises where `flatten` would give a copy."""
    chosen = planes[part]
    return chosen.view(len(chosen), -1).detach()


def _parts(live: tuple[int, ...], weights: int, compiled: bool) -> Iterator[slice]:
    """Runs of neighbouring live planes, cut so that a temporary stays small."""
    most = len(live) if compiled else max(1, CHUNK // max(1, weights))
    start = 0
    while start < len(live):
        stop = start + 1
        while stop < len(live) and live[stop] == live[stop - 1] + 1 and stop - start < most:
            stop += 1
        yield slice(live[start], live[stop - 1] + 1)
        start = stop
