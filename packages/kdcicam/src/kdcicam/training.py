"""The training loop of teachers and students, through accelerate: one process or several, mixed precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdcicam.checkpoints import (
    Checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from kdcicam.flagged import Batch, EpochBatches, collate, derived_seed
from kdcicam.losses import ClassifierLoss, Teachers, TwoTeacherLoss, flag_shares
from kdcicam.model import CICAM, CICAMOutput
from kdcicam.settings import Settings
from shared_core import InputError
from shared_core.checkpoints import check_same_run, optimizer_tensors, restore_optimizer
from shared_core.command import accelerate_device
from shared_core.errors import TrainingDiverged, needs_extra

CHECKPOINT = "checkpoint.safetensors"
_STEP = 3  # purpose of a step's seed
_PATIENCE = 50
"""Steps in a row that may be left out for an overflow under float16 before the run is given up."""

# What may differ between a run and the one that goes on with it.
_FREE = (
    "data",
    "images",
    "weights",
    "pretrained",
    "workers",
    "checkpoint_every",
    "cls_teacher",
    "loc_teacher",
)


@dataclass(frozen=True)
class Trained:
    """What a run gave."""

    model: CICAM
    history: list[dict[str, Any]]
    """A record an epoch."""
    checkpoint: Checkpoint = field(repr=False)


class TrainingStep(nn.Module):
    """A model with its loss as one forward pass, which is what is wrapped for several processes.

    Args:
        model: Teacher or student.
        loss: `ClassifierLoss` for a teacher, `TwoTeacherLoss` for a student.
    """

    def __init__(self, model: CICAM, loss: ClassifierLoss | TwoTeacherLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        labels: Int[Tensor, " batch"],
        flags: Int[Tensor, " batch"],
        cls_out: CICAMOutput | None = None,
        loc_out: CICAMOutput | None = None,
    ) -> tuple[dict[str, Tensor], CICAMOutput]:
        """Return the loss's terms and the model's output."""
        out = self.model(images)
        if isinstance(self.loss, TwoTeacherLoss):
            return self.loss(out, labels, flags, cls_out, loc_out, flag_shares(flags)), out
        return self.loss(self.model, out, images, labels), out


def loss_for(settings: Settings, teachers: Teachers | None = None) -> ClassifierLoss | TwoTeacherLoss:
    """The loss of a run. A student without any teacher learns from labels alone: the control."""
    if settings.role == "student":
        alone = teachers is None or (teachers.cls is None and teachers.loc is None)
        return TwoTeacherLoss(
            0.0 if alone else settings.alpha,
            settings.temperature_cls,
            settings.temperature_loc,
            settings.beta,
            settings.kl,  # type: ignore[arg-type] checked by Settings
            settings.t_squared,
        )
    plain = settings.role in ("nl-ccam", "cam")
    return ClassifierLoss(
        settings.auxiliary,  # type: ignore[arg-type]
        settings.eta,
        settings.area,
        settings.area_mode,  # type: ignore[arg-type]
        settings.threshold,
        both=not plain,
    )


def parameter_groups(model: CICAM, settings: Settings) -> list[dict[str, Any]]:
    """Adam's groups: classifier at the full rate, context convolution and backbone at `lr_ratio` of it."""
    parts = {"classifier": 1.0, "context_conv": settings.lr_ratio, "backbone": settings.lr_ratio}
    groups = []
    for name, ratio in parts.items():
        parameters = [p for p in getattr(model, name).parameters() if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "lr": settings.lr * ratio, "ratio": ratio})
    return groups


def steps_per_epoch(count: int, batch_size: int) -> int:
    """How many whole batches an epoch has."""
    if count == 0:
        raise InputError("there is no training image", field="data")
    return count // min(batch_size, count)


def train(
    model: CICAM,
    data: Dataset[Any],
    settings: Settings,
    *,
    teachers: Teachers | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
    validate: Callable[[CICAM], dict[str, float]] | None = None,
) -> Trained:
    """Train a model in place.

    Args:
        model: Where training starts.
        data: Keys (epoch, index) give image, label, flag, as `FlaggedImages` does.
        settings: The recipe.
        teachers: Of a student; moved to the device.
        folder: Where checkpoints go; None for none.
        resume: Go on from the folder's checkpoint, where there is one: on CPU to the same bits.
        device: ``cpu``; ``cuda:1`` and the like in a single process; else what accelerate finds.
        progress: Called after each step with the steps done and the loss.
        record: Called with each epoch's record; its losses are of the images of the first process.
        validate: Its numbers go into each epoch's record.

    Raises:
        TrainingDiverged: The loss or a parameter is not finite.
        InputError: The checkpoint is of another run.
    """
    devices = list(range(torch.cuda.device_count())) if device != "cpu" else []
    with torch.random.fork_rng(devices):
        run = _Run(model, data, settings, teachers, folder, device)
        if resume and folder is not None and (folder / CHECKPOINT).exists():
            run.restore(read_checkpoint(folder / CHECKPOINT), folder / CHECKPOINT)
        return run.go_on(progress, record, validate)


