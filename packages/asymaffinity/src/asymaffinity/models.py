"""Detectors by name: which head on which backbone. What the command builds; users may bring their own."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from asymaffinity.condinst import CondInst
from asymaffinity.losses import BoxSupLoss
from asymaffinity.mask_rcnn import boxsup_maskrcnn
from shared_core import InputError, named

HEADS = ("condinst", "maskrcnn")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")


class SmallPyramid(nn.Module):
    """A small convolutional pyramid with group normalization, for small images and laptops.

    Args:
        channels: Of every level; a multiple of 32.
        first: Stride of the finest level, 4 or 8.
        levels: How many levels, each half as fine as the one before.
    """

    def __init__(self, channels: int = 64, first: int = 8, levels: int = 5) -> None:
        super().__init__()
        widths = [channels // 2, *[channels] * (levels + (first == 8))]
        inputs = [3, *widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.GroupNorm(min(32, o) // 2, o), nn.ReLU())
            for i, o in zip(inputs, widths, strict=True)
        )
        self.skip = len(self.stages) - levels
        self.pyramid = FeaturePyramidNetwork([channels] * levels, channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Levels ``"0"``, ``"1"``, ... from the finest."""
        found: OrderedDict[str, Tensor] = OrderedDict()
        for n, stage in enumerate(self.stages):
            x = stage(x)
            if n >= self.skip:
                found[str(n - self.skip)] = x
        return self.pyramid(found)


def build_backbone(name: str, head: str, norm: str = "frozen", trainable_layers: int = 3) -> nn.Module:
    """A pyramid of features by name.

    Args:
        name: ``small``, a ResNet of torchvision, or ``module:callable`` of yours that gives a module with
            `out_channels`; its levels begin at stride 8 for condinst, 4 for maskrcnn.
        head: For which head.
        norm: ``frozen`` batch normalization for pretrained weights, ``batch`` for training from scratch.
        trainable_layers: Of a ResNet, counted from its end.

    Raises:
        InputError: The name is unknown.
    """
    if name == "small":
        return SmallPyramid(first=8 if head == "condinst" else 4, levels=5 if head == "condinst" else 4)
    if ":" in name:
        made = named.made(name, "backbone")
        if not isinstance(made, nn.Module) or not hasattr(made, "out_channels"):
            raise InputError("expected a module with out_channels", field="backbone", value=name)
        return made
    if name not in RESNETS:
        raise InputError(
            f"expected small, {', '.join(RESNETS)} or module:callable", field="backbone", value=name
        )
    layer: Any = nn.BatchNorm2d if norm == "batch" else resnet.nn.BatchNorm2d
    if norm == "frozen":
        from torchvision.ops.misc import FrozenBatchNorm2d

        layer = FrozenBatchNorm2d
    fine = head == "maskrcnn"
    return resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=layer,
        trainable_layers=trainable_layers,
        returned_layers=[1, 2, 3, 4] if fine else [2, 3, 4],
        extra_blocks=LastLevelMaxPool() if fine else LastLevelP6P7(256, 256),
    )


def build_detector(
    head: str,
    backbone: nn.Module,
    num_classes: int | None,
    criterion: BoxSupLoss,
    *,
    bottom: int = 0,
    **options: Any,
) -> nn.Module:
    """A detector that learns masks from boxes.

    Args:
        head: ``condinst`` or ``maskrcnn``.
        backbone: Its features.
        num_classes: With the background; None where `options` bring a Mask R-CNN's predictors.
        criterion: The loss.
        bottom: Last rows of each image that are no edge's neighbour.
        options: `min_size`, `max_size` and others of torchvision's detectors.
    """
    if head == "condinst" and num_classes is not None:
        options["score_thresh"] = options.pop("box_score_thresh", 0.05)
        return CondInst(backbone, num_classes, criterion, bottom=bottom, **options)
    if head != "maskrcnn":
        raise InputError(f"expected one of {', '.join(HEADS)}", field="head", value=head)
    small = isinstance(backbone, SmallPyramid)
    if small:
        sizes = tuple((16 * 2**n,) for n in range(4))
        levels = ["0", "1", "2", "3"]
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4),
            "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
            "mask_roi_pool": MultiScaleRoIAlign(levels, 14, 2),
            **options,
        }
    model = MaskRCNN(backbone, num_classes, **options)
    return boxsup_maskrcnn(model, criterion, bottom=bottom)


def load_backbone(backbone: nn.Module, state: dict[str, Tensor], file: str) -> int:
    """Put weights of an image classifier of torchvision (or of a backbone saved here) into a backbone.

    Returns:
        How many tensors fitted.

    Raises:
        InputError: None fits, or most do not.
    """
    body = getattr(backbone, "body", backbone)
    own = body.state_dict()
    fits = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if len(fits) < 0.9 * len([key for key in own if not key.endswith("num_batches_tracked")]):
        raise InputError(
            f"expected weights of this backbone; {len(fits)} of {len(own)} tensors fit", file=file
        )
    with torch.no_grad():
        body.load_state_dict({**own, **fits})
    return len(fits)
