"""Edges between near cells that look alike, one bit an edge, made once an image and shared by its instances.

The neighbours of a cell are a square window of `kernel` x `kernel` cells, `dilation` apart, without the cell
itself, row by row: neighbour 0 is the upper left one. Bit n of a cell says that its neighbour n lies in the
image, is valid, and looks alike (BoxInst, equation 4 and section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from shared_core import InputError


def check_window(kernel: int, dilation: int) -> None:
    """Refuse a window that has no middle, more edges than a word has bits, or no distance."""
    if kernel % 2 == 0 or not 3 <= kernel <= 7:
        raise InputError("expected 3, 5 or 7: the window needs a middle", field="kernel", value=kernel)
    if dilation < 1:
        raise InputError("expected at least 1", field="dilation", value=dilation)


def neighbour_offsets(kernel: int = 3, dilation: int = 2) -> list[tuple[int, int]]:
    """Rows and columns from a cell to each neighbour, in the order of the bits.

    The opposite of neighbour n of K is neighbour K - 1 - n.

    >>> neighbour_offsets(3, 2)
    [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]
    """
    check_window(kernel, dilation)
    steps = [dilation * step for step in range(-(kernel // 2), kernel // 2 + 1)]
    return [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]


def shifted(size: int, step: int) -> tuple[slice, slice]:
    """Slices of one axis: cells with a neighbour `step` further, and those neighbours."""
    if step >= 0:
        return slice(0, max(0, size - step)), slice(min(step, size), size)
    return slice(min(-step, size), size), slice(0, max(0, size + step))


@dataclass(frozen=True)
class EdgeBits:
    """Edges of a batch of images.

    Attributes:
        bits: One word a cell, shape [images, h, w]: uint8 for 8 neighbours, int32 for 24, int64 for 48.
        kernel: Side of the window in cells, odd.
        dilation: Cells from one neighbour to the next.
    """

    bits: Shaped[Tensor, "images h w"]
    kernel: int = 3
    dilation: int = 2

    def __post_init__(self) -> None:
        check_window(self.kernel, self.dilation)
        if self.bits.dtype != word(self.kernel):
            raise InputError(f"expected {word(self.kernel)}", field="bits", value=self.bits.dtype)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """As `neighbour_offsets`."""
        return neighbour_offsets(self.kernel, self.dilation)

    def stack(self) -> Bool[Tensor, "images neighbours h w"]:
        """The bits as one map of booleans for each neighbour."""
        return torch.stack([self.bits & bit(n) != 0 for n in range(len(self.offsets))], 1)

    def share(self) -> float:
        """Share of edges that are kept, of all that end in the image."""
        h, w = self.bits.shape[1:]
        ends = sum(max(0, h - abs(dy)) * max(0, w - abs(dx)) for dy, dx in self.offsets)
        kept = sum(int((self.bits & bit(n) != 0).sum()) for n in range(len(self.offsets)))
        return kept / max(1, ends * len(self.bits))

    def to(self, device: torch.device | str) -> EdgeBits:
        """The same on another device."""
        return EdgeBits(self.bits.to(device, non_blocking=True), self.kernel, self.dilation)

    def joined(self, other: EdgeBits, how: Literal["and", "or"]) -> EdgeBits:
        """Edges that both have (`and`: the smaller similarity counts) or either has (`or`)."""
        if (self.kernel, self.dilation) != (other.kernel, other.dilation):
            raise InputError("expected edges of the same window", field="edges")
        bits = self.bits & other.bits if how == "and" else self.bits | other.bits
        return EdgeBits(bits, self.kernel, self.dilation)


def word(kernel: int) -> torch.dtype:
    """The integer that holds a bit for each neighbour."""
    return {3: torch.uint8, 5: torch.int32}.get(kernel, torch.int64)


def bit(neighbour: int) -> int:
    """The mask of a neighbour's bit."""
    return 1 << neighbour


