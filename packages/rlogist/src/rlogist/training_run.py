"""A training run that survives a kill: checkpoints, and a resumed run ends with the same bits."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlogist.stage import Stage, flat_tensors, part_of
from shared_core import InputError, files

CHECKPOINT = "checkpoint.safetensors"
Epoch = Callable[[str, int, int, dict[str, float]], None]
"""Called with (stage, epochs done, epochs in all, what there is to log) after each epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: the stage, its state, and all networks."""

    stage: int
    networks: dict[str, Tensor]
    state: dict[str, Tensor]


def run_stages(
    networks: nn.Module,
    stages: Sequence[Callable[[], Stage]],
    *,
    settings: Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    every: int = 1,
    on_epoch: Epoch | None = None,
) -> None:
    """Run stages one after the other, each made when its turn comes.

    Args:
        networks: All that is trained; the result is in it.
        stages: Makers of stages.
        settings: What the run depends on; a checkpoint of other settings is refused.
        folder: Where `checkpoint.safetensors` is kept; no checkpoints where None.
        resume: Go on from the folder's checkpoint if there is one.
        every: Epochs between two checkpoints.
        on_epoch: Called after each epoch.

    Raises:
        InputError: The checkpoint is damaged or of a run with other settings.
    """
    path = None if folder is None else Path(folder) / CHECKPOINT
    found = read_checkpoint(path, settings) if resume and path is not None and path.exists() else None
    if found is not None:
        networks.load_state_dict(found.networks)
    for index in range(0 if found is None else found.stage, len(stages)):
        stage = stages[index]()
        if found is not None and index == found.stage:
            stage.load_state_dict(found.state)
        while not stage.finished:
            scalars = stage.epoch()
            if on_epoch is not None:
                on_epoch(stage.name, stage.done, stage.total, scalars)
            if path is not None and (stage.done % every == 0 or stage.finished):
                write_checkpoint(path, Checkpoint(index, networks.state_dict(), stage.state_dict()), settings)
        stage.finish()


def write_checkpoint(path: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Write a checkpoint, atomically."""
    tensors = flat_tensors({"networks": checkpoint.networks, "state": checkpoint.state})
    header = {"stage": str(checkpoint.stage), "settings": _line(settings)}
    with files.atomic_path(path) as temporary:
        # A copy each: safetensors refuses tensors that share memory, as a batch's rows may.
        save_file(
            {key: value.detach().clone().contiguous() for key, value in tensors.items()}, temporary, header
        )


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: It is damaged or of a run with other settings.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no iterator
    except (SafetensorError, OSError) as error:
        raise InputError(f"not a whole checkpoint: {error}", file=path) from error
    if header.get("settings") != _line(settings):
        raise InputError(
            "is of a run with other settings or slides: another folder takes a new one",
            file=path,
        )
    return Checkpoint(int(header["stage"]), part_of(tensors, "networks"), part_of(tensors, "state"))


class TensorBoard:
    """An `on_epoch` that writes scalars, one a stage and quantity, to a folder for TensorBoard.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise InputError("tensorboard is not installed: pip install 'rlogist[train]'") from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, stage: str, done: int, total: int, scalars: dict[str, float]) -> None:
        """Write what one epoch gave."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"{stage}/{name}", value, done)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _line(settings: Mapping[str, Any]) -> str:
    return json.dumps({**settings, "torch": torch.__version__}, sort_keys=True)
