"""Models and training states on disk: safetensors, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdcicam.model import CICAM
from shared_core import InputError, checkpoints
from shared_core.files import atomic_path, write_json

MODEL, CONFIG = "model.safetensors", "config.json"
POOLS = ("pool.safetensors", "pool.pt")
"""Files beside weights that lack the pool, in which it is looked for."""
FORMAT = "1"
KIND = "kdcicam 2"
PARTS = ("model", "optimizer")
STATE = {"step": int, "fingerprint": dict, "history": list, "running": dict, "scaler": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` steps; from it training goes on to the same last bit."""

    step: int
    fingerprint: dict[str, Any]
    """What the run is: the checkpoint of another one is refused."""
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    running: dict[str, float]
    """Sums of the epoch that is under way."""
    scaler: dict[str, float]
    """Of mixed precision in float16; empty else."""


def save_model(model: CICAM, folder: Path, notes: dict[str, Any] | None = None) -> None:
    """Write a model as a folder: ``model.safetensors`` (with the pool) and ``config.json``.

    Args:
        model: To write.
        folder: Made where it is missing.
        notes: More for config.json, under ``notes``.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with atomic_path(folder / MODEL) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    options = {key: value for key, value in model.spec["backbone_options"].items() if key != "pretrained"}
    spec = {**model.spec, "backbone_options": options}
    write_json(folder / CONFIG, {"kdcicam": FORMAT, **spec, "notes": notes or {}})


def load_model(path: Path, backbone: nn.Module | None = None, pool: Path | None = None) -> CICAM:
    """Read a model from a folder of `save_model`.

    Args:
        path: The folder, or weights in it (.safetensors; .pt, read with weights_only) beside config.json.
        backbone: Where the model was made with a module of one's own.
        pool: A file with the pool alone, for weights without one: the authors keep it beside them. Where
            None, such weights get it from ``pool.safetensors`` or ``pool.pt`` in the folder.

    Raises:
        InputError: A file is missing or damaged, or there is no pool.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    spec = {key: value for key, value in config.items() if key not in ("kdcicam", "notes")}
    named = spec.pop("backbone")
    if named is None and backbone is None:
        raise InputError("was made with a module of its own: give backbone", file=folder)
    options = spec.pop("backbone_options")
    try:
        model = CICAM(str(named), **spec, **options) if backbone is None else CICAM(backbone, **spec)
    except TypeError as error:
        raise InputError(f"does not describe a model: {error}", file=folder / CONFIG) from error
    file = folder / MODEL if path.is_dir() else path
    state = checkpoints.read_tensors(file)
    if pool is None and "pool" not in state:
        pool = _pool_beside(file)
    if pool is not None:
        state = {**state, "pool": read_pool(pool)}
    if state["pool"].shape != model.pool.shape:
        raise InputError(
            f"expected the pool {tuple(model.pool.shape)}",
            file=pool or file,
            field="pool",
            value=tuple(state["pool"].shape),
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"does not fit {CONFIG}: {error}", file=file) from error
    return model.eval()


def _pool_beside(file: Path) -> Path:
    for name in POOLS:
        if (file.parent / name).is_file():
            return file.parent / name
    theirs = sorted(entry.name for entry in file.parent.glob("mask_train_*"))
    found = f" ({theirs[0]} beside it looks like the pool of the authors' code)" if theirs else ""
    raise InputError(
        f"has no context pool{found}: put it beside the weights as {' or '.join(POOLS)} (one tensor; .pt: of "
        "torch.save), or name its file, with --pool of eval and localize or pool= of load_model",
        file=file,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        InputError: There is none, or it is not ours.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"there is no {CONFIG}: expected a folder with a kdcicam model", file=folder)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["kdcicam"] != FORMAT or not isinstance(config["backbone_options"], dict):
            raise KeyError("kdcicam")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"is no kdcicam model's: {error!r}", file=file) from error
    return config


def read_pool(path: Path) -> Tensor:
    """Read a pool [K, h, w] (or [1, K, h, w]) from a file of its own.

    Raises:
        InputError: It cannot be read without unpickling code, or holds no such tensor.
    """
    if not path.is_file():
        raise InputError("there is no such file", file=path)
    found: Any = (
        checkpoints.read_tensors(path)
        if path.suffix == ".safetensors"
        else checkpoints.unpickled_tensors(path)
    )
    if isinstance(found, dict):
        found = next(iter(found.values())) if len(found) == 1 else found.get("pool")
    if not isinstance(found, Tensor) or found.squeeze(0).ndim != 3:
        raise InputError("expected one tensor of classes, height, width", file=path)
    return found.float().squeeze(0)


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
