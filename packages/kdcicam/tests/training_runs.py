"""A run on made images; as a script, a run that is slow enough to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tiny
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcicam.flagged import draw_flag
from kdcicam.losses import Teachers
from kdcicam.settings import Settings
from kdcicam.training import train


class Shapes(Dataset):
    """Twelve images of three classes: a bright square in the class's channel; noise by epoch and index."""

    def __init__(self, flags: tuple[int, ...] = (0,), delay: float = 0.0) -> None:
        self.flags, self.delay = flags, delay

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        time.sleep(self.delay)
        image = 0.3 * torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1000 * epoch + index))
        image[index % 3, 6:18, 4:16] += 2
        return image, index % 3, draw_flag(self.flags, 0, epoch, index)


DATA = Shapes()


def settings(**options) -> Settings:
    small = {
        "role": "ci-cam",
        "epochs": 4,
        "batch_size": 4,
        "lr": 0.01,
        "lr_ratio": 1.0,
        "checkpoint_every": 2,
    }
    return Settings(**{**small, **options})


def student(folder: Path | None = None, resume: bool = False, delay: float = 0.0, **options):
    teachers = Teachers(
        tiny.with_pool(tiny.model(3, seed=5)), tiny.with_pool(tiny.model(3, seed=6)), tiny.model(3)
    )
    asked = settings(role="student", temperature_cls=4.0, temperature_loc=4.0, **options)
    return train(
        tiny.model(3), Shapes((0, 1, 2), delay), asked, teachers=teachers, folder=folder, resume=resume
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    student(Path(sys.argv[1]), delay=0.1)
