"""The runs of the proof: one small CondInst, trained in each way on the same scenes, seeds and steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity
from asymaffinity.condinst import DynamicMasks
from asymaffinity.edges import EdgeBits, edge_statistics
from asymaffinity.functional import BOXINST, Rule, dice_loss
from asymaffinity.grid import box_cells, cell_masks
from asymaffinity.losses import BoxSupLoss
from asymaffinity.metrics import given_box_ap, mask_health, mask_iou
from asymaffinity.scenes import Materials, Scenes, make_scenes
from shared_core.workers import one_thread

STRIDE = 2
STEPS, BATCH, RATE = 200, 8, 4e-3
WARMUP = 60
TRAIN_SCENES, TEST_SCENES = 400, 60
LOOKS = 10
"""How often, over a run, the test masks are looked at."""
COLOR = ColorAffinity(stride=STRIDE)
DEPTH = DepthGradAffinity(stride=STRIDE)
RULES = {
    "symmetric": BOXINST,
    "asymmetric": Rule("asymmetric", "known"),
    "symmetric, known outside": Rule("symmetric", "known"),
    "asymmetric, predicted outside": Rule("asymmetric", "predicted"),
}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: Of the method.
        form: One of `RULES`, ``projection`` or ``masks`` (full supervision).
        weights: Of the affinities, by name.
        seed: Of scenes, weights and order.
        warmup: Steps of the affinity's warm-up.
        steps: Of training.
    """

    name: str
    form: str
    weights: tuple[tuple[str, float], ...]
    seed: int
    warmup: int = WARMUP
    steps: int = STEPS


@dataclass(frozen=True)
class Outcome:
    """What a run gave, on test scenes."""

    run: Run
    iou: float
    ap: float
    fill: float
    full: float
    empty: float
    trivial: float
    curve: list[dict[str, float]]
    seconds: float
    """Of one core."""
    masks: np.ndarray
    """Of the objects of the first test scenes, [n, 32, 32], for the picture."""


