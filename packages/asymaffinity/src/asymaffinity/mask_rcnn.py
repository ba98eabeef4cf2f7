"""torchvision's Mask R-CNN, trained from boxes: any backbone, its own heads, another mask loss.

    model = boxsup_maskrcnn(torchvision.models.detection.maskrcnn_resnet50_fpn(...), BoxSupLoss())

is the same model afterwards: the same weights, the same predictions' format, the same training loop, without
masks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import roi_align

from asymaffinity.affinity import DepthGradAffinity
from asymaffinity.batches import BoxSupTransform
from asymaffinity.edges import EdgeBits, alike
from asymaffinity.functional import affinity_loss, projection_loss
from asymaffinity.grid import box_cells
from asymaffinity.lean import LIMIT
from asymaffinity.losses import Affinity, BoxSupLoss
from asymaffinity.metrics import MaskHealth, logits_health
from shared_core import InputError


def boxsup_maskrcnn(
    model: GeneralizedRCNN, criterion: BoxSupLoss, *, enlarge: float = 0.15, bottom: int = 0
) -> GeneralizedRCNN:
    """Make a Mask R-CNN of torchvision learn its masks from boxes.

    Args:
        model: Changed in place; its weights and their names stay, the criterion's counter comes beside them.
        criterion: The loss. A target needs ``boxes`` and ``labels``, and ``depth`` [H, W] where the loss has
            a depth term; ``masks`` are left out if they are there, unless its supervision is mixed.
        enlarge: How much wider than its box a region of the mask branch is, in training and after. Without it
            no cell of a region lies outside the box, and the asymmetric loss has no border.
        bottom: Last rows of each image that are no edge's neighbour.

    Returns:
        The same model. Its losses have ``loss_prj`` and ``loss_aff_*`` in place of ``loss_mask``.

    Raises:
        InputError: It is no Mask R-CNN of torchvision.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RoIHeads) or not heads.has_mask():
        raise InputError("expected a torchvision MaskRCNN", field="model", value=type(model).__name__)
    if enlarge < 0:
        raise InputError("expected at least 0", field="enlarge", value=enlarge)
    model.transform = BoxSupTransform.like(model.transform, criterion, bottom)  # type: ignore[arg-type]
    model.roi_heads = BoxSupRoIHeads(heads, criterion, model.transform, enlarge)
    return model


