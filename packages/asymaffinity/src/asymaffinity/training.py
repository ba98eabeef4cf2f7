"""The training loop, through accelerate: several processes, mixed precision, resumed to the last bit."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity
from asymaffinity.checkpoints import (
    CHECKPOINT,
    Checkpoint,
    read_checkpoint,
    save_model,
    write_checkpoint,
)
from asymaffinity.datasets import BoxImages, cityscapes_boxes, coco_boxes, collate
from asymaffinity.functional import Rule
from asymaffinity.losses import Affinity, BoxSupLoss
from asymaffinity.metrics import MaskHealth
from asymaffinity.models import build_backbone, build_detector, load_backbone
from asymaffinity.settings import FREE, Settings, plain
from shared_core import InputError
from shared_core.checkpoints import check_same_run, optimizer_tensors, read_tensors, restore_optimizer
from shared_core.command import accelerate_device
from shared_core.errors import TrainingDiverged, needs_extra
from shared_core.files import write_text

LOG, BOARD = "log.jsonl", "tensorboard"
_EMPTY_SHARE, _EMPTY_LOGS = 0.95, 25
"""Masks are said to have vanished when so many were empty in so many logged steps in a row, after the
warm-up."""
_PATIENCE = 50
"""Steps in a row that may be left out for an overflow under float16 before the run is given up."""


@dataclass(frozen=True)
class Trained:
    """What a run gave."""

    model: nn.Module
    history: list[dict[str, Any]]
    """A record every `log_every` steps: the losses' means and how the masks sat in their boxes."""
    checkpoint: Checkpoint = field(repr=False)


def build_criterion(settings: Settings) -> BoxSupLoss:
    """The loss that the settings describe."""
    both = settings.affinity in ("both", "and", "or")
    window: dict[str, Any] = {"kernel": settings.kernel, "dilation": settings.dilation}
    default = 0.5 if both else 1.0
    color, depth = (
        default if weight is None else weight for weight in (settings.color_weight, settings.depth_weight)
    )
    affinities: dict[str, tuple[Affinity, float]] = {}
    if both or settings.affinity == "color":
        affinities["color"] = (ColorAffinity(settings.color_theta, settings.color_thresh, **window), color)
    if both or settings.affinity == "depthgrad":
        affinity = DepthGradAffinity(
            settings.depth_theta,
            settings.depth_thresh,
            settings.depth_field,
            settings.depth_normalize,
            **window,
        )
        affinities["depthgrad"] = (affinity, depth)
    outside = "predicted" if settings.form == "symmetric" else settings.outside
    join = settings.affinity if settings.affinity in ("and", "or") else None
    return BoxSupLoss(
        affinities,
        Rule(settings.form, outside),
        warmup=settings.affinity_warmup,
        join=join,
        supervision=settings.supervision,
    )