def batched(edges: Sequence[EdgeBits], grid: tuple[int, int] | None = None) -> EdgeBits:
    """Edges of several images as one batch; cells beyond an image have no edge, and none leads to them."""
    if not edges:
        raise InputError("expected at least one image", field="edges")
    first = edges[0]
    rows = max(e.bits.shape[1] for e in edges) if grid is None else grid[0]
    columns = max(e.bits.shape[2] for e in edges) if grid is None else grid[1]
    bits = first.bits.new_zeros(sum(len(e.bits) for e in edges), rows, columns)
    at = 0
    for each in edges:
        if (each.kernel, each.dilation) != (first.kernel, first.dilation):
            raise InputError("expected edges of the same window", field="edges")
        n, h, w = each.bits.shape
        bits[at : at + n, : min(h, rows), : min(w, columns)] = each.bits[:, :rows, :columns]
        at += n
    return EdgeBits(bits, first.kernel, first.dilation)


def distances(
    features: Float[Tensor, "images channels h w"], offset: tuple[int, int]
) -> Float[Tensor, "images h2 w2"]:
    """Euclidean distance from each cell that has a neighbour at this offset to that neighbour."""
    (ya, yb), (xa, xb) = (shifted(size, step) for size, step in zip(features.shape[2:], offset, strict=True))
    gap = features[:, :, ya, xa] - features[:, :, yb, xb]
    return gap.square().sum(1).sqrt()


def alike(
    features: Float[Tensor, "images channels h w"],
    theta: float,
    thresh: float,
    valid: Bool[Tensor, "images h w"] | None = None,
    *,
    both: bool = False,
    kernel: int = 3,
    dilation: int = 2,
) -> EdgeBits:
    """Edges between cells of like features: exp(-distance / theta) >= thresh.

    Args:
        features: Colours, gradients or anything else, on the grid.
        theta: Distance at which the similarity is 1/e.
        thresh: Similarity from which an edge is kept.
        valid: Cells that may be the neighbour of an edge; where None all.
        both: Whether the cell itself must be valid too. BoxInst asks for the neighbour alone.
        kernel: Side of the window.
        dilation: Cells from one neighbour to the next.
    """
    offsets = neighbour_offsets(kernel, dilation)
    if not theta > 0:
        raise InputError("expected a number above 0", field="theta", value=theta)
    if not 0 < thresh <= 1:
        raise InputError("expected a similarity above 0, at most 1", field="thresh", value=thresh)
    furthest = -theta * math.log(thresh)
    bits = torch.zeros(features.shape[0], *features.shape[2:], dtype=word(kernel), device=features.device)
    last = len(offsets) - 1
    for n in range(len(offsets) // 2):
        dy, dx = offsets[n]
        (ya, yb), (xa, xb) = shifted(features.shape[2], dy), shifted(features.shape[3], dx)
        kept = distances(features, offsets[n]) <= furthest
        there = back = kept
        if valid is not None:
            a, b = valid[:, ya, xa], valid[:, yb, xb]
            there, back = (kept & a & b,) * 2 if both else (kept & b, kept & a)
        bits[:, ya, xa] |= there.to(bits.dtype) * bit(n)
        bits[:, yb, xb] |= back.to(bits.dtype) * bit(last - n)
    return EdgeBits(bits, kernel, dilation)


def edge_statistics(edges: EdgeBits, labels: Int[Tensor, "images h w"]) -> dict[str, float]:
    """How good edges are where masks are known.

    Args:
        edges: Of some images.
        labels: Instance of each cell, 0 for none.

    Returns:
        positive_share: kept edges of all; precision: those of the kept that join equal labels; leak: kept
        edges of all that join different labels.
    """
    kept = right = different = leaking = total = 0
    for n, (dy, dx) in enumerate(edges.offsets):
        (ya, yb), (xa, xb) = shifted(labels.shape[1], dy), shifted(labels.shape[2], dx)
        keep = edges.bits[:, ya, xa] & bit(n) != 0
        same = labels[:, ya, xa] == labels[:, yb, xb]
        total += same.numel()
        kept += int(keep.sum())
        right += int((keep & same).sum())
        different += int((~same).sum())
        leaking += int((keep & ~same).sum())
    return {
        "positive_share": kept / max(1, total),
        "precision": right / max(1, kept),
        "leak": leaking / max(1, different),
    }
