"""A run on made images; as a script, a run that is slow enough to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from asymaffinity.datasets import BoxImages, coco_boxes
from asymaffinity.settings import Settings
from asymaffinity.training import Trained, build_model, train


class Slow(BoxImages):
    """Images that take a while."""

    def __getitem__(self, key):
        time.sleep(0.1)
        return super().__getitem__(key)


def settings(folder: Path, **options) -> Settings:
    small = {
        "data": str(folder / "boxes.json"), "images": str(folder / "images"), "depth": str(folder / "depth"),
        "backbone": "small", "min_size": (48, 64), "max_size": 96, "steps": 6, "batch_size": 2, "lr": 0.002,
        "optimizer": "adamw", "workers": 0, "checkpoint_every": 2, "log_every": 3, "warmup": 3,
    }  # fmt: skip
    return Settings(**{**small, **options})


def run(data: Path, out: Path | None = None, resume: bool = False, slow: bool = False, **options) -> Trained:
    asked = settings(data, **options)
    boxes = coco_boxes(data / "boxes.json", data / "images", depth=data / "depth", flip=True)
    if slow:
        boxes.__class__ = Slow
    return train(build_model(asked, 2), boxes, asked, folder=out, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), slow=True)