def build_model(settings: Settings, classes: int) -> nn.Module:
    """The detector before training, by the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        backbone = build_backbone(settings.backbone, settings.head, settings.norm, settings.trainable_layers)
        return build_detector(
            settings.head,
            backbone,
            classes + 1,
            build_criterion(settings),
            bottom=settings.bottom,
            min_size=list(settings.min_size),
            max_size=settings.max_size,
        )


def load_data(settings: Settings, *, training: bool = True) -> BoxImages:
    """The images that the settings name: a COCO file, or the folder of Cityscapes."""
    path = Path(settings.data)
    depth = settings.wants_depth and training
    mixed = training and settings.supervision == "mixed"
    if path.is_dir():
        if mixed:
            raise InputError("expected a COCO file for mixed supervision", field="data", value=settings.data)
        return cityscapes_boxes(
            path,
            "train" if training else "val",
            depth=depth,
            field=settings.depth_field,
            flip=settings.flip and training,
            seed=settings.seed,
            keep_empty=not training,
        )
    if depth and settings.depth is None:
        raise InputError(
            f"affinity {settings.affinity} needs depth maps: --depth FOLDER, or --affinity color",
            field="depth",
        )
    return coco_boxes(
        path,
        path.parent if settings.images is None else Path(settings.images),
        depth=Path(settings.depth) if depth and settings.depth is not None else None,
        depth_kind=settings.depth_kind,
        field=settings.depth_field,
        flip=settings.flip and training,
        seed=settings.seed,
        keep_empty=not training,
        masks=mixed,
    )


class Batches(Sampler[list[tuple[int, int]]]):
    """Keys (epoch, index) of each step's batch: permutations by seed and epoch, from any step on.

    Args:
        count: Images.
        batch_size: Of all processes together.
        first: Step to begin at.
        last: Step to end before.
        seed: Of the permutations.
        rank: This process.
        world: Processes.
    """

    def __init__(
        self, count: int, batch_size: int, first: int, last: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise InputError(
                f"expected a multiple of the {world} processes", field="batch_size", value=batch_size
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            start = step * self.batch_size
            keys = [self._key(place) for place in range(start, start + self.batch_size)]
            yield keys[self.rank :: self.world]

    def _key(self, place: int) -> tuple[int, int]:
        epoch = place // self.count
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator).tolist()
        return epoch, self._order[place % self.count]


def train(
    model: nn.Module,
    data: BoxImages,
    settings: Settings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a detector in place.

    Args:
        model: A detector of `build_model`, or one of yours with a `criterion` (or `roi_heads.criterion`).
        data: Images and boxes.
        settings: The recipe.
        folder: Where checkpoints, log and TensorBoard's events go; None for none.
        resume: Go on from the folder's checkpoint, where there is one: on CPU to the same bits.
        device: ``cpu``, or else what accelerate finds.
        progress: Called after each step with the steps done and the loss.

    Raises:
        TrainingDiverged: The loss is not finite.
        InputError: The checkpoint is of another run.
    """
    devices = list(range(torch.cuda.device_count())) if device != "cpu" else []
    with torch.random.fork_rng(devices):
        run = _Run(model, data, settings, folder, device)
        if resume and folder is not None and (folder / CHECKPOINT).exists():
            run.restore(read_checkpoint(folder / CHECKPOINT), folder / CHECKPOINT)
        elif settings.weights is not None:
            load_backbone(model.backbone, read_tensors(Path(settings.weights)), settings.weights)  # type: ignore[arg-type]
        trained = run.go_on(progress)
    if folder is not None and run.accelerator.is_main_process:
        save_model(model, folder, settings, data.classes, data.category_ids)
    return trained


def mask_health_of(model: nn.Module) -> MaskHealth:
    """How the masks of the last batch sat in their boxes."""
    owner = model if hasattr(model, "health") else model.roi_heads
    return owner.health  # type: ignore[union-attr, return-value]


