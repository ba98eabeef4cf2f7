"""What each of the two processes of test_training.py does; a module that they can import."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from training_runs import run


def work(rank: int, data: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    trained = run(Path(data), steps=3)
    torch.save(trained.model.state_dict(), f"{data}/{rank}.pt")
    torch.distributed.destroy_process_group()
