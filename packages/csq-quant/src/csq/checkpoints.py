"""A training run's state in one safetensors file, from which it goes on to the same last bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_core import InputError
from shared_core.files import atomic_path

FORMAT = "3"


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors: ``"3.momentum_buffer"`` is that of its parameter 3."""
    return {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a reader sees this checkpoint or the one before."""
    from safetensors.torch import save_file

    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()  # shared storage is refused
        for part in ("model", "optimizer", "random")
        for name, value in getattr(checkpoint, part).items()
    }
    plain = {key: getattr(checkpoint, key) for key in ("step", "fingerprint", "plans", "history")}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"csq-checkpoint": FORMAT, "state": json.dumps(plain)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        InputError: There is no such file, or it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError("there is no such checkpoint", file=path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 safe_open is no mapping
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"is not a whole safetensors file: {error}", file=path) from error
    if metadata.get("csq-checkpoint") != FORMAT:
        raise InputError(
            f"expected a csq checkpoint of format {FORMAT}",
            file=path,
            value=metadata.get("csq-checkpoint", "no such mark"),
        )
    try:
        state = json.loads(metadata["state"])
        kinds = {"step": int, "fingerprint": dict, "plans": list, "history": list}
        if state.keys() != kinds.keys() or any(type(state[key]) is not kind for key, kind in kinds.items()):
            raise ValueError(f"expected {', '.join(kinds)}")
        if parts.keys() != {"model", "optimizer", "random"} or "cpu" not in parts["random"]:
            raise ValueError("expected tensors of the model, the optimizer and the generator")
    except (AttributeError, KeyError, ValueError) as error:
        raise InputError(f"is damaged: {error}", file=path) from error
    tensors: dict[str, Any] = parts
    return Checkpoint(**state, **tensors)
