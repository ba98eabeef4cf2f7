"""Models and training states on disk: safetensors, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from asymaffinity.settings import Settings, plain, restored
from shared_core import InputError, checkpoints
from shared_core.files import atomic_path, write_json

CHECKPOINT, MODEL, CONFIG = "checkpoint.safetensors", "model.safetensors", "config.json"
FORMAT = 1
KIND = "asymaffinity 2"
PARTS = ("model", "optimizer")
STATE = {"step": int, "fingerprint": dict, "history": list, "scaler": dict}


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
    tensors = {part: getattr(checkpoint, part) for part in PARTS}
    checkpoints.write_checkpoint(path, KIND, tensors, {name: getattr(checkpoint, name) for name in STATE})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        InputError: There is no such file, or it is not such a file.
    """
    return Checkpoint(**checkpoints.read_checkpoint(path, KIND, PARTS, STATE))


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
    state = checkpoints.read_tensors(folder / MODEL)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"does not fit {CONFIG}: {error}", file=folder / MODEL) from error
    return LoadedModel(model.eval(), settings, classes, ids)
