"""Detectors, images and targets that are small enough for a test."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity
from asymaffinity.functional import Rule
from asymaffinity.losses import BoxSupLoss
from asymaffinity.models import SmallPyramid, build_detector


def criterion(depth: bool = True, rule: Rule | None = None, warmup: int = 0) -> BoxSupLoss:
    affinities = {"color": (ColorAffinity(), 0.5)}
    if depth:
        affinities["depthgrad"] = (DepthGradAffinity(), 0.5)
    return BoxSupLoss(affinities, rule, warmup=warmup)


def detector(head: str, depth: bool = True, size: int = 64, seed: int = 0, warmup: int = 0, **options):
    torch.manual_seed(seed)
    if head == "condinst":
        backbone = SmallPyramid(64, 8, 5)
        options = {"num_convs": 1, "branch_width": 32, **options}
    else:
        backbone = SmallPyramid(32, 4, 4)
        options = {
            "box_head": TwoMLPHead(32 * 7**2, 64),
            "box_predictor": FastRCNNPredictor(64, 3),
            "mask_head": MaskRCNNHeads(32, (32,), 1),
            "mask_predictor": MaskRCNNPredictor(32, 32, 3),
            "box_batch_size_per_image": 32,
            "rpn_post_nms_top_n_train": 50,
            "rpn_post_nms_top_n_test": 50,
            **options,
        }
    return build_detector(
        head,
        backbone,
        None if head == "maskrcnn" else 3,
        criterion(depth, warmup=warmup),
        min_size=size,
        max_size=2 * size,
        **options,
    )


def scene(seed: int = 0, size: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with a bright square and a dark disc, their boxes, and a depth map with both upright."""
    draw = torch.Generator().manual_seed(seed)
    image = 0.5 + 0.03 * torch.randn(3, size, size, generator=draw)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    depth = 0.05 * y
    at = (torch.rand(2, generator=draw) * size / 4).tolist()
    square = (x > 6 + at[0]) & (x < 26 + at[0]) & (y > 10) & (y < 40)
    disc = (x - 46).square() + (y - 30 - at[1]).square() < 13**2
    masks = torch.stack([square & ~disc, disc])
    image[:, masks[0]] += torch.tensor([0.4, 0.1, -0.3])[:, None]
    image[:, masks[1]] -= 0.4
    depth = torch.where(masks.any(0), 1.5, depth)
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor([1, 2]),
        "depth": depth,
        "true_masks": masks,
    }
    return image.clamp(0, 1), target
