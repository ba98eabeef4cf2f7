"""Small runs for the tests, and a slow one that a test kills."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import torch
from torch import nn

from csq import cli, training
from csq.data import ImageData, PixelSplit
from csq.methods import (
    BsqFinetuneStage,
    BsqStage,
    CsqStage,
    HawqStage,
    Method,
    RandomStage,
    Stage,
    UniformStage,
)
from csq.training import CHECKPOINT, Recipe, Trained, train
from shared_core import command

STEPS = 24
_FIRST = Stage("float", 0.25)
METHODS = {
    "float": Method("float", (Stage("float", 1.0),)),
    "csq": Method("csq", (CsqStage("csq", 1.0, lam=0.3),)),
    "csq-activations": Method("csq", (_FIRST, CsqStage("csq", 0.75, init="pretrained", act_bits=4))),
    "csq-uniform": Method("csq-uniform", (CsqStage("csq", 1.0, target_bits=None, n_bits=2),)),
    "ste": Method("ste", (_FIRST, UniformStage("qat", 0.75, quantizer="ste"))),
    "lsq": Method("lsq", (_FIRST, UniformStage("qat", 0.75, act_bits=4, act_method="lsq"))),
    "bsq": Method("bsq", (_FIRST, BsqStage("bsq", 0.5), BsqFinetuneStage("finetune", 0.25))),
    "hawq": Method("hawq", (_FIRST, HawqStage("qat", 0.75, target_bits=3.0))),
    "random": Method("random", (_FIRST, RandomStage("qat", 0.75, target_bits=3.0))),
}


def stripes(count: int = 90) -> ImageData:
    """Two classes, horizontal and vertical stripes, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator)
    wave = torch.tensor([0.0, 120.0]).repeat(3)
    images = torch.where(labels[:, None, None].bool(), wave[:, None].expand(6, 6), wave.expand(6, 6))
    noise = 100 * torch.rand((count, 6, 6), generator=generator)
    pixels = (images + noise).to(torch.uint8)[:, None]
    split = PixelSplit(pixels, labels)
    parts = [split.subset(part) for part in torch.arange(count).split(count // 3)]
    return ImageData("stripes", *parts[:3], classes=("rows", "columns"), mean=(0.4,), std=(0.25,))


def small_model() -> nn.Module:
    """Convolutions, BatchNorm and dropout, which draws from torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 2),
        )


def run(
    name: str, folder: Path | None = None, *, steps: int = STEPS, resume: bool = False, **more
) -> Trained:
    """Train one of METHODS on the stripes."""
    recipe = Recipe(steps, batch_size=10, lr=0.05, shift=1, flip=True, log_every=4, checkpoint_every=4)
    return train(small_model(), METHODS[name], stripes(), recipe, folder=folder, resume=resume, **more)


def slow_command(arguments: list[str]) -> None:
    """The command `csq train` with pauses between the steps, in a process of its own."""
    torch.set_num_threads(1)
    step = training._Run._train_step

    def slow_step(self: training._Run, index: int) -> float:
        time.sleep(0.05)  # so that it is killed between two checkpoints, or while one is written
        return step(self, index)

    training._Run._train_step = slow_step  # type: ignore[method-assign]
    command.run(cli.app, arguments)


def killed_at_a_checkpoint(folder: Path, arguments: list[str]) -> None:
    """Start `slow_command` in a process and kill it when it has written a checkpoint, before it ends."""
    process = multiprocessing.get_context("forkserver").Process(target=slow_command, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 240
    while process.is_alive() and time.monotonic() < deadline:
        if (folder / CHECKPOINT).exists():
            process.kill()
        time.sleep(0.005)
    process.join()
    assert process.exitcode == -signal.SIGKILL
