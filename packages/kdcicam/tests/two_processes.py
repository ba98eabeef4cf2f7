"""What each of the two processes of test_training.py does; a module that they can import."""

from __future__ import annotations

import os

import tiny
import torch
from torch import nn
from training_runs import DATA, settings, student

from kdcicam.training import train


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    model = tiny.model(3)
    trained = train(model, DATA, settings(epochs=2))
    spare = tiny.model(3)
    spare.backbone.add_module("head", _Unused())
    train(spare, DATA, settings(epochs=1))  # a parameter without a part in the map stops nothing
    taught = student(epochs=2).model.state_dict()
    made = {"state": model.state_dict(), "history": trained.history, "student": taught}
    torch.save(made, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
