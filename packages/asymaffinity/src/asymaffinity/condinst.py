"""A CondInst head on torchvision's FCOS: masks by small networks that each instance brings with it.

Tian, Shen, Chen: "Conditional Convolutions for Instance Segmentation", ECCV 2020, arXiv 2003.05664. It is the
model of BoxInst. Each location of FCOS that finds an object also gives the weights of three 1x1
convolutions; they run over features shared by the image, beside coordinates relative to the location.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from asymaffinity.batches import BoxSupTransform
from asymaffinity.grid import box_cells
from asymaffinity.losses import BoxSupLoss
from asymaffinity.metrics import MaskHealth, logits_health
from shared_core import InputError

STRIDE = 8
"""Of the mask features; masks are twice as fine."""
INTEREST = 8
"""Size of interest of a location, in strides of its level: 64 pixels on the finest, 1,024 on the coarsest."""


class DynamicMasks(nn.Module):
    """Masks of instances from shared features and generated weights.

    Args:
        channels: Of the shared features.
        width: Of the generated layers.
        layers: Generated layers, at least 2; the last one gives the logit.

    >>> DynamicMasks(16, 8, 3).parameter_count
    233
    """

    def __init__(self, channels: int = 16, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        if layers < 2:
            raise InputError("expected at least 2", field="layers", value=layers)
        self.channels, self.width, self.layers = channels, width, layers
        inputs = [channels + 2, *[width] * (layers - 1)]
        outputs = [*[width] * (layers - 1), 1]
        self.shapes = list(zip(outputs, inputs, strict=True))
        self.parameter_count = sum(o * i + o for o, i in self.shapes)

    def forward(
        self,
        features: Float[Tensor, "images channels h w"],
        weights: Float[Tensor, "instances parameters"],
        centres: Float[Tensor, "instances 2"],
        sizes: Float[Tensor, " instances"],
        image_index: Int[Tensor, " instances"],
        stride: int = STRIDE,
    ) -> Float[Tensor, "instances h w"]:
        """Logits of each instance on the grid of the features.

        Args:
            features: Shared.
            weights: All layers' weights, then all layers' biases, of each instance.
            centres: Location x, y in pixels.
            sizes: Pixels that are a relative coordinate of 1.
            image_index: Whose features an instance takes.
            stride: Pixels a cell of the features.
        """
        n, (h, w) = len(weights), features.shape[2:]
        matrices, biases = self._split(weights)
        x = (torch.arange(w, device=features.device) + 0.5) * stride
        y = (torch.arange(h, device=features.device) + 0.5) * stride
        away_x = (centres[:, 0, None] - x) / sizes[:, None]  # [n, w]
        away_y = (centres[:, 1, None] - y) / sizes[:, None]  # [n, h]
        first, bias = matrices[0], biases[0]
        # The first layer is linear in features and coordinates: neither is repeated for each instance.
        by_x = first[:, :, -2, None] * away_x[:, None]  # [n, width, w]
        by_y = first[:, :, -1, None] * away_y[:, None] + bias[:, :, None]  # [n, width, h]
        shared = self._of_features(first[:, :, :-2], features.flatten(2), image_index)
        hidden = shared.view(n, self.width, h, w) + by_x[:, :, None] + by_y[..., None]
        hidden = F.relu(hidden).flatten(2)
        for matrix, offset in zip(matrices[1:-1], biases[1:-1], strict=True):
            hidden = F.relu(torch.baddbmm(offset[:, :, None], matrix, hidden))
        return torch.baddbmm(biases[-1][:, :, None], matrices[-1], hidden).view(n, h, w)

    def _of_features(self, matrices: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
        """Each instance's matrix times the features of its image, one product an image."""
        order, parts = [], []
        for n, own in enumerate(features):
            members = torch.where(image_index == n)[0]
            order.append(members)
            parts.append((matrices[members].flatten(0, 1) @ own).view(len(members), self.width, own.shape[1]))
        return torch.cat(parts)[torch.argsort(torch.cat(order))]

    def _split(self, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        counts = [o * i for o, i in self.shapes] + [o for o, _ in self.shapes]
        parts = weights.split(counts, 1)
        count = len(self.shapes)
        matrices = [part.view(-1, *shape) for part, shape in zip(parts[:count], self.shapes, strict=True)]
        return matrices, list(parts[count:])


class MaskBranch(nn.Module):
    """Shared mask features at the finest level of a pyramid (CondInst, section 3.3)."""

    def __init__(
        self, inputs: int, width: int = 128, channels: int = 16, levels: int = 3, convs: int = 4
    ) -> None:
        super().__init__()
        self.refine = nn.ModuleList(_conv(inputs, width) for _ in range(levels))
        self.tower = nn.Sequential(
            *(_conv(width, width) for _ in range(convs)), nn.Conv2d(width, channels, 1)
        )

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Features of the finest of the levels given."""
        whole = self.refine[0](pyramid[0])
        for refine, level in zip(list(self.refine)[1:], pyramid[1:], strict=False):
            whole = whole + F.interpolate(
                refine(level), whole.shape[2:], mode="bilinear", align_corners=False
            )
        return self.tower(whole)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    groups = 32 if outputs % 32 == 0 else 1
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(groups, outputs), nn.ReLU()
    )


class CondInstHead(FCOSHead):
    """FCOS's head that also generates each location's mask weights, from the features of its box."""

    def __init__(self, inputs: int, num_classes: int, parameters: int, num_convs: int = 4) -> None:
        super().__init__(inputs, 1, num_classes, num_convs)
        self.controller = nn.Conv2d(inputs, parameters, 3, padding=1)
        nn.init.normal_(self.controller.weight, std=0.01)
        nn.init.zeros_(self.controller.bias)  # type: ignore[arg-type] it has one

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """As torchvision's, with ``controller`` [images, locations, parameters]."""
        boxes = self.regression_head
        found: dict[str, list[Tensor]] = {"bbox_regression": [], "bbox_ctrness": [], "controller": []}
        for level in x:
            tower = boxes.conv(level)
            found["bbox_regression"].append(F.relu(boxes.bbox_reg(tower)))
            found["bbox_ctrness"].append(boxes.bbox_ctrness(tower))
            found["controller"].append(self.controller(tower))
        flat = {
            name: torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1) for name, maps in found.items()
        }
        return {"cls_logits": self.classification_head(x), **flat}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """FCOS's losses. The matches are handed on to the mask losses under ``matched``."""
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {**losses, "matched": torch.stack(matched_idxs)}