class SmallCondInst(nn.Module):
    """Mask features at half size, and weights of dynamic convolutions from each given box."""

    def __init__(self, width: int = 16, deep: int = 32, channels: int = 8) -> None:
        super().__init__()
        self.masks = DynamicMasks(channels, 8, 3)

        def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(4, o), nn.ReLU())

        self.fine = nn.Sequential(conv(3, width, 2), conv(width, width))
        self.coarse = nn.Sequential(conv(width, deep, 2), conv(deep, deep), conv(deep, deep))
        self.merge = nn.Sequential(conv(width + deep, width), nn.Conv2d(width, channels, 1))
        self.generate = nn.Sequential(
            nn.Linear(9 * deep, 64), nn.ReLU(), nn.Linear(64, self.masks.parameter_count)
        )

    def forward(self, images: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
        """Logits [objects, 32, 32]."""
        fine = self.fine(images - 0.5)
        coarse = self.coarse(fine)
        wide = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        features = self.merge(torch.cat([fine, wide], 1))
        places = torch.cat([owner[:, None].to(boxes.dtype), boxes], 1)
        pooled = roi_align(coarse, places, 3, 1 / (2 * STRIDE), aligned=True).flatten(1)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sizes = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        return self.masks(features, self.generate(pooled), centres, sizes, owner, STRIDE)


@dataclass(frozen=True)
class Prepared:
    """Scenes with their edges, boxes and masks on the grid."""

    scenes: Scenes
    edges: dict[str, EdgeBits]
    boxes: Tensor
    masks: Tensor


def prepare(scenes: Scenes) -> Prepared:
    """Edges once for all runs, true masks on the grid for judging and for the ceiling."""
    grid = (scenes.images.shape[2] // STRIDE, scenes.images.shape[3] // STRIDE)
    cells, _ = box_cells(scenes.boxes, grid, STRIDE)
    masks = F.avg_pool2d(scenes.masks[:, None].float(), STRIDE)[:, 0] >= 0.5
    edges = {"color": COLOR(scenes.images), "depthgrad": DEPTH(scenes.disparity)}
    return Prepared(scenes, edges, cell_masks(cells, grid), masks)


_cache: dict[int, tuple[Prepared, Prepared]] = {}


def prepared(seed: int) -> tuple[Prepared, Prepared]:
    """Training and test scenes of a seed."""
    if seed not in _cache:
        materials = Materials()
        train, test = (
            prepare(make_scenes(materials, split, count, seed))
            for split, count in (("train", TRAIN_SCENES), ("test", TEST_SCENES))
        )
        _cache.clear()
        _cache[seed] = (train, test)
    return _cache[seed]


def execute(run: Run) -> Outcome:
    """Train and judge."""
    torch.set_num_threads(1)
    train, test = prepared(run.seed)
    started = time.process_time()
    torch.manual_seed(run.seed)
    model = SmallCondInst()
    affinities: dict[str, Any] = {
        name: (COLOR if name == "color" else DEPTH, weight) for name, weight in run.weights
    }
    criterion = BoxSupLoss(affinities, RULES.get(run.form), warmup=run.warmup, stride=STRIDE)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, run.steps)
    draw = torch.Generator().manual_seed(run.seed)
    curve = []
    members = [torch.where(train.scenes.owner == n)[0] for n in range(len(train.scenes.images))]
    for step in range(run.steps):
        chosen = torch.randperm(len(members), generator=draw)[:BATCH]
        objects = torch.cat([members[n] for n in chosen.tolist()])
        owner = torch.cat([torch.full((len(members[n]),), k) for k, n in enumerate(chosen.tolist())])
        boxes = train.scenes.boxes[objects]
        logits = model(train.scenes.images[chosen], boxes, owner)
        if run.form == "masks":
            loss = dice_loss(logits, train.masks[objects].float())
        else:
            edges = {
                name: EdgeBits(train.edges[name].bits[chosen], train.edges[name].kernel)
                for name, _ in run.weights
            }
            loss = torch.stack(list(criterion(logits, boxes, owner, edges, step).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (run.steps // LOOKS) == 0:
            found = judge(model, test)
            curve.append(
                {"step": step + 1, **{k: found[k] for k in ("iou", "fill", "trivial", "full", "empty")}}
            )
    found = judge(model, test)
    return Outcome(
        run, found["iou"], found["ap"], found["fill"], found["full"], found["empty"], found["trivial"], curve,
        time.process_time() - started, found["masks"],
    )  # fmt: skip


@torch.no_grad()
def judge(model: nn.Module, test: Prepared) -> dict[str, Any]:
    """Masks of the test scenes in their given boxes, beside the true ones."""
    logits = model(test.scenes.images, test.scenes.boxes, test.scenes.owner)
    return scores(logits > 0, test)


def scores(masks: Tensor, test: Prepared) -> dict[str, Any]:
    """IoU, AP with given boxes, and health of masks."""
    ious, health = mask_iou(masks, test.masks), mask_health(masks, test.boxes)
    first = test.scenes.owner < 6
    return {
        "iou": float(ious.mean()), "ap": given_box_ap(ious), "fill": health.fill, "full": health.full,
        "empty": health.empty, "trivial": health.trivial, "masks": masks[first].numpy(),
    }  # fmt: skip


def grabcut(test: Prepared) -> Tensor:
    """Masks by GrabCut in each box, without any training: five iterations from the box."""
    found = []
    cv2.setRNGSeed(0)
    for box, owner in zip(test.scenes.boxes.long().tolist(), test.scenes.owner.tolist(), strict=True):
        image = (test.scenes.images[owner].permute(1, 2, 0).numpy()[..., ::-1] * 255).astype(np.uint8)
        mask = np.zeros(image.shape[:2], np.uint8)
        x0, y0, x1, y1 = box
        models = np.zeros((1, 65)), np.zeros((1, 65))
        rectangle = (
            x0,
            y0,
            max(1, min(x1 - x0, image.shape[1] - x0 - 1)),
            max(1, min(y1 - y0, image.shape[0] - y0 - 1)),
        )
        cv2.grabCut(np.ascontiguousarray(image), mask, rectangle, *models, 5, cv2.GC_INIT_WITH_RECT)
        found.append(torch.from_numpy((mask & 1).astype(np.float32)))
    return F.avg_pool2d(torch.stack(found)[:, None], STRIDE)[:, 0] >= 0.5


def references(seed: int) -> dict[str, dict[str, Any]]:
    """What needs no training: the box as the mask, GrabCut, and the truth's own fill; edges' quality."""
    train, test = prepared(seed)
    labels = torch.zeros(len(train.scenes.images), *train.masks.shape[1:], dtype=torch.long)
    for n, (mask, owner) in enumerate(zip(train.masks, train.scenes.owner.tolist(), strict=True)):
        labels[owner][mask] = n + 1
    return {
        "box": scores(test.boxes, test),
        "grabcut": scores(grabcut(test), test),
        "truth": scores(test.masks, test),
        **{f"edges {name}": edge_statistics(edges, labels) for name, edges in train.edges.items()},
    }


def execute_all(
    runs: Sequence[Run], workers: int | None = None, progress: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Execute runs in processes of their own, one thread each; in the order given."""
    count = workers or min(2, os.cpu_count() or 1)
    found: dict[Run, Outcome] = {}

    def note(outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            found[outcome.run] = outcome
            if progress is not None:
                progress(outcome)

    if count == 1:
        note(map(execute, runs))
    else:
        with ProcessPoolExecutor(count, get_context("spawn"), one_thread) as pool:
            note(future.result() for future in as_completed([pool.submit(execute, run) for run in runs]))
    return [found[run] for run in runs]