class BoxSupRoIHeads(RoIHeads):
    """torchvision's heads with the box-supervised mask loss, on the grid of the image.

    Each region's logits are pasted into the grid, differentiably; beyond the region the mask is nothing.
    """

    def __init__(
        self, heads: RoIHeads, criterion: BoxSupLoss, transform: BoxSupTransform, enlarge: float
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(
            {k: v for k, v in vars(heads).items() if k not in ("_modules", "_parameters", "_buffers")}
        )
        for name, module in heads.named_children():
            self.add_module(name, module)
        self.criterion, self.enlarge = criterion, enlarge
        object.__setattr__(self, "transform", transform)
        self._samples: Any = None
        self._own_masks = False
        self.health = MaskHealth(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        """Of the last batch in training."""

    def has_mask(self) -> bool:
        """False while the parent runs: it would ask for masks in training, and paste into boxes after."""
        return False if self._own_masks else super().has_mask()

    def select_training_samples(self, proposals: list[Tensor], targets: Any) -> Any:
        """As the parent, and remembered."""
        found = super().select_training_samples(proposals, targets)
        self._samples = found[:3]
        return found

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes by the parent, then masks."""
        self._own_masks = True
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            self._own_masks = False
        if not self.training:
            self._predict(features, result, image_shapes)
            return result, losses
        assert targets is not None
        proposals, matched, labels = self._samples
        self._samples = None
        regions, boxes, classes, owners, truths = [], [], [], [], []
        transform: BoxSupTransform = self.transform  # type: ignore[assignment] set past Module
        true_masks = transform.masks
        for n, (region, match, label) in enumerate(zip(proposals, matched, labels, strict=True)):
            chosen = torch.where(label > 0)[0]
            regions.append(enlarged(region[chosen], self.enlarge, image_shapes[n]))
            boxes.append(targets[n]["boxes"][match[chosen]] if len(chosen) else region.new_zeros(0, 4))
            classes.append(label[chosen])
            owners.append(torch.full_like(chosen, n))
            if true_masks is not None:
                own = true_masks[n]
                truths.append(own[match[chosen]] if len(chosen) else own[:0])
        logits = self._logits(features, regions, image_shapes, torch.cat(classes))
        masks = torch.cat(truths) if truths else None
        return result, losses | self._losses(
            logits, torch.cat(regions), torch.cat(boxes), torch.cat(owners), masks
        )

    def _logits(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        image_shapes: list[tuple[int, int]],
        classes: Tensor,
    ) -> Tensor:
        pooled = self.mask_roi_pool(features, regions, image_shapes)  # type: ignore[misc] has_mask() is True
        found = self.mask_predictor(self.mask_head(pooled))  # type: ignore[misc]
        return found[torch.arange(len(found), device=found.device), classes]

    def _losses(
        self, logits: Tensor, regions: Tensor, boxes: Tensor, owners: Tensor, masks: Tensor | None
    ) -> dict[str, Tensor]:
        transform: BoxSupTransform = self.transform  # type: ignore[assignment] set past Module
        edges, grid = transform.edges, transform.grid
        whole = paste(logits, regions, grid, self.criterion.stride)
        cells, _ = box_cells(boxes, grid, self.criterion.stride)
        self.health = logits_health(whole, cells)
        return self.criterion(whole, boxes, owners, edges, masks=masks)

    def _predict(
        self,
        features: dict[str, Tensor],
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> None:
        regions = [
            enlarged(found["boxes"], self.enlarge, size)
            for found, size in zip(result, image_shapes, strict=True)
        ]
        pooled = self.mask_roi_pool(features, regions, image_shapes)  # type: ignore[misc]
        logits = self.mask_predictor(self.mask_head(pooled))  # type: ignore[misc]
        masks = maskrcnn_inference(logits, [found["labels"] for found in result])
        for found, region, mask in zip(result, regions, masks, strict=True):
            found["masks"], found["mask_boxes"] = mask, region


def enlarged(boxes: Float[Tensor, "n 4"], share: float, size: tuple[int, int]) -> Float[Tensor, "n 4"]:
    """Boxes wider and higher by a share, cut at the image.

    >>> enlarged(torch.tensor([[10.0, 10, 20, 30]]), 0.2, (31, 100)).tolist()
    [[9.0, 8.0, 21.0, 31.0]]
    """
    margin = (boxes[:, 2:] - boxes[:, :2]) * (share / 2)
    limit = boxes.new_tensor([size[1], size[0]])
    return torch.cat([(boxes[:, :2] - margin).clamp(min=0), (boxes[:, 2:] + margin).minimum(limit)], 1)


def paste(
    logits: Float[Tensor, "instances side side2"],
    regions: Float[Tensor, "instances 4"],
    grid: tuple[int, int],
    stride: int = 4,
    beyond: float = -LIMIT,
) -> Float[Tensor, "instances h w"]:
    """Logits of regions as logits on the grid of the image: bilinear inside, `beyond` outside.

    Bilinear interpolation is separable: two small matrix products for each region.
    """
    offset = stride // 2 + (0.5 if stride % 2 else 0.0)
    parts = []
    inside = []
    for axis, cells in ((1, grid[0]), (0, grid[1])):
        place = torch.arange(cells, device=logits.device, dtype=torch.float32) * stride + offset
        low, high = regions[:, axis, None].float(), regions[:, axis + 2, None].float()
        side = logits.shape[1] if axis == 1 else logits.shape[2]
        at = (place - low) / (high - low).clamp(min=1e-3)
        inside.append((at >= 0) & (at <= 1))
        bin_ = (at * side - 0.5).clamp(0, side - 1)[:, :, None]
        parts.append((1 - (bin_ - torch.arange(side, device=logits.device)).abs()).clamp(min=0))
    with torch.autocast(logits.device.type, enabled=False):
        made = parts[0] @ logits.float() @ parts[1].transpose(1, 2)
    return torch.where(inside[0][:, :, None] & inside[1][:, None, :], made, beyond)


def region_losses(
    criterion: BoxSupLoss,
    logits: Float[Tensor, "instances side side2"],
    regions: Float[Tensor, "instances 4"],
    boxes: Float[Tensor, "instances 4"],
    image_index: Int[Tensor, " instances"],
    features: dict[str, Float[Tensor, "images channels h w"]],
    step: int,
    valid: dict[str, Bool[Tensor, "images h w"]] | None = None,
) -> dict[str, Tensor]:
    """The losses on each region's own grid, for heads whose masks never see the image's.

    Colours or gradients are pooled into the region by RoIAlign and edges made there, so an edge is longer in
    a large box than in a small one. Prefer the grid of the image where you can.

    Args:
        criterion: Whose affinities, weights and rule.
        logits: Masks in their regions.
        regions: x0, y0, x1, y1 in pixels, larger than the boxes.
        boxes: x0, y0, x1, y1 in pixels.
        image_index: To which image each region belongs.
        features: Of each affinity, on the grid of the image: `ColorAffinity.features`,
            `DepthGradAffinity.features`.
        step: Of the warm-up.
        valid: Cells of the features that are known, for affinities where not all are.
    """
    if len(logits) == 0:
        return {name: logits.sum() for name in ("loss_prj", *(f"loss_aff_{n}" for n in features))}
    rows, columns = logits.shape[1:]
    size = (regions[:, 2:] - regions[:, :2]).clamp(min=1e-3)
    scale = torch.tensor([columns, rows], device=logits.device) / size
    inner = (boxes - regions[:, :2].repeat(1, 2)) * scale.repeat(1, 2)
    low = inner[:, :2].round().long().clamp(min=0)
    limit = torch.tensor([columns, rows], device=logits.device)
    low = torch.minimum(low, limit - 1)
    high = torch.minimum(torch.maximum(inner[:, 2:].round().long(), low + 1), limit)
    cells = torch.cat([low, high], 1)
    places = torch.cat([image_index[:, None].to(regions.dtype), regions], 1)
    losses = {"loss_prj": projection_loss(logits, cells)}
    own = torch.arange(len(logits), device=logits.device)
    for name, weight in criterion.weights().items():
        affinity, _ = criterion.affinities[name]
        pooled = roi_align(
            features[name].to(places.dtype), places, (rows, columns), 1 / criterion.stride, aligned=True
        )
        known = None
        if valid is not None and name in valid:
            share = roi_align(
                valid[name][:, None].to(places.dtype),
                places,
                (rows, columns),
                1 / criterion.stride,
                aligned=True,
            )
            known = share[:, 0] > 0.999  # a mean that takes in an unknown cell is unknown
        edges = _alike(affinity, pooled, known)
        value = affinity_loss(logits, edges, cells, own, criterion.rule, lean=criterion.lean)
        losses[f"loss_aff_{name}"] = value * (weight * criterion.warmth(step))
    return losses


def _alike(affinity: Affinity, features: Tensor, valid: Tensor | None) -> EdgeBits:
    both = isinstance(affinity, DepthGradAffinity)
    return alike(
        features,
        affinity.theta,
        affinity.thresh,
        valid,
        both=both,
        kernel=affinity.kernel,
        dilation=affinity.dilation,
    )
