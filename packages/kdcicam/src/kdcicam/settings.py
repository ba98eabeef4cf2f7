"""The options of a training run in plain values, and the paper's recipes. No torch here: help reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from shared_core import InputError

Role = Literal["cls", "loc", "ci-cam", "nl-ccam", "cam", "student"]
ROLES = get_args(Role)
TEACHER_ROLES = ROLES[:-1]


@dataclass(frozen=True)
class Settings:
    """What a run is. Names are those of `--set NAME=VALUE`."""

    role: Role
    """``cls`` and ``loc``: the teachers; ``ci-cam``: no auxiliary loss; ``nl-ccam``: no context either;
    ``cam``: no non-local blocks either; ``student``."""
    backbone: str = "vgg16"
    data: str = ""
    images: str | None = None
    """wsolevaluation: folder of the images."""
    weights: str | None = None
    """Safetensors or .pth with the backbone's ImageNet weights."""
    pretrained: bool = False
    """timm backbones: fetch published weights."""
    image_size: int | None = None
    """The backbone's own where None: 299 for inception_v3, 224 else."""
    combine: str = "quadratic"
    last: int | None = None
    """Classes at the end of the ranking that ``sum_1`` and ``mean`` take; 20, or all where they are fewer."""
    update_rate: float = 0.01
    cls_teacher: str | None = None
    loc_teacher: str | None = None
    augmentation: str = "crop:0.2,1+flip"
    """Of teachers, and of a student's images of flag 0."""
    augmentation_cls: str = "crop:0.2,1+flip"
    """Of a student's images of flag 1."""
    augmentation_loc: str = "crop:0.1,1+flip"
    """Of a student's images of flag 2."""
    flags: tuple[int, ...] = (0, 1, 2)
    """From which each image draws: 0 label only, 1 classification teacher, 2 localization teacher."""
    auxiliary: str = "none"
    """Of ``cls`` and ``loc`` alone."""
    eta: float = 1.0
    area: float = 0.0
    area_mode: int = 2
    threshold: float = 0.0
    """Of the auxiliary foreground, as a share of the map's maximum."""
    alpha: float = 0.8
    beta: float = 1.0
    temperature_cls: float = 15.0
    temperature_loc: float = 15.0
    kl: str = "standard"
    t_squared: bool = False
    epochs: int = 100
    batch_size: int = 6
    lr: float = 5e-4
    lr_ratio: float = 0.1
    """Learning rate of backbone and context convolution, as a share of the classifier's."""
    poly: float = 0.9
    """Power of (1 - epoch/epochs); 0 for none."""
    decay: float = 0.5
    decay_every: int = 40
    drop_epoch: int | None = None
    """From this epoch on the learning rate is a tenth."""
    validation: float = 0.1
    mixed_precision: str = "no"
    workers: int = 0
    on_error: str = "raise"
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "role": ROLES,
            "auxiliary": ("none", "fore", "diff_aux"),
            "kl": ("standard", "released"),
            "mixed_precision": ("no", "fp16", "bf16"),
            "on_error": ("raise", "skip"),
            "combine": ("quadratic", "sum_1", "linear", "mean", "cam"),
            "area_mode": (1, 2),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(
                    f"expected one of {', '.join(map(str, values))}", field=name, value=getattr(self, name)
                )
        for name in ("epochs", "batch_size", "decay_every", "checkpoint_every", "image_size", "last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError("expected at least 1", field=name, value=value)
        for name in ("lr", "lr_ratio", "update_rate", "temperature_cls", "temperature_loc"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError("expected a number above 0", field=name, value=getattr(self, name))
        if not 0 <= self.alpha <= 1:
            raise InputError("expected 0 to 1", field="alpha", value=self.alpha)
        if self.auxiliary != "none" and self.role not in OWN_TEACHERS:
            raise InputError(
                f"is for the roles {' and '.join(OWN_TEACHERS)}: {self.role} has no auxiliary loss",
                field="auxiliary",
                value=self.auxiliary,
            )
        if not self.flags or not set(self.flags) <= {0, 1, 2}:
            raise InputError("expected some of 0, 1, 2", field="flags", value=self.flags)

    def learning_rate(self, epoch: int) -> float:
        """The classifier's learning rate in an epoch, counted from 0."""
        rate = self.lr * self.decay ** (epoch // self.decay_every)
        if self.poly:
            rate *= (1 - epoch / self.epochs) ** self.poly
        return 0.1 * rate if self.drop_epoch is not None and epoch >= self.drop_epoch else rate


def map_of(role: str) -> str:
    """The map that a model of this role was trained for, of `kdcicam.baselines.BASELINES`.

    >>> map_of("cam"), map_of("nl-ccam"), map_of("student")
    ('cam', 'nl-ccam', 'ci-cam')
    """
    return role if role in ("cam", "nl-ccam") else "ci-cam"


_VGG = {"backbone": "vgg16", "lr": 5e-4, "lr_ratio": 0.1, "batch_size": 6, "epochs": 100}
_TEACHER = {**_VGG, "decay_every": 14}
_INCEPTION = {
    "backbone": "inception_v3",
    "image_size": 299,
    "lr": 1e-4,
    "lr_ratio": 0.6,
    "batch_size": 6,
    "decay_every": 50,
    "drop_epoch": 85,
}
_IMAGENET = {
    "backbone": "vgg16-imagenet",
    "combine": "sum_1",
    "update_rate": 0.001,
    "lr": 8e-5,
    "lr_ratio": 1.0,
    "batch_size": 78,
    "epochs": 20,
    "poly": 0.0,
    "decay": 0.1,
    "decay_every": 10,
}
_JITTERED = "crop:0.2,1+flip+jitter:0.4+lighting"

PRESETS: dict[str, dict[str, Any]] = {
    "cub-vgg16-ci-cam": {"role": "ci-cam", **_TEACHER},
    "cub-vgg16-nl-ccam": {"role": "nl-ccam", **_TEACHER},
    "cub-vgg16-cls": {
        "role": "cls",
        **_TEACHER,
        "augmentation": _JITTERED,
        "auxiliary": "fore",
        "eta": 1.0,
        "area": 0.04,
        "threshold": 0.08,
    },
    "cub-vgg16-loc": {
        "role": "loc",
        **_TEACHER,
        "augmentation": "resize:336+flip",
        "auxiliary": "diff_aux",
        "eta": 0.5,
    },
    "cub-vgg16-loc-top1": {
        "role": "loc",
        **_TEACHER,
        "augmentation": "crop:0.1,1+flip",
        "auxiliary": "diff_aux",
        "eta": 0.5,
    },
    "cub-vgg16-student": {
        "role": "student",
        **_VGG,
        "update_rate": 0.002,
        "decay_every": 40,
        "augmentation": "crop:0.2,1+flip+randaugment:3,10",
    },
    "cub-inception-cls": {"role": "cls", **_INCEPTION, "auxiliary": "fore", "eta": 0.6, "threshold": 0.15},
    "cub-inception-loc": {
        "role": "loc",
        **_INCEPTION,
        "augmentation": "crop:0.1,1+flip+randaugment:3,10",
        "auxiliary": "diff_aux",
        "eta": 0.2,
        "threshold": 0.25,
        "area": 2e-8,
    },
    "cub-inception-student": {"role": "student", **_INCEPTION, "update_rate": 0.015},
    "ilsvrc-vgg16-ci-cam": {"role": "ci-cam", **_IMAGENET},
    "ilsvrc-vgg16-cls": {
        "role": "cls",
        **_IMAGENET,
        "augmentation": "crop:0.4,1+flip",
        "auxiliary": "fore",
        "eta": 1.0,
        "area": 0.04,
        "area_mode": 1,
    },
    "ilsvrc-vgg16-loc": {
        "role": "loc",
        **_IMAGENET,
        "augmentation": "resize:240+flip",
        "auxiliary": "diff_aux",
        "eta": 1.0,
        "area": 1e-6,
    },
    "ilsvrc-vgg16-student": {
        "role": "student",
        **_IMAGENET,
        "augmentation_loc": "crop:0.9,1.1+flip",
        "temperature_cls": 1.1,
        "temperature_loc": 1.1,
    },
}
"""The paper's recipes (sections 3.6 to 3.8). Mirroring is not stated there and stands in all of them."""

OWN_TEACHERS: dict[str, dict[str, Any]] = {
    "cls": {"auxiliary": "fore", "eta": 0.6, "threshold": 0.15},
    "loc": {"auxiliary": "diff_aux", "eta": 0.2, "threshold": 0.25},
}
"""What makes a teacher where no recipe is named: the auxiliary losses of the paper's InceptionV3 teachers."""


def preset(name: str) -> dict[str, Any]:
    """Return a recipe's settings.

    Raises:
        InputError: There is none of that name.
    """
    if name not in PRESETS:
        raise InputError(f"expected one of {', '.join(PRESETS)}", field="recipe", value=name)
    return dict(PRESETS[name])


def settings_from(recipe: str | None, given: dict[str, Any]) -> Settings:
    """A recipe with what was given over it; without a recipe, the defaults and a teacher's auxiliary loss.

    Raises:
        InputError: As for `preset` and `Settings`.

    >>> settings_from(None, {"role": "loc", "eta": 0.5}).auxiliary
    'diff_aux'
    """
    start = preset(recipe) if recipe else dict(OWN_TEACHERS.get(str(given.get("role")), {}))
    if "role" in start and given.get("role", start["role"]) != start["role"]:
        raise InputError(f"{recipe} is a recipe for {start['role']}", field="role", value=given["role"])
    return replace(Settings("cls"), **{**start, **given})
