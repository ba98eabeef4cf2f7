"""The proof's arms: what is trained how, and what is measured of each.

Every arm starts from the same weights and takes the same number of steps over the same folder of images, by
the loop that ``kdcicam train-teacher`` and ``train-student`` run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdcicam.backbones import LEAK
from kdcicam.baselines import BASELINES
from kdcicam.boxes import boxes_from_map
from kdcicam.checkpoints import load_model, save_model
from kdcicam.data import Images, load_images
from kdcicam.evaluation import evaluate
from kdcicam.images import for_evaluation, read_image
from kdcicam.losses import Teachers
from kdcicam.model import CICAM
from kdcicam.proof_scenes import CLASSES, CONTEXTS, SIZE, apart_root, masks_file
from kdcicam.runs import flagged
from kdcicam.settings import Role, Settings
from kdcicam.training import train
from shared_core.files import atomic_path
from shared_core.workers import WorkerPool

Array = np.ndarray
METRICS = ("top1_cls", "top1_loc", "gt_known", "max_box_acc_v2")
SLICES = ("together", "apart")
START = "start.safetensors"
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "lr": 2e-3,
    "lr_ratio": 1.0,
    "epochs": 4,
    "checkpoint_every": 10**6,
    # Mirrored digits are none, so nothing is mirrored.
    "augmentation": "crop:0.7,1",
    "augmentation_cls": "crop:0.7,1",
    "augmentation_loc": "crop:0.7,1",
}
START_SETTINGS = {"epochs": 4, "batch_size": 16, "lr": 3e-3}
CONTEXT_CLASSES = 200
"""The context convolution starts at the size that it has for so many classes, as in the paper."""
_BATCH = 50


@dataclass(frozen=True)
class Arm:
    """One way to train, and the maps that are read from what was trained."""

    role: Role
    maps: Mapping[str, str]
    """Name in the table -> kind of map."""
    backbone: str = "non_local"
    cls: str | None = None
    loc: str | None = None
    """Of a student: the arms that are its teachers."""
    flags: tuple[int, ...] = (0, 1, 2)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An arm with a seed: all that a process needs."""

    name: str
    arm: Arm
    seed: int
    data: Path
    models: Path
    settings: Mapping[str, Any]
    shown: tuple[int, ...]
    """Images of each slice whose maps are kept for the picture."""

    def folder(self, name: str | None = None) -> Path:
        """Where the model of this arm, or of another one with the same seed, is kept."""
        return self.models / f"{name or self.name}-{self.seed}"


@dataclass(frozen=True)
class Measured:
    """What one map of an arm scored with a seed."""

    method: str
    seed: int
    metrics: dict[str, float]
    fixed: dict[str, float]
    """GT-known of the boxes that need no map."""
    threshold: float
    maps: Array
    boxes: Array


def run_tasks(tasks: Sequence[Task], jobs: int, done: Callable[[], None]) -> list[Measured]:
    """Run tasks, in processes of one thread each; results are in the order of the tasks."""
    if jobs == 1:
        return [one for task in tasks for one in _counted(run_task(task), done)]
    with WorkerPool(jobs) as pool:
        futures = [pool.submit(run_task, task) for task in tasks]
        for future in as_completed(futures):
            future.result()
            done()
    return [one for future in futures for one in future.result()]


def _counted(result: list[Measured], done: Callable[[], None]) -> list[Measured]:
    done()
    return result


def run_task(task: Task) -> list[Measured]:
    """Train one arm with one seed, keep its model, and measure its maps on both slices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = train_arm(task)
        save_model(model, task.folder())
        return [measure(task, method, kind, model) for method, kind in task.arm.maps.items()]
    finally:
        torch.set_num_threads(threads)


def train_arm(task: Task) -> CICAM:
    """Train one arm from the common start."""
    arm = task.arm
    settings = Settings(
        arm.role,
        backbone=f"kdcicam.proof_net:{arm.backbone}",
        image_size=SIZE,
        flags=arm.flags,
        seed=task.seed,
        **{**COMMON, **arm.settings, **task.settings},
    )
    model = new_model(settings, task.models / START)
    data = flagged(settings, load_images(task.data, "train"), keep=True)
    cls, loc = (None if name is None else load_model(task.folder(name)) for name in (arm.cls, arm.loc))
    teachers = None if cls is None and loc is None else Teachers(cls, loc, model)
    return train(model, data, settings, teachers=teachers).model.eval()


def new_model(settings: Settings, start: Path) -> CICAM:
    """The model of an arm before training: the start's backbone, and the rest by the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        model = CICAM(
            settings.backbone,
            CLASSES,
            image_size=SIZE,
            update_rate=settings.update_rate,
            combine=settings.combine,  # type: ignore[arg-type] checked by Settings
            context=settings.role not in ("nl-ccam", "cam"),
        )
    # PyTorch draws within 1/sqrt(classes): with ten classes the context would begin as a loud noise.
    for parameter in model.context_conv.parameters():
        nn.init.uniform_(
            parameter,
            -(CONTEXT_CLASSES**-0.5),
            CONTEXT_CLASSES**-0.5,
            torch.Generator().manual_seed(settings.seed),
        )
    model.backbone.load_state_dict(load_file(start), strict=False)  # a non-local block begins as identity
    return model


