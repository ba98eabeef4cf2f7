"""The state of a few-shot run in one file: safetensors, written at once, read without unpickling."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared_core import InputError
from shared_core.files import atomic_path

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam remembers of a parameter


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: Updates done.
        best_step: Updates behind the best validation score.
        scores: Validation score by step.
        losses: Loss of each update.
        best: The trained parameters at the best step.
    """

    step: int
    best_step: int
    scores: dict[int, float]
    losses: list[float]
    best: dict[str, Tensor]


def save_state(
    path: str | Path,
    state: TrainingState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
) -> None:
    """Write a run's state, its parameters and its optimizer's.

    Args:
        path: The file.
        state: Where the run stands.
        parameters: The trained parameters by name.
        optimizer: Adam over these.
        fingerprint: What makes the run this run; loading compares it.
    """
    tensors = {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for moment, tensor in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = tensor
    record = {
        "step": state.step,
        "best_step": state.best_step,
        "scores": state.scores,
        "losses": state.losses,
    }
    metadata = {"state": json.dumps(record), "run": json.dumps(fingerprint, default=str)}
    with atomic_path(path) as temporary:
        save_file(
            {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary, metadata
        )


def load_state(
    path: str | Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
) -> TrainingState:
    """Read what `save_state` wrote, into the parameters and the optimizer.

    Raises:
        InputError: The file is not such a state, or that of a run with other settings, data or parameters.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        record, run = json.loads(metadata["state"]), json.loads(metadata["run"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError("is not the state of a few-shot run", file=path) from error
    _check_run(path, run, json.loads(json.dumps(fingerprint, default=str)))
    if {n.removeprefix("parameter.") for n in tensors if n.startswith("parameter.")} != set(parameters):
        raise InputError("is the state of a run that trained other parameters", file=path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[f"parameter.{name}"].shape != parameter.shape:
                raise InputError(f"is the state of another model: {name} has another shape", file=path)
            parameter.copy_(tensors[f"parameter.{name}"])
            found = {moment: tensors.get(f"{moment}.{name}") for moment in _MOMENTS}
            optimizer.state[parameter] = {
                moment: t if moment == "step" else t.to(parameter.device)
                for moment, t in found.items()
                if t is not None
            }
    device = next(iter(parameters.values())).device
    best = {name: tensors[f"best.{name}"].to(device) for name in parameters}
    scores = {int(step): score for step, score in record["scores"].items()}
    return TrainingState(record["step"], record["best_step"], scores, record["losses"], best)


def _check_run(path: str | Path, run: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if run.get(name) != value:
            raise InputError(
                f"is the state of a run with another {name}: start anew, or resume that run", file=path
            )
