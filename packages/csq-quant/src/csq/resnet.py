"""CIFAR's residual networks, He et al. 2016, section 4.2, with torch alone."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shared_core import InputError


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Literal["conv", "pad"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.stride, self.added = stride, outputs - inputs
        self.downsample = None
        if shortcut == "conv" and (stride != 1 or self.added):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride == 1 and not self.added:
            return x
        half = self.added // 2  # option A of the paper: every other pixel, new channels are zero
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))


class CifarResNet(nn.Module):
    """A stem, three stages of residual blocks at widths w, 2w, 4w, average pooling and a classifier.

    Args:
        depth: 6 n + 2, for n blocks a stage: 8, 14, 20, 32, ...
        num_classes: Number of outputs.
        in_channels: Channels of the images, 3 for colour and 1 for grey.
        width: Channels of the first stage; the paper's is 16.
        shortcut: Where shapes change, "pad" (option A, without parameters, the paper's on CIFAR) or "conv"
            (option B, a 1x1 convolution with BatchNorm, as CSQ's and BSQ's code have it).

    Raises:
        InputError: The depth is none of these, or a size is below 1.

    >>> sum(p.numel() for p in CifarResNet(20, shortcut="pad").parameters())
    269722
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        shortcut: Literal["conv", "pad"] = "conv",
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise InputError("expected 6 n + 2: 8, 14, 20, 26, 32, ...", field="depth", value=depth)
        for field, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise InputError("expected at least 1", field=field, value=value)
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        channels, stages = width, []
        for stage in range(3):
            outputs, layers = width << stage, []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(_Block(channels, outputs, stride, shortcut))
                channels = outputs
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the class scores of images of any size from 4 x 4 on."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet8(num_classes: int = 10, in_channels: int = 3, width: int = 8) -> CifarResNet:
    """ResNet-8 of widths 8, 16, 32 with convolutions as shortcuts: 10 layers with weights."""
    return CifarResNet(8, num_classes, in_channels, width)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 with convolutions as shortcuts, 0.27 million parameters, 22 layers with weights."""
    return CifarResNet(20, num_classes, in_channels, width)
