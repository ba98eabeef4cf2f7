"""The options of a training run, in plain values. No torch here: the command's help reads its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared_core import InputError

MethodName = Literal["csq", "csq-uniform", "lsq", "ste", "bsq", "hawq", "random", "float"]
FLOAT_SHARE = 0.15
"""Float steps before methods that need a trained model, where no weights are given."""


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
        if self.epochs < 1:
            raise InputError("expected at least 1", field="epochs", value=self.epochs)
        if self.method in ("csq-uniform", "lsq", "ste") and self.target_bits not in range(1, 9):
            raise InputError(
                f"{self.method} gives all layers the same whole number of bits, 1 to 8",
                field="target-bits",
                value=self.target_bits,
            )
        if not 0 < self.target_bits <= (9 if self.budget == "bytes" else 8):
            raise InputError("expected above 0, at most 8", field="target-bits", value=self.target_bits)
        if self.float_share is not None and not 0 <= self.float_share < 1:
            raise InputError("expected a share below 1", field="float-share", value=self.float_share)

    @property
    def first_share(self) -> float:
        """The share of steps without quantization that the run begins with."""
        if self.method == "float":
            return 0.0
        if self.float_share is not None:
            return self.float_share
        return FLOAT_SHARE if self.method in ("bsq", "hawq", "random") and self.weights is None else 0.0
