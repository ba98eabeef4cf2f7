"""One training loop for CSQ, its rivals and float models.

All randomness of batches and augmentation comes from the seed and the step's number, so that nothing but the
model, the optimizer and torch's generator (dropout) has to be kept in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from csq.checkpoints import (
    Checkpoint,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from csq.data import ImageData
from csq.evaluate import top1
from csq.methods import Hooks, Method, Plan
from csq.optimizer_groups import param_groups
from shared_core import InputError
from shared_core.checkpoints import check_same_run, optimizer_tensors, restore_optimizer
from shared_core.errors import TrainingDiverged

CHECKPOINT = "checkpoint.safetensors"
_ORDER, _AUGMENTATION = 0, 1  # purposes that seeds are derived for


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: Optimizer steps, at least 1.
        batch_size: Images a step; the rest of an epoch that fills no batch is left out.
        lr: Highest learning rate of a stage, times the stage's factor.
        momentum: Of SGD.
        weight_decay: Of weights, biases and normalisation, and of PACT's clipping values.
        warmup: Share of each stage's steps in which the learning rate rises linearly, before it falls as a
            cosine.
        optimizer: "sgd" or "adamw".
        shift: Images are moved at random by up to so many pixels (zeros come in).
        flip: Half of the images are mirrored.
        label_smoothing: 0 for none.
        clip_norm: Largest norm of all gradients together; None for any.
        seed: Of the order of images and of augmentation.
        log_every: Steps between records of the history.
        evaluate_every: Steps between evaluations on the validation part; None for none.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    shift: int = 0
    flip: bool = False
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    seed: int = 0
    log_every: int = 20
    evaluate_every: int | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError("expected a number above 0", field="lr", value=self.lr)
        if not 0 <= self.warmup < 1:
            raise InputError("expected a share from 0 to below 1", field="warmup", value=self.warmup)


@dataclass(frozen=True)
class Trained:
    """What a run gave. `model` still has its quantizers: `method.harden` makes it plain."""

    model: nn.Module
    history: list[dict[str, Any]]
    checkpoint: Checkpoint = field(repr=False)
    """The end of the run."""


def derived_seed(seed: int, number: int, purpose: int) -> int:
    """Return a seed for one step or epoch and one purpose."""
    return int(np.random.SeedSequence([seed, number, purpose]).generate_state(1, np.uint64)[0] >> 1)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Int[Tensor, " batch"]:
    """Return the images of a step: each epoch is a new permutation, by seed and number of the epoch."""
    size = min(batch_size, count)
    epoch, position = divmod(step, count // size)
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch, _ORDER))
    return torch.randperm(count, generator=generator)[position * size : (position + 1) * size]


def augment(
    pixels: UInt8[Tensor, "n channels h w"], shift: int, flip: bool, generator: torch.Generator
) -> UInt8[Tensor, "n channels h w"]:
    """Move each image by up to `shift` pixels in both directions, and mirror half of them."""
    count, _, height, width = pixels.shape
    if shift:
        padded = F.pad(pixels, (shift,) * 4)
        top, left = torch.randint(0, 2 * shift + 1, (2, count), generator=generator).to(pixels.device)
        rows = top[:, None, None] + torch.arange(height, device=pixels.device)[:, None]
        columns = left[:, None, None] + torch.arange(width, device=pixels.device)
        images = torch.arange(count, device=pixels.device)[:, None, None]
        pixels = padded.permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.randint(0, 2, (count, 1, 1, 1), generator=generator).to(pixels.device)
        pixels = torch.where(mirrored.bool(), pixels.flip(3), pixels)
    return pixels


def stage_ends(method: Method, steps: int) -> list[int]:
    """Return the step after which each stage is over.

    Raises:
        InputError: There are too few steps for each stage to have one.
    """
    ends = [round(share * steps) for share in accumulate(stage.share for stage in method.stages)]
    if any(b <= a for a, b in pairwise([0, *ends])):
        raise InputError(f"too few for the {len(ends)} stages of {method.name}", field="steps", value=steps)
    return ends


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of a step of a stage, as a share of the highest."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def train(
    model: nn.Module,
    method: Method,
    data: ImageData,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    resume: bool = False,
    start: Checkpoint | None = None,
    stages: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Train a classifier in place, on the device that it is on.

    Args:
        model: A float model; its weights are where training starts.
        method: What is done to it.
        data: Only its training and validation parts are read.
        recipe: How to train.
        folder: Where checkpoints go; None for none.
        resume: Go on from the folder's checkpoint, where there is one, to the same end as without a break.
        start: The end of another run's stages, which this method's begin with: they are not run again.
        stages: Run only so many of the method's stages.
        progress: Called after each step with the number of steps done and the loss.
        record: Called with each new entry of the history.

    Raises:
        TrainingDiverged: The loss or a parameter is not finite; the folder keeps the last checkpoint.
        InputError: The checkpoint is of another run, or the recipe does not fit the method.
    """
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):
        torch.manual_seed(recipe.seed)
        run = _Run(model, method, data, recipe, folder, record)
        if resume and folder is not None and (folder / CHECKPOINT).exists():
            kept = read_checkpoint(folder / CHECKPOINT)
            check_same_run(kept.fingerprint, run.fingerprint, folder / CHECKPOINT)
            run.restore(kept)
        elif start is not None:
            prefix = start.fingerprint | {"method": run.fingerprint["method"]}
            done = len(start.plans)
            if start.fingerprint["method"][:done] != run.fingerprint["method"][:done]:
                raise InputError("its stages are not those that this method begins with", field="start")
            check_same_run(prefix, run.fingerprint, None)
            run.restore(start)
        return run.go_on(stages, progress)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: ImageData,
        recipe: Recipe,
        folder: Path | None,
        told: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.told = told
        self.model, self.method, self.data, self.recipe, self.folder = model, method, data, recipe, folder
        self.device = next(model.parameters()).device
        self.ends = stage_ends(method, recipe.steps)
        self.begins = [0, *self.ends[:-1]]
        self.plans: list[Plan] = []
        self.history: list[dict[str, Any]] = []
        self.hooks = Hooks()
        self.optimizer: torch.optim.Optimizer | None = None
        self.step = 0
        self.fingerprint = {
            "method": [repr(stage) for stage in method.stages],
            "recipe": {k: v for k, v in asdict(recipe).items() if k != "checkpoint_every"},
            "data": [data.name, len(data.train.labels), list(data.mean)],
            "model": {name: list(value.shape) for name, value in model.state_dict().items()},
        }

    def restore(self, kept: Checkpoint) -> None:
        """Rebuild the structure by the plans, then load the state."""
        for index, plan in enumerate(kept.plans):
            self._install(index, plan)
        self.model.load_state_dict(kept.model)
        self.step, self.history = kept.step, list(kept.history)
        if kept.step not in self.begins:  # a stage begins with a new optimizer
            assert self.optimizer is not None
            restore_optimizer(self.optimizer, kept.optimizer)
        torch.set_rng_state(kept.random["cpu"])
        if "cuda" in kept.random:
            torch.cuda.set_rng_state(kept.random["cuda"], self.device)

    def go_on(self, stages: int | None, progress: Callable[[int, float], None] | None) -> Trained:
        self.model.train()
        last = self.ends[-1 if stages is None else stages - 1]
        while self.step < last:
            index = next(i for i, end in enumerate(self.ends) if self.step < end)
            if len(self.plans) <= index:
                stage = self.method.stages[index]
                self._install(index, stage.plan(self.model, self._plain_batch, self.recipe.seed))
            loss = self._train_step(index)
            if progress is not None:
                progress(self.step, loss)
            if self.folder is not None and (
                self.step % self.recipe.checkpoint_every == 0 or self.step == last
            ):
                write_checkpoint(self.folder / CHECKPOINT, self._checkpoint())
        return Trained(self.model, self.history, self._checkpoint())

    def _install(self, index: int, plan: Plan) -> None:
        stage = self.method.stages[index]
        self.plans.append(plan)
        self.hooks = stage.install(self.model, plan, self.ends[index] - self.begins[index])
        groups = param_groups(self.model, self.recipe.weight_decay)
        fused = self.device.type in ("cpu", "cuda")  # one pass over memory; bit planes are many parameters
        if self.recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, lr=self.recipe.lr, momentum=self.recipe.momentum, fused=fused
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, fused=fused)

    def _train_step(self, index: int) -> float:
        recipe, optimizer, begin, end = self.recipe, self.optimizer, self.begins[index], self.ends[index]
        assert optimizer is not None
        share = rate(self.step - begin, end - begin, recipe.warmup) * self.method.stages[index].lr
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * share
        inputs, labels = self._batch()
        loss = F.cross_entropy(self.model(inputs), labels, label_smoothing=recipe.label_smoothing)
        if (penalty := self.hooks.penalty()) is not None:
            loss = loss + penalty
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at step {self.step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        optimizer.step()
        self.hooks.after_step(optimizer)
        self.step += 1
        self._log(index, value, share)
        return value

    def _log(self, index: int, loss: float, share: float) -> None:
        recipe = self.recipe
        evaluate = recipe.evaluate_every and self.step % recipe.evaluate_every == 0
        if self.step % recipe.log_every and self.step not in self.ends and not evaluate:
            return
        record = {
            "step": self.step,
            "stage": self.method.stages[index].name,
            "loss": loss,
            "lr": recipe.lr * share,
        }
        if evaluate:
            record["validation"] = top1(self.model, self.data, self.data.validation)
        self.history.append(record | self.hooks.record())
        if self.told is not None:
            self.told(self.history[-1])

    def _batch(self) -> tuple[Float[Tensor, "batch channels h w"], Int[Tensor, " batch"]]:
        recipe, split = self.recipe, self.data.train
        indices = batch_indices(len(split.labels), recipe.batch_size, recipe.seed, self.step)
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, self.step, _AUGMENTATION))
        pixels = augment(split.read(indices).to(self.device), recipe.shift, recipe.flip, generator)
        return self.data.inputs(pixels), split.labels[indices].to(self.device)

    def _plain_batch(self, count: int) -> tuple[Tensor, Tensor]:
        split = self.data.train
        indices = batch_indices(len(split.labels), count, self.recipe.seed, 0)
        inputs = self.data.inputs(split.read(indices).to(self.device))
        return inputs, split.labels[indices].to(self.device)

    def _checkpoint(self) -> Checkpoint:
        tensors = model_tensors(self.model)
        broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
                  and not n.endswith(".plan")]  # fmt: skip
        if broken:
            raise self._diverged(f"after step {self.step} {broken[0]} is not finite")
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {} if self.optimizer is None else optimizer_tensors(self.optimizer)
        plans, history = list(self.plans), list(self.history)
        return Checkpoint(self.step, self.fingerprint, plans, history, tensors, state, random)

    def _diverged(self, what: str) -> TrainingDiverged:
        kept = None if self.folder is None else self.folder / CHECKPOINT
        return TrainingDiverged.at(what, self.recipe.lr, kept)


def bn_batches(
    data: ImageData, batch_size: int = 128, seed: int = 0
) -> list[Float[Tensor, "n channels h w"]]:
    """Return the inputs of one epoch, for BatchNorm's final statistics."""
    count = len(data.train.labels)
    size = min(batch_size, count)
    steps = range(count // size)
    return [data.inputs(data.train.read(batch_indices(count, size, seed, step))) for step in steps]
