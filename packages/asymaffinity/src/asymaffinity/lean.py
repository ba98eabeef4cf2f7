"""Affinity losses without a stack of neighbours: only the cells of each box, one direction at a time.

Masks are cut to their boxes, the windows rounded up to a few sizes so that many are handled at once, and each
unordered pair of cells is met once, for both of its orders. Neighbours are shifted views. The gradient is
written down beside the value, so nothing is kept for the backward pass but the windows' gradients.

Costs in terms of softplus s(x) = log(1 + e^x), all of them exact rewritings:

    symmetric    -log(p_i p_j + (1-p_i)(1-p_j)) = s(x_i) + s(x_j) - s(x_i + x_j)
    implication  -log(1 - p_i (1 - p_j))        = s(x_i) + s(x_j) - s(x_j + s(x_i))

With s(x) = max(x, 0) + r(x), r(x) = log(1 + e^-|x|), the large parts are cancelled on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from asymaffinity.edges import EdgeBits, bit, shifted

if TYPE_CHECKING:
    from asymaffinity.functional import Rule

CHUNK = 1 << 17
"""Cells handled at once on a CPU: a dozen float32 maps of them fit into the cache of a core or two."""
CHUNK_GPU = 1 << 24
LIMIT = 1e4
"""Logits are held within this: infinities, as of half precision, would make inf - inf."""


def lean_affinity_sums(
    x: Tensor, edges: EdgeBits, cells: Tensor, image_index: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Sum of the edges' costs and their number, both scalars; the first has a gradient to the logits `x`."""
    return _Sums.apply(x, edges, cells, image_index, rule)  # type: ignore[return-value]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, edges: EdgeBits, cells: Tensor, image_index: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        total, weight = _zero(x.device), _zero(x.device)
        kept: list[tuple[_Windows, Tensor]] = []
        for windows in _windows(x, cells, edges):
            value, count, gradient = _chunk(x, edges, image_index, windows, rule, wanted)
            total += value
            weight += count
            if gradient is not None:
                kept.append((windows, gradient))
        ctx.like, ctx.windows = (x.shape, x.dtype), [windows for windows, _ in kept]
        ctx.save_for_backward(*(gradient for _, gradient in kept))
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        total, weight = total.to(kind), weight.to(kind)
        ctx.mark_non_differentiable(weight)
        return total, weight

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, outer: Tensor, _: Tensor
    ) -> tuple[Tensor | None, None, None, None, None]:
        shape, kind = ctx.like
        whole = outer.new_zeros(shape, dtype=kind)
        for windows, gradient in zip(ctx.windows, ctx.saved_tensors, strict=True):
            whole[windows.at()] = (gradient * outer).to(kind)
        return whole, None, None, None, None


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


@dataclass(frozen=True)
class _Windows:
    """Windows of one size, each in the mask of its instance."""

    instances: Tensor
    top: Tensor
    left: Tensor
    cells: Tensor
    height: int
    width: int

    def at(self) -> tuple[Tensor, Tensor, Tensor]:
        """The index that cuts the windows out of maps [instances, h, w]."""
        return self.instances[:, None, None], self._rows()[:, :, None], self._columns()[:, None, :]

    def inside(self) -> Tensor:
        """Which cells of the windows are in their boxes."""
        x0, y0, x1, y1 = (self.cells[:, i, None] for i in range(4))
        rows, columns = self._rows(), self._columns()
        return ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]

    def _rows(self) -> Tensor:
        return self.top[:, None] + torch.arange(self.height, device=self.top.device)

    def _columns(self) -> Tensor:
        return self.left[:, None] + torch.arange(self.width, device=self.left.device)


