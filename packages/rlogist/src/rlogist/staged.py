"""Hyperparameters of training before any reinforcement: stages A, B and B2.

A: classifier and f_local on all regions at depth (`full_observation`). B: f_global learns to foresee V from
random looks (`foreseeing`). B2: the classifier is fine-tuned on partly observed states beside full ones,
since before it never met mixed ones (`mixed_states`).
"""

import math
from dataclasses import dataclass

from shared_core import InputError


@dataclass(frozen=True)
class StagedSettings:
    """Hyperparameters of stages A, B and B2. Stage A's are the released code's.

    Args:
        epochs: Of stage A, at most.
        lr: Learning rate of stage A (Adam).
        warmup: Epochs in which stage A's rate rises to `lr`.
        final_lr: Share of `lr` to which it falls until the last epoch, along half a cosine; 1 keeps it.
        weight_decay: Of stage A.
        batch: Slides a step.
        instance_weight: Share of the instance loss beside cross-entropy; 0 leaves it out.
        keep: Share of a slide's regions that a step of stage A sees, drawn anew each time; below 1 it keeps
            few slides from being learned by heart.
        instances: Regions with the most and the least attention that the instance loss takes (k_sample).
        track_from: First epoch whose validation loss counts.
        min_epochs: No early stop before.
        patience: Epochs without a better validation loss before stage A ends.
        global_epochs: Of stage B.
        global_lr: AdamW.
        global_ce: Weight of cross-entropy through the frozen classifier beside the squared error.
        window: Looks through which stage B's gradient goes back.
        mixed_epochs: Of stage B2.
        mixed_lr: Adam.
        rho: Longest sequence of random looks in B and B2, as a share of regions.
    """

    epochs: int = 200
    lr: float = 2e-4
    warmup: int = 0
    final_lr: float = 1.0
    weight_decay: float = 1e-5
    batch: int = 1
    instance_weight: float = 0.3
    keep: float = 1.0
    instances: int = 8
    track_from: int = 20
    min_epochs: int = 100
    patience: int = 20
    global_epochs: int = 30
    global_lr: float = 1e-3
    global_ce: float = 0.0
    window: int = 5
    mixed_epochs: int = 25
    mixed_lr: float = 2e-4
    rho: float = 0.2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "instances", "patience", "window"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        if not 0 <= self.instance_weight < 1:
            raise InputError("expected 0 to below 1", field="instance_weight", value=self.instance_weight)
        if not 0 <= self.final_lr <= 1 or not 0 <= self.warmup < self.epochs:
            raise InputError("expected final_lr from 0 to 1, and warmup below epochs")

    def rate(self, epoch: int) -> float:
        """Stage A's learning rate in an epoch, counted from 0."""
        if epoch < self.warmup:
            return self.lr * (epoch + 1) / (self.warmup + 1)
        passed = (epoch - self.warmup) / (self.epochs - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * passed)) / 2)
