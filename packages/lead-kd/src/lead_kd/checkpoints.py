"""State of a training run as one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared_core import InputError
from shared_core.files import atomic_path

_FORMAT = "lead-kd checkpoint 1"


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
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{name}.{number}.{key}"] = torch.as_tensor(value)
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    about = {"format": _FORMAT, "step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    if scaler is not None:
        about["scaler"] = json.dumps(scaler.state_dict())
    with atomic_path(path) as temporary:
        save_file(own, temporary, metadata=about)


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
    if not path.is_file():
        raise InputError("there is no checkpoint to go on from; start without --resume", file=path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is no whole checkpoint ({error})", file=path) from error
    if about.get("format") != _FORMAT:
        raise InputError(f"expected the format {_FORMAT!r}", file=path, value=about.get("format"))
    known = json.loads(about["settings"])
    wanted = json.loads(json.dumps(settings))
    for name in sorted({*known, *wanted}):
        if known.get(name) != wanted.get(name):
            raise InputError(
                f"the run began with {known.get(name)!r}; go on with that, or start anew in another folder",
                file=path,
                field=name,
                value=wanted.get(name),
            )
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )
    for name, optimizer in optimizers.items():
        prefix = f"optimizer.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                number, _, field = key.removeprefix(prefix).partition(".")
                state.setdefault(int(number), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if scaler is not None and "scaler" in about:
        scaler.load_state_dict(json.loads(about["scaler"]))
    return int(about["step"])
