"""The proof's arms: what is trained how, and what is measured of each.

Every arm starts from the same weights and takes the same number of steps over the same folder of images, by
the loop that ``kdcicam train-teacher`` and ``train-student`` run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcicam.baselines import BASELINES
from kdcicam.boxes import boxes_from_map
from kdcicam.checkpoints import load_model, read_tensors, save_model
from kdcicam.data import Images, load_images
from kdcicam.evaluation import evaluate
from kdcicam.flagged import FlaggedImages
from kdcicam.images import Augmentation, for_evaluation, read_image
from kdcicam.losses import Teachers
from kdcicam.model import CICAM
from kdcicam.proof_scenes import CLASSES, MASKS, SIZE, apart_root
from kdcicam.settings import Role, Settings
from kdcicam.training import train
from shared_core.files import atomic_path
from shared_core.workers import one_thread

Array = np.ndarray
METRICS = ("top1_cls", "top1_loc", "gt_known", "max_box_acc_v2")
SLICES = ("together", "apart")
START = "start.safetensors"
CROPS = ("crop:0.7,1", "crop:0.7,1", "crop:0.7,1")
"""For flags 0, 1 and 2. Mirrored digits are none, so nothing is mirrored."""
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "lr": 3e-3,
    "lr_ratio": 1.0,
    "epochs": 5,
    "checkpoint_every": 10**6,
}
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
    with ProcessPoolExecutor(jobs, get_context("spawn"), one_thread) as pool:
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
    flags = arm.flags if arm.role == "student" else (0,)
    crops = {flag: Augmentation.parse(text) for flag, text in enumerate(CROPS)}
    data = FlaggedImages(load_images(task.data, "train"), SIZE, crops, flags, task.seed, keep=True)
    cls, loc = (None if name is None else load_model(task.folder(name)) for name in (arm.cls, arm.loc))
    teachers = None if cls is None and loc is None else Teachers(cls, loc, model)
    return train(model, data, settings, teachers=teachers).model.eval()


def new_model(settings: Settings, start: Path | None = None) -> CICAM:
    """The model of an arm before training: the start, and by the seed what the start does not hold."""
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
    if start is not None:
        known = model.state_dict()
        model.load_state_dict({k: v for k, v in read_tensors(start).items() if k in known}, strict=False)
    return model


def make_start(
    data: Any, models: Path, settings: Mapping[str, Any], progress: Callable[[int, float], None]
) -> float:
    """Train the common start on objects without contexts, and return its top-1 in training."""
    from safetensors.torch import save_file

    asked = Settings("nl-ccam", backbone="kdcicam.proof_net:plain", image_size=SIZE, **{**COMMON, **settings})
    trained = train(new_model(asked), data, asked, progress=progress)
    kept = {
        name: value.contiguous()
        for name, value in trained.model.state_dict().items()
        if name.startswith(("backbone.", "classifier."))
    }
    models.mkdir(parents=True, exist_ok=True)
    with atomic_path(models / START) as temporary:
        save_file(kept, temporary)
    return float(trained.history[-1]["train_top1"])


def measure(task: Task, method: str, kind: str, model: CICAM) -> Measured:
    """Scores on both slices, at the threshold that validation images choose; where the map's mass lies."""
    held = load_images(task.data, "val")
    threshold: Any = "validation"
    metrics, fixed = dict[str, float](), dict[str, float]()
    kept_maps, kept_boxes = [], []
    for part in SLICES:
        root = task.data if part == "together" else apart_root(task.data)
        images = load_images(root, "test")
        scores = evaluate(model, images, held, threshold=threshold, methods=(kind,), batch_size=_BATCH)[
            kind
        ].scores
        threshold = scores["threshold"]
        metrics |= {f"{key} {part}": scores[key] for key in METRICS}
        fixed |= {f"{key} {part}": scores[key]["gt_known"] for key in ("whole_crop", "center_box")}
        maps = maps_of(model, kind, images)
        metrics[f"context_share {part}"] = mass_share(maps, np.load(root / MASKS))
        for index in task.shown:
            kept_maps.append(maps[index])
            kept_boxes.append(boxes_from_map(maps[index], threshold).box)
    known = evaluate(model, held, threshold=threshold, methods=(kind,), batch_size=_BATCH, contours=False)[
        kind
    ].scores
    metrics |= {f"{key} validation": known[key] for key in ("top1_cls", "gt_known")}
    return Measured(method, task.seed, metrics, fixed, threshold, np.array(kept_maps), np.array(kept_boxes))


def maps_of(model: CICAM, kind: str, images: Images) -> Array:
    """The maps of a slice at the images' size."""
    made = []
    for start in range(0, len(images), _BATCH):
        files = images.files[start : start + _BATCH]
        batch = torch.stack([for_evaluation(read_image(f), np.empty((0, 4)), "full", SIZE)[0] for f in files])
        with torch.no_grad():
            made.append(BASELINES[kind](model, model(batch), batch)[0].numpy())
    return np.concatenate(made)


def mass_share(maps: Array, masks: Array) -> float:
    """How much of a map's mass lies on the context, on average over the images."""
    total = maps.sum((1, 2)).clip(1e-9)
    return float(((maps * masks).sum((1, 2)) / total).mean())
