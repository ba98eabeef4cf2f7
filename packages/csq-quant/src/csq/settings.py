"""The options of a training run, in plain values. No torch here: the command's help reads its defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from shared_core import InputError

MethodName = Literal["csq", "csq-uniform", "lsq", "ste", "bsq", "hawq", "random", "float"]
FLOAT_SHARE = 0.15
"""Float steps before methods that need a trained model, where no weights are given."""


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("epochs", lambda x: x >= 1, "at least 1"),
    ("batch_size", lambda x: x >= 1, "at least 1"),
    ("lr", lambda x: x > 0, "a number above 0"),
    ("weight_decay", lambda x: x >= 0, "a number, at least 0"),
    ("clip_norm", lambda x: x > 0, "a number above 0"),
    ("shift", lambda x: x >= 0, "at least 0"),
    ("lam", lambda x: x > 0, "a number above 0"),
    ("search", lambda x: 0 < x <= 1, "a share above 0, at most 1"),
    ("alpha", lambda x: x >= 0, "a number, at least 0"),
    ("float_share", lambda x: 0 <= x < 1, "a share below 1"),
    ("validation", lambda x: 0 < x < 1, "a share above 0 and below 1"),
)
"""What numbers may be; no NaN, no infinity."""


@dataclass(frozen=True)
class Settings:
    """What a run is: the options of `csq train`, by their names."""

    model: str
    data: str
    method: MethodName = "csq"
    target_bits: float = 2.0
    budget: Literal["weights", "layers", "bytes"] = "weights"
    n_bits: int = 8
    act_bits: int = 32
    act_method: Literal["pact", "lsq"] = "pact"
    skip: tuple[str, ...] = ()
    weights: str | None = None
    init: Literal["auto", "pretrained", "scratch"] = "auto"
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    clip_norm: float | None = None
    shift: int = 0
    flip: bool = False
    lam: float | None = None
    search: float = 0.75
    finetune: Literal["hold", "reramp"] = "hold"
    contiguous: bool = False
    alpha: float = 0.01
    float_share: float | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    validation: float = 0.1
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise InputError(f"expected {wanted}", field=name.replace("_", "-"), value=value)
        self._check_target()

    def _check_target(self) -> None:
        uniform, whole = ("csq-uniform", "lsq", "ste"), ("hawq", "random")
        if self.method in uniform and self.target_bits not in range(1, 9):
            raise InputError(
                f"{self.method} gives all layers the same whole number of bits, 1 to 8",
                field="target-bits",
                value=self.target_bits,
            )
        if self.method in whole and not 1 <= self.target_bits <= 8:
            raise InputError(
                f"{self.method} gives each layer 1 to 8 bits: expected an average of those",
                field="target-bits",
                value=self.target_bits,
            )
        most = 9 if self.budget == "bytes" else 8
        if not 0 < self.target_bits <= most:
            raise InputError(f"expected above 0, at most {most}", field="target-bits", value=self.target_bits)

    @property
    def first_share(self) -> float:
        """The share of steps without quantization that the run begins with."""
        if self.method == "float":
            return 0.0
        if self.float_share is not None:
            return self.float_share
        return FLOAT_SHARE if self.method in ("bsq", "hawq", "random") and self.weights is None else 0.0