def make_start(
    data: Any, models: Path, settings: Mapping[str, Any], progress: Callable[[int, float], None]
) -> float:
    """Train the common start to name digits and contexts, each alone; keep its backbone, return its top-1.

    On one thread, as the arms: with more, sums round otherwise, and so would everything that starts here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _make_start(data, models, settings, progress)
    finally:
        torch.set_num_threads(threads)


def _make_start(
    data: Any, models: Path, settings: Mapping[str, Any], progress: Callable[[int, float], None]
) -> float:
    asked = Settings("nl-ccam", backbone="kdcicam.proof_net:plain", image_size=SIZE, **{**COMMON, **settings})
    with torch.random.fork_rng([]):
        torch.manual_seed(asked.seed)
        model = CICAM(asked.backbone, CLASSES + len(CONTEXTS), image_size=SIZE, context=False)
        for layer in model.backbone.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, LEAK)
    trained = train(model, data, asked, progress=progress)
    models.mkdir(parents=True, exist_ok=True)
    with atomic_path(models / START) as temporary:
        save_file(trained.model.backbone.state_dict(), temporary)
    return float(trained.history[-1]["train_top1"])


def measure(task: Task, method: str, kind: str, model: CICAM) -> Measured:
    """Scores on both slices, at the threshold that validation images choose; where the maps are bright."""
    held = load_images(task.data, "val")
    metrics, threshold = validation_scores(model, kind, held)
    metrics["entanglement validation"] = _entanglement(model, kind, held, task.data)
    fixed = dict[str, float]()
    kept_maps, kept_boxes = [], []
    for part in SLICES:
        root = task.data if part == "together" else apart_root(task.data)
        images = load_images(root, "test")
        scores = evaluate(model, images, threshold=threshold, methods=(kind,), batch_size=_BATCH)[kind].scores
        metrics |= {f"{key} {part}": scores[key] for key in METRICS}
        fixed |= {f"{key} {part}": scores[key]["gt_known"] for key in ("whole_crop", "center_box")}
        metrics[f"entanglement {part}"] = _entanglement(model, kind, images, root)
        maps = maps_of(model, kind, images.take(list(task.shown)))
        kept_maps += list(maps)
        kept_boxes += [boxes_from_map(one, threshold).box for one in maps]
    return Measured(method, task.seed, metrics, fixed, threshold, np.array(kept_maps), np.array(kept_boxes))


def validation_scores(model: CICAM, kind: str, held: Images) -> tuple[dict[str, float], float]:
    """Scores on validation images, and the threshold of highest GT-known that they are at."""
    scores = evaluate(model, held, threshold="oracle", methods=(kind,), batch_size=_BATCH, contours=False)[
        kind
    ].scores
    return {f"{key} validation": scores[key] for key in METRICS[:3]}, scores["threshold"]


def _entanglement(model: CICAM, kind: str, images: Images, root: Path) -> float:
    maps = maps_of(model, kind, images)
    return entanglement(maps, np.load(masks_file(root, images.split)), np.concatenate(images.boxes))


def maps_of(model: CICAM, kind: str, images: Images) -> Array:
    """The maps of a slice at the images' size."""
    made = []
    for start in range(0, len(images), _BATCH):
        files = images.files[start : start + _BATCH]
        batch = torch.stack([for_evaluation(read_image(f), np.empty((0, 4)), "full", SIZE)[0] for f in files])
        with torch.no_grad():
            made.append(BASELINES[kind](model, model(batch), batch, None)[0].numpy())
    return np.concatenate(made)


def entanglement(maps: Array, masks: Array, boxes: Array) -> float:
    """How bright maps are on the context, over how bright they are on the object's other side.

    Maps fall off around an object, and the context lies beside it: so each pixel of the context outside the
    box is set against its reflection through the box's centre, where that is in the image. 1 is none.

    Args:
        maps: Each is taken as a share of its maximum, [images, height, width].
        masks: Where the context shows.
        boxes: The objects', xyxy [images, 4], whole numbers.
    """
    sums = np.zeros(2)
    height, width = maps.shape[1:]
    for values, mask, (x0, y0, x1, y1) in zip(maps, masks, boxes.astype(int), strict=True):
        ys, xs = np.nonzero(mask)
        other_ys, other_xs = y0 + y1 - 1 - ys, x0 + x1 - 1 - xs
        counted = (other_ys >= 0) & (other_ys < height) & (other_xs >= 0) & (other_xs < width)
        counted &= (ys < y0) | (ys >= y1) | (xs < x0) | (xs >= x1)
        if counted.any() and values.max() > 0:
            here, there = values[ys[counted], xs[counted]], values[other_ys[counted], other_xs[counted]]
            sums += np.array([here.mean(), there.mean()]) / values.max()
    return float(sums[0] / max(sums[1], 1e-9))