def _windows(x: Tensor, cells: Tensor, edges: EdgeBits) -> Iterator[_Windows]:
    """Each box with as many cells around it as an edge is long, in groups of equal window size.

    Where all masks together are small they are one group, uncut: groups would cost more than cells.
    """
    count, h, w = x.shape
    whole = count * h * w <= CHUNK
    reach = edges.dilation * (edges.kernel // 2)
    boxes = cells.detach().to("cpu")
    groups: dict[tuple[int, int], list[int]] = {}
    for n, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        cut = min(h, _rounded(y1 - y0 + 2 * reach)), min(w, _rounded(x1 - x0 + 2 * reach))
        groups.setdefault((h, w) if whole else cut, []).append(n)
    for (height, width), members in sorted(groups.items()):
        each = max(1, (CHUNK if x.device.type == "cpu" else CHUNK_GPU) // (height * width))
        for start in range(0, len(members), each):
            chosen = torch.tensor(members[start : start + each])
            own = boxes[chosen]
            top = (own[:, 1] - reach).clamp(min=0, max=h - height)
            left = (own[:, 0] - reach).clamp(min=0, max=w - width)
            place = x.device
            yield _Windows(chosen.to(place), top.to(place), left.to(place), own.to(place), height, width)


def _rounded(size: int) -> int:
    """The next of 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: at most a quarter more, few different sizes."""
    step = max(2, 1 << (max(size, 8).bit_length() - 3))
    return max(8, -(-size // step) * step)


@dataclass
class _Cells:
    """What the costs need of each cell, and the gradient that gathers."""

    x: Tensor
    soft: Tensor  # s(x)
    rest: Tensor  # r(x)
    p: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Cells:
        rest = F.softplus(-x.abs())
        return cls(x, x.clamp(min=0) + rest, rest, torch.sigmoid(x))

    def cut(self, rows: slice, columns: slice) -> _Cells:
        return _Cells(*(part[:, rows, columns] for part in (self.x, self.soft, self.rest, self.p)))

    def flipped(self) -> _Cells:
        """Of the opposite label: 1 - p."""
        return _Cells(-self.x, self.soft - self.x, self.rest, 1 - self.p)


_Cost = tuple[Tensor, Tensor | None, Tensor | None]
"""Value, and its derivatives by the logits of both ends (None: not asked for, or held fixed)."""


def _symmetric(a: _Cells, b: _Cells, wanted: bool) -> _Cost:
    both = a.x + b.x
    large = torch.minimum(torch.maximum(a.x, b.x), -torch.minimum(a.x, b.x)).clamp(min=0)
    value = large + (a.rest + b.rest - F.softplus(-both.abs()))
    if not wanted:
        return value, None, None
    p = torch.sigmoid(both)
    return value, a.p - p, b.p - p


def _discounted(a: _Cells, b: _Cells, kappa: float, wanted: bool) -> _Cost:
    both = a.x + b.x + math.log(kappa)
    value = a.soft + b.soft - F.softplus(both)
    if not wanted:
        return value, None, None
    p = torch.sigmoid(both)
    return value, a.p - p, b.p - p


def _implication(a: _Cells, b: _Cells, wanted: bool) -> _Cost:
    shift = b.x + a.soft
    large = torch.minimum(a.soft, (-b.x).clamp(min=0))
    value = large + (b.rest - F.softplus(-shift.abs()))
    if not wanted:
        return value, None, None
    p = torch.sigmoid(shift)
    return value, a.p * (1 - p), b.p - p


def _ordered_cost(rule: Rule) -> Callable[[_Cells, _Cells, bool], _Cost]:
    """The cost of an edge a -> b whose ends both count."""
    if rule.form == "symmetric":
        return _symmetric
    if rule.form == "discounted":
        return lambda a, b, wanted: _discounted(a, b, rule.kappa, wanted)
    if rule.up is None:
        return lambda a, b, wanted: _scaled(_implication(a, b, wanted), rule.down)
    up = rule.up

    def two_sided(a: _Cells, b: _Cells, wanted: bool) -> _Cost:
        down, d_down, _ = _implication(a, b, wanted)
        rise, d_rise, _ = _implication(a.flipped(), b.flipped(), wanted)
        value = rule.down * down + up * rise
        if d_down is None or d_rise is None:
            return value, None, None
        return value, rule.down * d_down - up * d_rise, None

    return two_sided


def _scaled(cost: _Cost, factor: float) -> _Cost:
    if factor == 1:
        return cost
    value, *slopes = cost
    first, second = (None if slope is None else slope * factor for slope in slopes)
    return value * factor, first, second


def _chunk(
    logits: Tensor, edges: EdgeBits, image_index: Tensor, windows: _Windows, rule: Rule, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of costs, number of edges and gradient of some windows."""
    at = windows.at()
    own = logits[at]
    own = own if own.dtype == torch.float64 else own.float()
    cells = _Cells.of(own.clamp(-LIMIT, LIMIT))
    bits = edges.bits[image_index[windows.instances][:, None, None], at[1], at[2]]
    inside = windows.inside()
    bits = torch.where(inside, bits, 0)  # an edge counts where it starts in the box
    gradient = torch.zeros_like(cells.x) if wanted else None
    border = torch.zeros_like(cells.x)  # edges from each cell to the known outside
    total, count = _zero(logits.device), _zero(logits.device)
    cost = _ordered_cost(rule)
    same = rule.form != "asymmetric"  # both orders of a pair cost the same
    last = len(edges.offsets) - 1
    for n, (dy, dx) in enumerate(edges.offsets[: (last + 1) // 2]):
        (ya, yb), (xa, xb) = shifted(windows.height, dy), shifted(windows.width, dx)
        first, second = (ya, xa), (yb, xb)
        weights = []
        for here, there, neighbour in ((first, second, n), (second, first, last - n)):
            kept = bits[:, here[0], here[1]] & bit(neighbour) != 0
            count += kept.sum()
            if rule.outside == "known":
                beyond = kept & ~inside[:, there[0], there[1]]
                border[:, here[0], here[1]] += beyond
                kept = kept & ~beyond
            weights.append(kept.to(cells.x.dtype))
        orders = (
            [(first, second, weights[0] + weights[1])]
            if same
            else [
                (first, second, weights[0]),
                (second, first, weights[1]),
            ]
        )
        for here, there, weight in orders:
            value, d_here, d_there = cost(cells.cut(*here), cells.cut(*there), wanted)
            total += (value * weight).sum()
            if gradient is not None and d_here is not None:
                gradient[:, here[0], here[1]] += d_here * weight
            if gradient is not None and d_there is not None:
                gradient[:, there[0], there[1]] += d_there * weight
    if rule.outside == "known":
        total += (border * cells.soft).sum()
        if gradient is not None:
            gradient += border * cells.p
    return total, count, gradient
