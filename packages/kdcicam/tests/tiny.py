"""A tiny backbone, tiny models and tiny images, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcicam.model import CICAM


def backbone(channels: int = 8, stride: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 5, stride, 2), nn.LeakyReLU(0.2), nn.Conv2d(channels, channels, 3, 1, 1)
    )


def model(num_classes: int = 5, seed: int = 0, size: int = 24, **options) -> CICAM:
    torch.manual_seed(seed)
    made = CICAM(backbone(), num_classes, image_size=size, **options)
    nn.init.normal_(made.context_conv.bias)  # else too small to see in any test
    nn.init.normal_(made.classifier.weight)  # else all images have the same class
    return made


def with_pool(made: CICAM, seed: int = 7) -> CICAM:
    made.pool.copy_(torch.randn(made.pool.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def images(count: int = 6, size: int = 24, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = 3 * torch.randn(count, 3, 1, 1, generator=generator)  # else all images have the same class
    return colours + torch.randn(count, 3, size, size, generator=generator)
