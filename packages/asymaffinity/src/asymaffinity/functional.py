"""The losses as functions of plain tensors.

Masks are logits x [N, h, w] on the grid of `asymaffinity.grid`, p = sigmoid(x); boxes are rectangles of
cells.

Projection (BoxInst, equation 2): the mask's maxima over rows and columns against those of the box.

Affinity, for each ordered edge i -> j from a cell i in the box to a neighbour j that looks alike:

    symmetric (BoxInst, equation 5)    -log(p_i p_j + (1 - p_i)(1 - p_j))
    asymmetric, j in the box           -log(1 - p_i (1 - p_j))     if i is object then so is j
    asymmetric, j outside              -log(1 - p_i)               the outside is known to be background
    discounted                         -log(kappa p_i p_j + (1 - p_i)(1 - p_j))

each summed over all instances together and divided by the number of edges, at least 1. The asymmetric form is
a reconstruction from the abstract of AsyInst (arXiv 2212.03517): the paper has no released code.

Each loss has two implementations that agree in value and gradient: `lean=True` looks at the cells of each box
alone, edge by edge, without ever holding all neighbours of all masks; `lean=False` stacks the neighbours and
leaves the gradient to autograd, as the reference implementations do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from asymaffinity.edges import EdgeBits
from asymaffinity.grid import cell_masks
from asymaffinity.lean import LIMIT, lean_affinity_sums
from shared_core import InputError

FORMS = ("symmetric", "asymmetric", "discounted")
OUTSIDE = ("known", "predicted")


@dataclass(frozen=True)
class Rule:
    """What an edge costs.

    Attributes:
        form: symmetric, asymmetric or discounted; see the module.
        outside: Of cells beyond the box: ``known`` to be background, or as ``predicted``.
        down: Weight of "the neighbour is background, so this cell is"; see `up`.
        up: Weight of "the neighbour is object, so this cell is". Where None, the gradient of the asymmetric
            form reaches both ends of an edge; with a number, the neighbour is held fixed, and an edge costs
            ``-down log(1 - p_i (1 - q_j)) - up log(1 - (1 - p_i) q_j)``.
        kappa: Of the discounted form, above 0 and at most 1.

    Raises:
        InputError: A field is out of range.
    """

    form: str = "asymmetric"
    outside: str = "known"
    down: float = 1.0
    up: float | None = None
    kappa: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (
            ("form", FORMS),
            ("outside", OUTSIDE),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"expected one of {', '.join(known)}", field=name, value=getattr(self, name))
        if not 0 < self.kappa <= 1:
            raise InputError("expected a number above 0, at most 1", field="kappa", value=self.kappa)
        for name in ("down", "up"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError("expected a number of at least 0", field=name, value=value)


BOXINST = Rule(form="symmetric", outside="predicted")
"""The symmetric loss of BoxInst: the outside is as predicted."""


def projection_loss(
    logits: Float[Tensor, "instances h w"], cells: Int[Tensor, "instances 4"]
) -> Float[Tensor, ""]:
    """Dice loss of the mask's projections on both axes, mean over instances (BoxInst, equation 2).

    Args:
        logits: Masks.
        cells: Boxes in cells, as `box_cells` gives.

    Returns:
        D(rows) + D(columns), D(u, v) = 1 - 2 sum uv / (sum u^2 + sum v^2 + 1e-5); 0 without instances.
    """
    if len(logits) == 0:
        return logits.sum()
    x = logits.double() if logits.dtype == torch.float64 else logits.float()
    x0, y0, x1, y1 = (cells[:, i, None] for i in range(4))
    # The maximum of the sigmoid is the sigmoid of the maximum: no map of probabilities is made.
    loss = x.new_zeros(())
    for axis, low, high in ((1, x0, x1), (2, y0, y1)):
        found = torch.sigmoid(x.max(axis).values)
        place = torch.arange(found.shape[1], device=x.device)
        wanted = ((place >= low) & (place < high)).to(x.dtype)
        union = found.square().sum(1) + wanted.square().sum(1) + 1e-5
        loss = loss + (1 - 2 * (found * wanted).sum(1) / union).mean()
    return loss


def affinity_loss(
    logits: Float[Tensor, "instances h w"],
    edges: EdgeBits,
    cells: Int[Tensor, "instances 4"],
    image_index: Int[Tensor, " instances"],
    rule: Rule | None = None,
    *,
    lean: bool = True,
) -> Float[Tensor, ""]:
    """The affinity loss of any form; the formulas are the module's.

    Args:
        logits: Masks. Computed in float32, or in float64 where they are.
        edges: Of the images, on the grid of the masks.
        cells: Boxes in cells, as `box_cells` gives.
        image_index: To which image of `edges` each mask belongs.
        rule: The form and its options; where None, the default asymmetric one.
        lean: Which implementation.

    Returns:
        The mean over edges; 0 where there is none.

    Raises:
        InputError: The grids differ or an index is beyond the images.
    """
    rule = rule or Rule()
    _check(logits, edges, image_index)
    if len(logits) == 0:
        return logits.sum()
    if lean:
        total, weight = lean_affinity_sums(logits, edges, cells, image_index, rule)
    else:
        x = logits if logits.dtype == torch.float64 else logits.float()
        total, weight = _stacked_sums(x.clamp(-LIMIT, LIMIT), edges, cells, image_index, rule)
    return total / weight.clamp(min=1)


def symmetric_affinity_loss(
    logits: Float[Tensor, "instances h w"],
    edges: EdgeBits,
    cells: Int[Tensor, "instances 4"],
    image_index: Int[Tensor, " instances"],
    *,
    lean: bool = True,
) -> Float[Tensor, ""]:
    """The pairwise loss of BoxInst: alike cells should have the same label. Arguments as `affinity_loss`."""
    return affinity_loss(logits, edges, cells, image_index, BOXINST, lean=lean)


def asymmetric_affinity_loss(
    logits: Float[Tensor, "instances h w"],
    edges: EdgeBits,
    cells: Int[Tensor, "instances 4"],
    image_index: Int[Tensor, " instances"],
    *,
    outside: str = "known",
    lean: bool = True,
) -> Float[Tensor, ""]:
    """The asymmetric loss: an object's alike neighbours are object. Arguments as `affinity_loss`."""
    return affinity_loss(logits, edges, cells, image_index, Rule("asymmetric", outside), lean=lean)