class CondInst(FCOS):
    """FCOS with masks, trained from boxes.

    Used as every detector of torchvision: in training a call with images and targets gives losses, else one
    with images gives ``boxes``, ``labels``, ``scores`` and ``masks`` (probabilities [n, 1, H, W]). A target
    needs ``boxes`` and ``labels``, and ``depth`` [H, W] where the loss has a depth term. ``masks`` [N, H, W]
    are used where the loss has mixed supervision, and one without a pixel is not known.

    Args:
        backbone: Gives an OrderedDict of pyramid levels from stride 8 on, and has `out_channels`.
        num_classes: With the background, which is class 0.
        criterion: The loss.
        channels: Of the shared mask features.
        width: Of the generated layers.
        branch_width: Of the mask branch.
        max_instances: Locations an image whose masks are trained; the surest of each object.
        num_convs: Of each tower of the head.
        bottom: Last rows of each image that are no edge's neighbour; BoxInst has 10 for COCO.
        options: As of torchvision's FCOS, such as `min_size`, `max_size`, `score_thresh`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        criterion: BoxSupLoss,
        *,
        channels: int = 16,
        width: int = 8,
        branch_width: int = 128,
        max_instances: int = 64,
        num_convs: int = 4,
        bottom: int = 0,
        **options: Any,
    ) -> None:
        inputs: int = backbone.out_channels  # type: ignore[assignment]
        masks = DynamicMasks(channels, width)
        head = CondInstHead(inputs, num_classes, masks.parameter_count, num_convs)
        super().__init__(backbone, num_classes, head=head, **options)
        if criterion.stride * 2 != STRIDE:
            raise InputError(f"expected {STRIDE // 2}", field="stride", value=criterion.stride)
        self.transform = BoxSupTransform.like(self.transform, criterion, bottom)
        self.criterion, self.masks = criterion, masks
        self.mask_branch = MaskBranch(inputs, branch_width, channels)
        self.max_instances = max_instances
        self.health = MaskHealth(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        """Of the last batch in training."""

    def forward(  # type: ignore[override] torchvision's own annotation is of TorchScript
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training, detections otherwise."""
        if self.training:
            _check_targets(targets)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch, moved = self.transform(images, targets)
        pyramid = self.backbone(batch.tensors)
        levels = list((OrderedDict([("0", pyramid)]) if isinstance(pyramid, Tensor) else pyramid).values())
        found = self.head(levels)
        features = self.mask_branch(levels[: len(self.mask_branch.refine)])
        anchors = self.anchor_generator(batch, levels)
        if self.training:
            counts = [level.shape[2] * level.shape[3] for level in levels]
            losses = self.compute_loss(moved, found, anchors, counts)
            matched = losses.pop("matched")
            return losses | self._mask_losses(features, found, anchors, matched, moved)
        result = [
            self._detect(features[n : n + 1], {k: v[n] for k, v in found.items()}, anchors[n], size)
            for n, size in enumerate(batch.image_sizes)
        ]
        return self.transform.postprocess(result, batch.image_sizes, sizes)

    def _mask_losses(
        self,
        features: Tensor,
        found: dict[str, Tensor],
        anchors: list[Tensor],
        matched: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        chosen = [self._surest(found, n, matched[n], target) for n, target in enumerate(targets)]
        index = torch.cat([torch.full_like(places, n) for n, places in enumerate(chosen)])
        places = torch.cat(chosen)
        boxes = torch.cat(
            [
                target["boxes"][matched[n, own]] if len(own) else features.new_zeros(0, 4)
                for n, (target, own) in enumerate(zip(targets, chosen, strict=True))
            ]
        )
        logits = self._logits(
            features, found["controller"][index, places], torch.stack(anchors)[index, places], index
        )
        cells, _ = box_cells(boxes, (logits.shape[1], logits.shape[2]), self.criterion.stride)
        self.health = logits_health(logits, cells)
        masks = self.transform.masks
        if masks is not None:
            masks = torch.cat(
                [own[matched[n, at]] for n, (own, at) in enumerate(zip(masks, chosen, strict=True))]
            )
        losses = self.criterion(logits, boxes, index, self.transform.edges, masks=masks)
        if not len(places):  # every parameter takes part, as several processes ask for
            losses["loss_prj"] = losses["loss_prj"] + 0 * (features.sum() + found["controller"].sum())
        return losses

    def _surest(
        self, found: dict[str, Tensor], image: int, matched: Tensor, target: dict[str, Tensor]
    ) -> Tensor:
        """Positive locations of an image: of each object those of the highest score, as BoxInst chooses."""
        positive = torch.where(matched >= 0)[0]
        if len(positive) <= self.max_instances:
            return positive
        objects = matched[positive]
        with torch.no_grad():
            label = target["labels"][objects]
            score = found["cls_logits"][image, positive, label].sigmoid()
            score = score * found["bbox_ctrness"][image, positive, 0].sigmoid()
        each = max(1, self.max_instances // int(objects.unique().numel()))
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(objects[order], stable=True)]
        sorted_objects = objects[order]
        starts = torch.searchsorted(sorted_objects, sorted_objects)
        rank = torch.arange(len(order), device=order.device) - starts
        return positive[order[rank < each]][: self.max_instances]

    def _logits(self, features: Tensor, weights: Tensor, anchors: Tensor, index: Tensor) -> Tensor:
        """Masks on the grid of stride 4."""
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        sizes = INTEREST * (anchors[:, 2] - anchors[:, 0])
        coarse = self.masks(features, weights, centres, sizes, index)
        fine = F.interpolate(coarse[:, None], scale_factor=2, mode="bilinear", align_corners=False)
        return fine[:, 0]

    def _detect(
        self, features: Tensor, found: dict[str, Tensor], anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Detections of an image with their masks' logits, on the grid of the padded image."""
        scores = (found["cls_logits"].sigmoid() * found["bbox_ctrness"].sigmoid()).sqrt()
        places, labels = torch.where(scores > self.score_thresh)
        values = scores[places, labels]
        if len(values) > self.topk_candidates:
            values, best = values.topk(self.topk_candidates)
            places, labels = places[best], labels[best]
        boxes = self.box_coder.decode(found["bbox_regression"][places], anchors[places])
        boxes = clip_boxes_to_image(boxes, size)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, values, labels, places = boxes[solid], values[solid], labels[solid], places[solid]
        keep = batched_nms(boxes, values, labels, self.nms_thresh)[: self.detections_per_img]
        places = places[keep]
        logits = self._logits(
            features, found["controller"][places], anchors[places], torch.zeros_like(places)
        )
        return {
            "boxes": boxes[keep],
            "scores": values[keep],
            "labels": labels[keep],
            "mask_logits": logits,
        }


def _check_targets(targets: list[dict[str, Tensor]] | None) -> None:
    if targets is None:
        raise InputError("expected targets in training", field="targets")
    for n, target in enumerate(targets):
        for name in ("boxes", "labels"):
            if name not in target:
                raise InputError("is missing", field=f"targets[{n}].{name}")
        boxes = target["boxes"]
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError("expected [N, 4]", field=f"targets[{n}].boxes", value=tuple(boxes.shape))
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if bool(flat.any()):
            raise InputError(
                "expected x0 < x1 and y0 < y1", field=f"targets[{n}].boxes", value=boxes[flat][0].tolist()
            )
