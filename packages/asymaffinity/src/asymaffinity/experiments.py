"""The runs of the proof: one small mask head, trained in each way on the same scenes, seeds and steps.

Every way has its own weight, warm-up and thresholds, chosen on validation scenes of other seeds by
`benchmarks/choose_settings.py`, from the same values for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity
from asymaffinity.baselines import mil_loss
from asymaffinity.edges import EdgeBits, edge_statistics
from asymaffinity.functional import BOXINST, Rule, dice_loss
from asymaffinity.grid import box_cells, cell_masks
from asymaffinity.losses import Affinity, BoxSupLoss
from asymaffinity.mask_rcnn import paste
from asymaffinity.metrics import given_box_ap, mask_health, mask_iou
from asymaffinity.scenes import Materials, Scenes, make_scenes
from shared_core.workers import WorkerPool

STRIDE = 2
STEPS, BATCH, RATE = 500, 4, 4e-3
TRAIN_SCENES, TEST_SCENES = 400, 100
LOOKS = 10
"""How often, over a run, the scenes to judge are looked at."""
THRESHOLDS = {
    "color": {"loose": 0.1, "usual": 0.3, "tight": 0.5},
    "depthgrad": {"loose": 0.3, "usual": 0.5, "tight": 0.7},
}
RULES = {
    "symmetric": BOXINST,
    "asymmetric": Rule("asymmetric", "known"),
    "symmetric, known outside": Rule("symmetric", "known"),
    "asymmetric, predicted outside": Rule("asymmetric", "predicted"),
}


@dataclass(frozen=True)
class Way:
    """A way to train the masks.

    Attributes:
        form: One of `RULES`, ``projection``, ``mil``, or ``masks`` (full supervision).
        terms: Of the affinity: modality, weight, and ``loose``, ``usual`` or ``tight`` of `THRESHOLDS`.
        warmup: Steps of their warm-up.
    """

    form: str
    terms: tuple[tuple[str, float, str], ...] = ()
    warmup: int = 50

    def beside(self, other: Way) -> Way:
        """Both ways' terms at half of their weights, and the longer warm-up."""
        terms = tuple((name, weight / 2, edges) for name, weight, edges in self.terms + other.terms)
        return Way(self.form, terms, max(self.warmup, other.warmup))


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: Of the method.
        way: How its masks are trained.
        seed: Of scenes, weights and order.
        steps: Of training.
        split: Whose scenes judge it.
    """

    name: str
    way: Way
    seed: int
    steps: int = STEPS
    split: str = "test"


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


class SmallMaskHead(nn.Module):
    """Mask R-CNN's mask branch in small: features of each given box, enlarged, to logits in the image's grid.

    Of the heads that were tried (a small CondInst among them) the one whose fully supervised masks were best
    on validation scenes in the same time.
    """

    side = 16

    def __init__(self, width: int = 12, deep: int = 24, head: int = 16) -> None:
        super().__init__()

        def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(4, o), nn.ReLU())

        self.fine = nn.Sequential(conv(3, width, 2), conv(width, width))
        self.coarse = nn.Sequential(conv(width, deep, 2), conv(deep, deep), conv(deep, deep))
        self.merge = nn.Conv2d(width + deep, head, 1)
        self.mask = nn.Sequential(
            conv(head + 2, head), conv(head, head), conv(head, head), nn.Conv2d(head, 1, 1)
        )
        along = torch.linspace(-1, 1, self.side)
        self.register_buffer("places", torch.stack(torch.meshgrid(along, along, indexing="ij")))

    places: Tensor

    def forward(self, images: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
        """Logits [objects, 32, 32]."""
        fine = self.fine(images - 0.5)
        wide = F.interpolate(self.coarse(fine), scale_factor=2, mode="bilinear", align_corners=False)
        features = self.merge(torch.cat([fine, wide], 1))
        margin = (boxes[:, 2:] - boxes[:, :2]) / 8
        regions = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
        places = torch.cat([owner[:, None].to(boxes.dtype), regions], 1)
        pooled = roi_align(features, places, self.side, 1 / STRIDE, 1, aligned=True)
        logits = self.mask(torch.cat([pooled, self.places.expand(len(pooled), -1, -1, -1)], 1))[:, 0]
        grid = (images.shape[2] // STRIDE, images.shape[3] // STRIDE)
        return paste(logits, regions, grid, STRIDE, beyond=-6.0)


@dataclass(frozen=True)
class Prepared:
    """Scenes with their boxes and masks on the grid, and edges at any threshold, each made once."""

    scenes: Scenes
    boxes: Tensor
    masks: Tensor
    _edges: dict[tuple[str, str], EdgeBits] = field(default_factory=dict)

    def edges(self, modality: str, which: str = "usual") -> EdgeBits:
        """Edges of all scenes."""
        if (modality, which) not in self._edges:
            source = self.scenes.images if modality == "color" else self.scenes.disparity
            self._edges[modality, which] = affinity(modality, which)(source)
        return self._edges[modality, which]


def affinity(modality: str, which: str = "usual") -> Affinity:
    """The affinity of a modality at one of its thresholds."""
    kind = ColorAffinity if modality == "color" else DepthGradAffinity
    return kind(thresh=THRESHOLDS[modality][which], stride=STRIDE)


def prepare(scenes: Scenes) -> Prepared:
    """True masks on the grid are for judging and for the ceiling alone."""
    grid = (scenes.images.shape[2] // STRIDE, scenes.images.shape[3] // STRIDE)
    cells, _ = box_cells(scenes.boxes, grid, STRIDE)
    masks = F.avg_pool2d(scenes.masks[:, None].float(), STRIDE)[:, 0] >= 0.5
    return Prepared(scenes, cell_masks(cells, grid), masks)


_cache: dict[tuple[int, str], tuple[Prepared, Prepared]] = {}


def prepared(seed: int, split: str = "test") -> tuple[Prepared, Prepared]:
    """Scenes to train on and scenes to judge by, of a seed."""
    if (seed, split) not in _cache:
        materials = Materials()
        train, judged = (
            prepare(make_scenes(materials, part, count, seed))
            for part, count in (("train", TRAIN_SCENES), (split, TEST_SCENES))
        )
        _cache.clear()
        _cache[seed, split] = (train, judged)
    return _cache[seed, split]


def execute(run: Run) -> Outcome:
    """Train and judge."""
    torch.set_num_threads(1)
    train, judged = prepared(run.seed, run.split)
    started = time.process_time()
    torch.manual_seed(run.seed)
    model = SmallMaskHead()
    loss_of = _loss(run.way, train)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, run.steps)
    draw = torch.Generator().manual_seed(run.seed)
    curve = []
    members = [torch.where(train.scenes.owner == n)[0] for n in range(len(train.scenes.images))]
    for step in range(run.steps):
        chosen = torch.randperm(len(members), generator=draw)[:BATCH]
        objects = torch.cat([members[n] for n in chosen.tolist()])
        owner = torch.cat([torch.full((len(members[n]),), k) for k, n in enumerate(chosen.tolist())])
        logits = model(train.scenes.images[chosen], train.scenes.boxes[objects], owner)
        optimizer.zero_grad()
        loss_of(logits, chosen, objects, owner, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (run.steps // LOOKS) == 0:
            found = judge(model, judged)
            curve.append(
                {"step": step + 1, **{k: found[k] for k in ("iou", "fill", "trivial", "full", "empty")}}
            )
    found = judge(model, judged)
    return Outcome(
        run, found["iou"], found["ap"], found["fill"], found["full"], found["empty"], found["trivial"], curve,
        time.process_time() - started, found["masks"],
    )  # fmt: skip


def _loss(way: Way, train: Prepared) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """The loss of logits of some objects of some scenes at a step. Only ``masks`` looks at true masks."""
    affinities = {name: (affinity(name, which), weight) for name, weight, which in way.terms}
    criterion = BoxSupLoss(affinities, RULES.get(way.form), warmup=way.warmup, stride=STRIDE)

    def loss(logits: Tensor, chosen: Tensor, objects: Tensor, owner: Tensor, step: int) -> Tensor:
        boxes = train.scenes.boxes[objects]
        cells, _ = box_cells(boxes, (logits.shape[1], logits.shape[2]), STRIDE)
        if way.form == "masks":
            return dice_loss(logits, train.masks[objects].float())
        if way.form == "mil":
            return mil_loss(logits, cells)
        edges = {}
        for name, _, which in way.terms:
            of_all = train.edges(name, which)
            edges[name] = EdgeBits(of_all.bits[chosen], of_all.kernel, of_all.dilation)
        return torch.stack(list(criterion(logits, boxes, owner, edges, step).values())).sum()

    return loss


@torch.no_grad()
def judge(model: nn.Module, test: Prepared) -> dict[str, Any]:
    """Masks of scenes in their given boxes, beside the true ones."""
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
        **{f"edges {name}": edge_statistics(train.edges(name), labels) for name in THRESHOLDS},
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
        with WorkerPool(count) as pool:
            note(future.result() for future in as_completed([pool.submit(execute, run) for run in runs]))
    return [found[run] for run in runs]
