"""Tiny models for the tests, and a training loop as a user writes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as users get it, without the tests' hook, which would speak up before our own errors."""
    return inspect.unwrap(function)


def small_net() -> nn.Sequential:
    """A convolution, BatchNorm and a classifier for images `(batch, 3, 8, 8)`."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (count,), generator=generator)


def optimizer_for(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(csq.param_groups(model, 5e-4), lr=lr, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: csq.Schedule, steps: int) -> None:
    x, y = images()
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y) + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def randomize_masks(model: nn.Module, n_bits: int, seed: int = 0) -> None:
    """Random schemes with at least one plane, as a search may leave them."""
    generator = torch.Generator().manual_seed(seed)
    for planes in csq.bit_layers(model).values():
        with torch.no_grad():
            planes.mask.copy_(torch.randn(n_bits, generator=generator))
            planes.mask[-1] = 1.0
