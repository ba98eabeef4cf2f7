"""What tells masks that learned something from trivial ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from asymaffinity.grid import cell_masks

FULL_IOU, LEAK = 0.9, 0.1


@dataclass(frozen=True)
class MaskHealth:
    """How masks sit in their boxes, over some instances.

    Attributes:
        instances: How many.
        fill: Mean of mask area / box area. Objects of everyday fill about two thirds.
        full: Share of masks whose IoU with the box is above 0.9: the box itself was learned.
        empty: Share of masks without a cell.
        leaking: Share of masks with more than a tenth of their area outside the box.
        trivial: Share of masks that are full, empty or leaking.
    """

    instances: int
    fill: float
    full: float
    empty: float
    leaking: float
    trivial: float

    def scalars(self, prefix: str = "masks/") -> dict[str, float]:
        """Named numbers, as for TensorBoard."""
        return {prefix + name: float(value) for name, value in asdict(self).items() if name != "instances"}


def mask_health(masks: Bool[Tensor, "instances h w"], boxes: Bool[Tensor, "instances h w"]) -> MaskHealth:
    """Look at masks beside their boxes, both on one grid.

    >>> box = torch.zeros(2, 4, 4, dtype=torch.bool)
    >>> box[:, :2] = True
    >>> mask_health(torch.stack([box[0], ~box[0]]), box)
    MaskHealth(instances=2, fill=1.0, full=0.5, empty=0.0, leaking=0.5, trivial=1.0)
    """
    if len(masks) == 0:
        return MaskHealth(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    area, box_area = masks.flatten(1).sum(1).float(), boxes.flatten(1).sum(1).float().clamp(min=1)
    shared = (masks & boxes).flatten(1).sum(1).float()
    full = shared / (area + box_area - shared) > FULL_IOU
    empty = area == 0
    leaking = (area - shared) > LEAK * area.clamp(min=1e-9)
    shares = [(area / box_area).mean(), full.float().mean(), empty.float().mean(), leaking.float().mean()]
    trivial = (full | empty | leaking).float().mean()
    return MaskHealth(len(masks), *(float(share) for share in [*shares, trivial]))


def logits_health(logits: Float[Tensor, "instances h w"], cells: Int[Tensor, "instances 4"]) -> MaskHealth:
    """As `mask_health`, of logits and of boxes in cells."""
    return mask_health(logits.detach() > 0, cell_masks(cells, (logits.shape[1], logits.shape[2])))


def fill_ratio(masks: Bool[Tensor, "instances h w"], boxes: Bool[Tensor, "instances h w"]) -> float:
    """Mean of mask area / box area."""
    return mask_health(masks, boxes).fill


def trivial_rate(masks: Bool[Tensor, "instances h w"], boxes: Bool[Tensor, "instances h w"]) -> float:
    """Share of masks that are the box, nothing, or leak out of the box."""
    return mask_health(masks, boxes).trivial


def mask_iou(
    masks: Bool[Tensor, "instances h w"], truth: Bool[Tensor, "instances h w"]
) -> Float[Tensor, " instances"]:
    """Intersection over union, mask by mask; 1 where both are empty."""
    shared = (masks & truth).flatten(1).sum(1)
    union = (masks | truth).flatten(1).sum(1)
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def given_box_ap(ious: Float[Tensor, " instances"]) -> float:
    """Mean over the thresholds .50 to .95 of the share of masks above them.

    What COCO's average precision becomes where each object's box is given: there is one mask an object and no
    ranking. It is not comparable with the AP of detections.
    """
    thresholds = torch.arange(0.5, 0.96, 0.05, device=ious.device)
    return float((ious[:, None] >= thresholds).float().mean()) if len(ious) else 0.0
