"""Other losses for masks from boxes, to compare with: bags of rows and columns, and level sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from asymaffinity.grid import cell_masks


def mil_loss(logits: Float[Tensor, "instances h w"], cells: Int[Tensor, "instances 4"]) -> Float[Tensor, ""]:
    """Multiple-instance loss of BBTP (Hsu et al., NeurIPS 2019), in place of the projection loss.

    Each row and column of the box holds an object cell: -log of the largest p of its cells in the box. Those
    beside the box hold none: -log(1 - the largest p). The mean over each kind, added up.

    Args:
        logits: Masks on the grid.
        cells: Boxes in cells, as `box_cells` gives.

    Returns:
        The mean over instances; 0 without any.
    """
    if len(logits) == 0:
        return logits.sum()
    x = logits if logits.dtype == torch.float64 else logits.float()
    inside = cell_masks(cells, (x.shape[1], x.shape[2]))
    held = x.masked_fill(~inside, torch.finfo(x.dtype).min)
    positive, negative, crossing = [], [], []
    for axis in (1, 2):
        crosses = inside.any(axis)
        positive.append(F.softplus(-torch.where(crosses, held.max(axis).values, 0)) * crosses)
        negative.append(F.softplus(x.max(axis).values) * ~crosses)
        crossing.append(crosses)
    bags = torch.cat(crossing, 1)
    lost = torch.cat(positive, 1).sum(1) / bags.sum(1)
    leaked = torch.cat(negative, 1).sum(1) / (~bags).sum(1).clamp(min=1)
    return (lost + leaked).mean()


def level_set_loss(
    logits: Float[Tensor, "instances h w"],
    features: Float[Tensor, "images channels h w"],
    cells: Int[Tensor, "instances 4"],
    image_index: Int[Tensor, " instances"],
    *,
    gamma: float = 0.01,
) -> Float[Tensor, ""]:
    """Chan-Vese energy in each box, as in BoxLevelSet (Li et al., ECCV 2022), beside the projection loss.

        mean over the box of  |f - c1|^2 p + |f - c2|^2 (1 - p)  +  gamma * mean |grad p|

    with c1 and c2 the means of the features f inside and outside the mask. Divided by the features' variance
    in the box, which makes it free of their unit: 1 where the mask tells nothing apart, 0 where both parts
    are uniform. The division is this package's.

    Args:
        logits: Masks on the grid.
        features: LAB colours, or a network's.
        cells: Boxes in cells, as `box_cells` gives.
        image_index: To which image of `features` each mask belongs.
        gamma: Weight of the mask's outline.

    Returns:
        The mean over instances; 0 without any.
    """
    if len(logits) == 0:
        return logits.sum()
    p = torch.sigmoid(logits.float())
    box = cell_masks(cells, (p.shape[1], p.shape[2])).to(p.dtype)
    area = box.sum((1, 2))
    values = features.to(p.dtype)[image_index]
    energy, whole = _spread(values, p * box) + _spread(values, (1 - p) * box), _spread(values, box)
    outline = sum(
        ((p.narrow(axis, 1, size) - p.narrow(axis, 0, size)).abs()
         * box.narrow(axis, 1, size) * box.narrow(axis, 0, size)).sum((1, 2))
        for axis, size in ((1, p.shape[1] - 1), (2, p.shape[2] - 1))
    )  # fmt: skip
    flat = whole <= 1e-8 * area  # one colour: nothing to tell apart
    return (torch.where(flat, 0, energy / whole.clamp(min=1e-8)) + gamma * outline / area).mean()


def _spread(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of squared distances from the weighted mean, of each instance."""
    total = weight.sum((1, 2)).clamp(min=1e-6)
    mean = (values * weight[:, None]).sum((2, 3)) / total[:, None]
    away = (values - mean[:, :, None, None]).square().sum(1)
    return (away * weight).sum((1, 2))