class _Run:
    def __init__(
        self,
        model: CICAM,
        data: Dataset[Any],
        settings: Settings,
        teachers: Teachers | None,
        folder: Path | None,
        device: str,
    ) -> None:
        with needs_extra("train", "kdcicam"):
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
        # Backbones may have parameters that their map does not need: those of a head.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        with accelerate_device(device):
            self.accelerator = Accelerator(
                mixed_precision=settings.mixed_precision, cpu=device == "cpu", kwargs_handlers=[unused]
            )
        self.data, self.settings, self.folder, self.model = data, settings, folder, model
        self.count = len(data)  # type: ignore[arg-type] it has a length
        self.each = steps_per_epoch(self.count, settings.batch_size)
        self.steps = settings.epochs * self.each
        optimizer = torch.optim.Adam(parameter_groups(model, settings), lr=settings.lr)
        step = TrainingStep(model, loss_for(settings, teachers))
        self.module, self.optimizer = self.accelerator.prepare(step, optimizer)
        self.teachers = None if teachers is None else teachers.to(self.accelerator.device)
        self.step, self.overflows = 0, 0
        self.history: list[dict[str, Any]] = []
        self.running: dict[str, float] = {}
        kept = {key: value for key, value in asdict(settings).items() if key not in _FREE}
        self.fingerprint = {
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()},
            "images": self.count,
            "model": {name: list(value.shape) for name, value in model.state_dict().items()},
        }

    def restore(self, kept: Checkpoint, file: Path) -> None:
        check_same_run(kept.fingerprint, self.fingerprint, file)
        self.model.load_state_dict(kept.model)
        restore_optimizer(self.optimizer.optimizer, kept.optimizer)
        if kept.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept.scaler)
        self.step, self.history, self.running = kept.step, list(kept.history), dict(kept.running)

    def go_on(self, progress: Any, record: Any, validate: Any) -> Trained:
        self.module.train()
        for batch in self._batches():
            epoch = self.step // self.each
            loss = self._train_step(batch.to(self.accelerator.device), epoch)
            if progress is not None:
                progress(self.step, loss)
            if self.step % self.each == 0:
                self._end_epoch(epoch, record, validate)
            if self.step % self.settings.checkpoint_every == 0 or self.step == self.steps:
                self._save()
        return Trained(self.model, self.history, self._checkpoint())

    def _batches(self) -> DataLoader[Batch]:
        keys = EpochBatches(
            self.count,
            self.settings.batch_size,
            self.step,
            self.steps,
            self.settings.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        # A generator of its own: the loader would draw from the global one.
        return DataLoader(
            self.data,
            batch_sampler=keys,  # type: ignore[arg-type] of keys
            collate_fn=collate,
            num_workers=self.settings.workers,
            generator=torch.Generator().manual_seed(0),
        )

    def _train_step(self, batch: Batch, epoch: int) -> float:
        rate = self.settings.learning_rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        # What a backbone draws (dropout) depends on the step alone, so a run that goes on draws the same.
        torch.manual_seed(derived_seed(self.settings.seed, self.step, self.accelerator.process_index, _STEP))
        given = (None, None)
        if self.teachers is not None:
            with self.accelerator.autocast():
                given = self.teachers(batch.images, batch.flags)
        terms, out = self.module(batch.images, batch.labels, batch.flags, *given)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(terms["loss"])
        right = self.model.update_pool(out, batch.labels)  # by the weights of this forward pass
        self.optimizer.step()
        values = {name: value.item() for name, value in terms.items()}
        self._check_finite(values["loss"])
        self.step += 1
        for name, value in {**values, "right": float(right), "seen": float(len(batch.labels))}.items():
            self.running[name] = self.running.get(name, 0.0) + value
            if name in values:
                self.running[f"n/{name}"] = self.running.get(f"n/{name}", 0.0) + 1
        return values["loss"]

    def _check_finite(self, loss: float) -> None:
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        self.overflows = self.overflows + 1 if skipped else 0
        if self.overflows > _PATIENCE or (not skipped and not math.isfinite(loss)):
            raise self._diverged(f"the loss is {loss} at step {self.step}")

    def _end_epoch(self, epoch: int, record: Any, validate: Any) -> None:
        sums, self.running = self.running, {}
        means = {name: value / sums[f"n/{name}"] for name, value in sums.items() if f"n/{name}" in sums}
        entry: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.settings.learning_rate(epoch),
            **means,
            "train_top1": sums["right"] / sums["seen"],
            "classes_in_pool": self.model.classes_in_pool,
            "skipped_updates": self.model.skipped_updates,
        }
        if self.model.context and entry["classes_in_pool"] == 0:
            entry["note"] = "no class was ever predicted right: the context pool is still empty"
        if validate is not None:
            self.model.eval()
            entry |= validate(self.model)
            self.module.train()
        self.history.append(entry)
        if record is not None and self.accelerator.is_main_process:
            record(entry)

    def _save(self) -> None:
        broken = [
            name
            for name, value in self.model.state_dict().items()
            if value.is_floating_point() and not bool(value.isfinite().all())
        ]
        if broken:
            raise self._diverged(f"after step {self.step} {broken[0]} is not finite")
        if self.folder is not None and self.accelerator.is_main_process:
            write_checkpoint(self.folder / CHECKPOINT, self._checkpoint())
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> Checkpoint:
        scaler = self.accelerator.scaler
        return Checkpoint(
            self.step,
            self.fingerprint,
            list(self.history),
            {name: value.detach().clone() for name, value in self.model.state_dict().items()},
            optimizer_tensors(self.optimizer.optimizer),
            dict(self.running),
            {} if scaler is None else scaler.state_dict(),
        )

    def _diverged(self, what: str) -> TrainingDiverged:
        kept = None if self.folder is None else self.folder / CHECKPOINT
        return TrainingDiverged.at(what, self.settings.lr, kept)
