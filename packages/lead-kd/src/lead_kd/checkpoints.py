"""State of a training run as one safetensors file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_core import checkpoints
from shared_core.checkpoints import check_same_run, optimizer_tensors, restore_optimizer

KIND = "lead-kd 2"
STATE = {"step": int, "settings": dict, "scaler": dict}


def write_checkpoint(
    path: Path,
    step: int,
    settings: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write the state after `step` steps.

    Args:
        path: The file.
        step: Steps that are done.
        settings: What a run that goes on must have in common with this one; JSON can hold it.
        modules: Modules by name; weights that are shared are written once.
        optimizers: Optimizers by name.
        scaler: Of losses in float16.
    """
    tensors = {f"module.{name}": module.state_dict() for name, module in modules.items()}
    tensors |= {f"optimizer.{name}": optimizer_tensors(one) for name, one in optimizers.items()}
    kept = {} if scaler is None else scaler.state_dict()
    state = {"step": step, "settings": dict(settings), "scaler": kept}
    checkpoints.write_checkpoint(path, KIND, tensors, state)


def read_checkpoint(
    path: Path,
    settings: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Put a checkpoint's state into modules and optimizers.

    Returns:
        The number of steps that are done.

    Raises:
        InputError: The file is missing, damaged, of another kind, or of a run with other settings.
    """
    parts = [f"module.{name}" for name in modules] + [f"optimizer.{name}" for name in optimizers]
    kept = checkpoints.read_checkpoint(path, KIND, parts, STATE)
    check_same_run(kept["settings"], settings, path)
    for name, module in modules.items():
        module.load_state_dict(kept[f"module.{name}"])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, kept[f"optimizer.{name}"])
    if scaler is not None and kept["scaler"]:
        scaler.load_state_dict(kept["scaler"])
    return kept["step"]
