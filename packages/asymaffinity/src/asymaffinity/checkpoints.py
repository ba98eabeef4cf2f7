"""Models and training states on disk: safetensors, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymaffinity.settings import Settings, plain, restored
from shared_core import InputError
from shared_core.files import atomic_path, write_json

CHECKPOINT, MODEL, CONFIG = "checkpoint.safetensors", "model.safetensors", "config.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` steps."""

    step: int
    fingerprint: dict[str, Any]
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scaler: dict[str, float]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a reader sees this checkpoint or the one before."""
    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part in ("model", "optimizer")
        for name, value in getattr(checkpoint, part).items()
    }
    state = {name: getattr(checkpoint, name) for name in ("step", "fingerprint", "history", "scaler")}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"asymaffinity": str(FORMAT), "state": json.dumps(state)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        InputError: There is no such file, or it is not such a file.
    """
    if not path.is_file():
        raise InputError("there is no such checkpoint", file=path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 safe_open is no mapping
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
        if metadata.get("asymaffinity") != str(FORMAT):
            raise InputError(f"expected a checkpoint of format {FORMAT}", file=path)
        state = json.loads(metadata["state"])
        return Checkpoint(
            state["step"],
            state["fingerprint"],
            state["history"],
            parts["model"],
            parts["optimizer"],
            state["scaler"],
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"is no whole checkpoint of asymaffinity: {error}", file=path) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors: ``"3.exp_avg"`` is that of its parameter 3."""
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


def save_model(
    model: nn.Module, folder: Path, settings: Settings, classes: tuple[str, ...], ids: tuple[int, ...]
) -> None:
    """Write a model as a folder: ``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with atomic_path(folder / MODEL) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    config = {"asymaffinity": FORMAT, "classes": list(classes), "category_ids": list(ids)}
    write_json(folder / CONFIG, {**config, "settings": plain(settings)})


@dataclass(frozen=True)
class LoadedModel:
    """A detector with the names of its classes."""

    model: nn.Module
    settings: Settings
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]


def load_model(folder: Path) -> LoadedModel:
    """Read a model that `train` wrote.

    Raises:
        InputError: A file is missing, damaged, or does not fit the other.
    """
    from asymaffinity.training import build_model

    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"there is no {CONFIG}: expected the folder of a trained model", file=folder)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["asymaffinity"] != FORMAT:
            raise InputError(f"expected format {FORMAT}", file=file, value=config["asymaffinity"])
        settings, classes = restored(config["settings"]), tuple(config["classes"])
        ids = tuple(int(number) for number in config["category_ids"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"is no model's description: {error!r}", file=file) from error
    model = build_model(settings, len(classes))
    state = read_tensors(folder / MODEL)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"does not fit {CONFIG}: {error}", file=folder / MODEL) from error
    return LoadedModel(model.eval(), settings, classes, ids)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from .safetensors, or else from a file of torch.save, without unpickling code.

    Raises:
        InputError: It is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError("there is no such file", file=path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"is not a whole safetensors file: {error}", file=path) from error
    except Exception as error:  # whatever a foreign file makes the reader stumble over
        raise InputError(
            "cannot be read without running code from it, which is refused", file=path
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError("expected named tensors", file=path)
    return found
