"""What each of the two processes of test_training.py does; a module that they can import."""

from __future__ import annotations

import os

import tiny
import torch
from training_runs import DATA, settings

from kdcicam.training import train


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    model = tiny.model(3)
    trained = train(model, DATA, settings(epochs=2))
    torch.save({"state": model.state_dict(), "history": trained.history}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