class _Run:
    def __init__(
        self, model: nn.Module, data: BoxImages, settings: Settings, folder: Path | None, device: str
    ) -> None:
        with needs_extra("train", "asymaffinity"):
            from accelerate import Accelerator, DistributedDataParallelKwargs
        # A batch without a positive of some class leaves parameters out.
        spare = DistributedDataParallelKwargs(find_unused_parameters=True)
        with accelerate_device(device):
            self.accelerator = Accelerator(
                mixed_precision=settings.mixed_precision, cpu=device == "cpu", kwargs_handlers=[spare]
            )
        self.model, self.data, self.settings, self.folder = model, data, settings, folder
        parameters = [p for p in model.parameters() if p.requires_grad]
        if settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                parameters, settings.lr, momentum=0.9, weight_decay=settings.weight_decay
            )
        self.module, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step, self.overflows, self.empty = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.running: list[dict[str, float]] = []
        self.board: Any = None
        self.fingerprint = {
            "settings": {k: v for k, v in plain(settings).items() if k not in FREE},
            "images": len(data),
            "classes": list(data.classes),
        }

    def restore(self, kept: Checkpoint, file: Path) -> None:
        check_same_run(kept.fingerprint, self.fingerprint, file)
        self.model.load_state_dict(kept.model)
        restore_optimizer(self.optimizer.optimizer, kept.optimizer)
        if kept.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept.scaler)
        self.step, self.history = kept.step, list(kept.history)

    def go_on(self, progress: Callable[[int, float], None] | None) -> Trained:
        self._open_log()
        self.module.train()
        for images, targets in self._loader():
            place = self.accelerator.device
            loss = self._train_step(
                [image.to(place) for image in images],
                [{k: v.to(place) for k, v in target.items()} for target in targets],
            )
            if progress is not None:
                progress(self.step, loss)
            done = self.step == self.settings.steps
            if self.step % self.settings.log_every == 0 or done:
                self._log()
            if self.step % self.settings.checkpoint_every == 0 or done:
                self._save()
        if self.board is not None:
            self.board.close()
        return Trained(self.model, self.history, self._checkpoint())

    def _loader(self) -> DataLoader[Any]:
        s, accelerator = self.settings, self.accelerator
        keys = Batches(
            len(self.data), s.batch_size, self.step, s.steps, s.seed,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        # A generator of its own: the loader would draw from the global one.
        return DataLoader(
            self.data,
            batch_sampler=keys,  # type: ignore[arg-type] of keys
            collate_fn=collate,
            num_workers=s.workers,
            generator=torch.Generator().manual_seed(0),
        )

    def _train_step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
        rate = self.settings.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # What detectors draw (sizes, samples) depends on the step alone: a run that goes on draws the same.
        torch.manual_seed(1_000_003 * self.settings.seed + 7919 * self.step + self.accelerator.process_index)
        losses = self.module(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        losses, total = {name: value.detach() for name, value in losses.items()}, total.detach()
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        self.optimizer.step()
        self._check_finite(float(total))
        self.step += 1
        health = mask_health_of(self.model)
        record = {name: float(value) for name, value in losses.items()} | {"loss": float(total)}
        self.running.append(record | health.scalars() if health.instances else record)
        return float(total)

    def _check_finite(self, loss: float) -> None:
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        self.overflows = self.overflows + 1 if skipped else 0
        if self.overflows > _PATIENCE or (not skipped and not math.isfinite(loss)):
            kept = None if self.folder is None else self.folder / CHECKPOINT
            raise TrainingDiverged.at(f"the loss is {loss} at step {self.step}", self.settings.lr, kept)

    def _open_log(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        with needs_extra("train", "asymaffinity"):
            from torch.utils.tensorboard.writer import SummaryWriter
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / LOG, "".join(json.dumps(entry) + "\n" for entry in self.history))
        self.board = SummaryWriter(os.fspath(self.folder / BOARD), purge_step=self.step + 1)

    def _log(self) -> None:
        names = {name for record in self.running for name in record}
        means = {
            name: sum(values) / len(values)
            for name in sorted(names)
            if (values := [record[name] for record in self.running if name in record])
        }
        self.running = []
        entry = {"step": self.step, "lr": self.settings.learning_rate(self.step - 1), **means}
        self.history.append(entry)
        self._look_for_vanished(entry)
        if self.board is None or self.folder is None:
            return
        for name, value in entry.items():
            if name != "step":
                self.board.add_scalar(
                    name if "/" in name or name == "lr" else f"loss/{name}", value, self.step
                )
        self.board.flush()
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _look_for_vanished(self, entry: dict[str, Any]) -> None:
        vanished = entry.get("masks/empty", 0.0) > _EMPTY_SHARE and self.step > self.settings.affinity_warmup
        self.empty = self.empty + 1 if vanished else 0
        if self.empty == _EMPTY_LOGS:
            warnings.warn(
                f"nearly all masks have been empty for {_EMPTY_LOGS * self.settings.log_every} steps: "
                "lengthen the warm-up of the affinity (warmup) or lower its weight",
                UserWarning,
                stacklevel=2,
            )

    def _save(self) -> None:
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
            {} if scaler is None else scaler.state_dict(),
        )
