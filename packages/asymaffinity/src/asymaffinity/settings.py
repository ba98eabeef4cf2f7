"""The options of a training run in plain values. No torch here: help reads it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from shared_core import InputError

AFFINITIES = ("none", "color", "depthgrad", "both", "and", "or")


@dataclass(frozen=True)
class Settings:
    """What a run is. Names are those of `--set NAME=VALUE`."""

    data: str
    """A COCO file with boxes, or the folder of Cityscapes."""
    images: str | None = None
    """COCO: the folder of the images."""
    depth: str | None = None
    """COCO: the folder of depth maps with the images' stems."""
    depth_kind: str | None = None
    """What the numbers of the depth maps mean; where None, depth.json beside them says it."""
    head: str = "condinst"
    backbone: str = "resnet50"
    weights: str | None = None
    """Of the backbone: .safetensors, or .pth read without running code from it."""
    norm: str = "frozen"
    """Of a ResNet: ``frozen`` for pretrained weights, ``batch`` for training from scratch."""
    trainable_layers: int = 3
    affinity: str = "both"
    """``none``, ``color``, ``depthgrad``, ``both`` (a term each), ``and`` or ``or`` (one joined term)."""
    form: str = "asymmetric"
    outside: str = "known"
    supervision: str = "boxes"
    """``boxes``, or ``mixed``: annotations of a COCO file that have a ``segmentation`` learn from it."""
    color_weight: float | None = None
    """Where None: 1 alone, 0.5 beside the other."""
    depth_weight: float | None = None
    color_theta: float = 2.0
    color_thresh: float = 0.3
    depth_theta: float = 1.0
    depth_thresh: float = 0.5
    depth_field: str = "disparity"
    depth_normalize: str = "spread"
    kernel: int = 3
    dilation: int = 2
    warmup: int | None = None
    """Steps until the affinity terms have their weight; where None, a ninth of the run, BoxInst's share."""
    bottom: int = 0
    """Last rows of each image that are no edge's neighbour; BoxInst has 10 for COCO."""
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    flip: bool = True
    steps: int = 90_000
    batch_size: int = 16
    lr: float = 0.01
    optimizer: str = "sgd"
    weight_decay: float = 1e-4
    lr_warmup: int = 1000
    drops: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the run after which the learning rate is a tenth of what it was."""
    clip: float = 10.0
    mixed_precision: str = "no"
    workers: int = 2
    checkpoint_every: int = 1000
    log_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "head": ("condinst", "maskrcnn"),
            "norm": ("frozen", "batch"),
            "affinity": AFFINITIES,
            "form": ("symmetric", "asymmetric"),
            "outside": ("known", "predicted"),
            "supervision": ("boxes", "mixed"),
            "optimizer": ("sgd", "adamw"),
            "mixed_precision": ("no", "fp16", "bf16"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(
                    f"expected one of {', '.join(values)}", field=name, value=getattr(self, name)
                )
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "max_size"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError("expected a number above 0", field=name, value=getattr(self, name))
        if not self.min_size or min(self.min_size) < 8:
            raise InputError("expected sides of at least 8", field="min_size", value=self.min_size)

    @property
    def wants_depth(self) -> bool:
        """Whether training reads depth maps."""
        return self.affinity not in ("none", "color")

    @property
    def affinity_warmup(self) -> int:
        """Steps of the affinity terms' warm-up."""
        return self.steps // 9 if self.warmup is None else self.warmup

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then drops to a tenth."""
        warm = min(self.lr_warmup, self.steps // 10)
        factor = 1.0 if step >= warm else 0.001 + (1 - 0.001) * step / warm
        return self.lr * factor * 0.1 ** sum(step >= drop * self.steps for drop in self.drops)


FREE = ("data", "images", "depth", "weights", "workers", "checkpoint_every", "log_every")
"""What may differ between a run and the one that goes on with it."""


def restored(kept: dict[str, Any]) -> Settings:
    """Settings from JSON.

    Raises:
        InputError: They are of another version.
    """
    fields_: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    try:
        return Settings(**fields_)
    except TypeError as error:
        raise InputError(f"the settings are of another version: {error}", field="settings") from error


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