def dice_loss(
    logits: Float[Tensor, "instances h w"], masks: Float[Tensor, "instances h w"]
) -> Float[Tensor, ""]:
    """Dice loss against true masks, mean over instances: full supervision, the ceiling."""
    if len(logits) == 0:
        return logits.sum()
    found, wanted = torch.sigmoid(logits.float()).flatten(1), masks.float().flatten(1)
    union = found.square().sum(1) + wanted.square().sum(1) + 1e-5
    return (1 - 2 * (found * wanted).sum(1) / union).mean()


def neighbour_stack(
    values: Float[Tensor, "instances h w"], edges: EdgeBits
) -> Float[Tensor, "instances neighbours h w"]:
    """All neighbours of all cells side by side; 0 beyond the image."""
    n, h, w = values.shape
    reach = edges.dilation * (edges.kernel // 2)
    columns = F.unfold(values[:, None], edges.kernel, dilation=edges.dilation, padding=reach)
    columns = columns.reshape(n, edges.kernel**2, h, w)
    middle = edges.kernel**2 // 2
    return torch.cat([columns[:, :middle], columns[:, middle + 1 :]], 1)


def _stacked_sums(
    x: Tensor, edges: EdgeBits, cells: Tensor, image_index: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Sum of the edges' costs and their number, with every neighbour held at once."""
    own = x[:, None]
    other = neighbour_stack(x, edges)
    box = cell_masks(cells, (x.shape[1], x.shape[2]))
    weight = (edges.stack()[image_index] & box[:, None]).to(x.dtype)
    cost = stacked_cost(own, other, rule)
    if rule.outside == "known":
        inside = neighbour_stack(box.to(x.dtype), edges) > 0
        cost = torch.where(inside, cost, F.softplus(own))
    return (cost * weight).sum(), weight.sum()


def stacked_cost(own: Tensor, other: Tensor, rule: Rule) -> Tensor:
    """What an edge from `own` to `other` costs, both logits, by the formulas as they are written down."""
    if rule.form == "asymmetric":
        if rule.up is None:
            return rule.down * _implies(own, other)
        fixed = other.detach()
        return rule.down * _implies(own, fixed) + rule.up * _implies(-own, -fixed)
    both = F.logsigmoid(own) + F.logsigmoid(other)
    neither = F.logsigmoid(-own) + F.logsigmoid(-other)
    if rule.form == "discounted":
        both = both + torch.log(torch.tensor(rule.kappa, dtype=own.dtype))
    return -torch.logaddexp(both, neither)


def _implies(own: Tensor, other: Tensor) -> Tensor:
    """-log(1 - p_own (1 - p_other)): the sum of the three other cases, in logarithms."""
    cases = [F.logsigmoid(a * own) + F.logsigmoid(b * other) for a, b in ((1, 1), (-1, 1), (-1, -1))]
    return -torch.logaddexp(torch.logaddexp(cases[0], cases[1]), cases[2])


def _check(logits: Tensor, edges: EdgeBits, image_index: Tensor) -> None:
    if logits.shape[1:] != edges.bits.shape[1:]:
        raise InputError(
            f"expected the grid of the edges, {tuple(edges.bits.shape[1:])}",
            field="logits",
            value=tuple(logits.shape),
        )
    if logits.device.type == "cpu" and len(image_index):
        low, high = int(image_index.min()), int(image_index.max())
        if low < 0 or high >= len(edges.bits):
            raise InputError(f"expected 0 to {len(edges.bits) - 1}", field="image_index", value=(low, high))
