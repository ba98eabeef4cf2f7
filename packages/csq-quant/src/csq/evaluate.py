"""Accuracy of classifiers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csq.data import ImageData, Split
from shared_core import InputError


@torch.no_grad()
def class_scores(
    model: nn.Module, data: ImageData, split: Split, batch_size: int = 500
) -> Float[Tensor, "n classes"]:
    """Return the scores of all images of a split, in evaluation mode; the model's mode is kept."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    scores = [
        model(data.inputs(split.read(part).to(device))).cpu()
        for part in torch.arange(len(split.labels)).split(batch_size)
    ]
    for module in training:
        module.training = True
    return torch.cat(scores)


def top1(model: nn.Module, data: ImageData, split: Split) -> float:
    """Return the share of images whose highest score is at the right class.

    Raises:
        InputError: The model's scores are not finite.
    """
    scores = class_scores(model, data, split)
    if not bool(scores.isfinite().all()):
        raise InputError("the model's scores are not finite", field="model")
    return float((scores.argmax(1) == split.labels.cpu()).double().mean())


def soft_hard_gap(soft: nn.Module, hard: nn.Module, data: ImageData, split: Split) -> float:
    """Return the accuracy of the trained model less that of the hardened one: what hardening cost."""
    return top1(soft, data, split) - top1(hard, data, split)
