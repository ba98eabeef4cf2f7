"""A training run's state in one safetensors file, from which it goes on to the same last bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared_core import InputError, checkpoints

KIND = "csq 4"
PARTS = ("model", "optimizer", "random")
STATE = {"step": int, "fingerprint": dict, "plans": list, "history": list}


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps.

    `plans` are the decisions of the method's stages so far (bits of layers), `history` what was logged.
    """

    step: int
    fingerprint: dict[str, Any]
    """What the run is: of another run, it is refused."""
    plans: list[dict[str, Any]]
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a reader sees this checkpoint or the one before."""
    tensors = {part: getattr(checkpoint, part) for part in PARTS}
    checkpoints.write_checkpoint(path, KIND, tensors, {name: getattr(checkpoint, name) for name in STATE})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        InputError: There is no such file, or it is not such a file.
    """
    kept = checkpoints.read_checkpoint(path, KIND, PARTS, STATE)
    if "cpu" not in kept["random"]:
        raise InputError("is damaged: expected the state of the generator", file=path)
    return Checkpoint(**kept)
