"""The proof's small backbone: four convolutions to a map of a quarter of the image's side.

``--backbone kdcicam.proof_net:non_local`` takes it from the command line.
"""

from __future__ import annotations

from torch import nn

from kdcicam.backbones import LEAK, NonLocalBlock

WIDTHS = (24, 48, 64, 64)
STRIDES = (2, 2, 1, 1)


def _layer(channels: int, width: int, stride: int) -> list[nn.Module]:
    kernel = 5 if channels == 3 else 3
    return [
        nn.Conv2d(channels, width, kernel, stride, kernel // 2),
        nn.LeakyReLU(LEAK),
    ]


def plain() -> nn.Sequential:
    """The convolutions alone: CAM's."""
    channels, layers = 3, list[nn.Module]()
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        layers += _layer(channels, width, stride)
        channels = width
    return nn.Sequential(*layers)


def non_local() -> nn.Sequential:
    """The convolutions and a non-local block, which is the identity at the start."""
    return plain().append(NonLocalBlock(WIDTHS[-1]))
