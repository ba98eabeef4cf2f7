"""The proof's experiment: MiniLM teaches its own first layers, by LEAD and by each rival, at equal cost.

Every method has the same start, data, negatives, steps, schedule and seeds. Its learning rate was chosen on
the development queries, from the same grid, with seeds that are not the proof's (`choose_rates`).
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lead_kd.cache import CachedTeacher, TeacherCache, build_cache
from lead_kd.corpus import RetrievalData
from lead_kd.evaluation import measure
from lead_kd.jobs import DevSet, LayerOptions, dev_run, dev_set, make_objective, teacher_layers_table
from lead_kd.mining import hard_negatives
from lead_kd.objectives import Name, Objective, Response
from lead_kd.pruning import encoder_of, prune_layers
from lead_kd.sampling import Sampler
from lead_kd.scorers import DualEncoder
from lead_kd.search import search
from lead_kd.selection import LayerSchedule, Strategy
from lead_kd.training import Recipe, distill
from lead_kd.wikipedia_task import MODEL_FOLDER, MODEL_PACKAGE, wikipedia_task
from shared_core.wheels import member_folder
from shared_core.workers import WorkerPool

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MEASURES = ("nDCG@10", "RR@10", "R@10")
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
"""The grid of learning rates, for every method."""


@dataclass(frozen=True)
class Arm:
    """A method of the comparison.

    Args:
        objective: What it minimizes.
        rate: Its learning rate, chosen on the development queries.
        weight: Of the response term.
        strategy: How layers are paired.
        reweight: Whether layers are weighted.
    """

    objective: Name
    rate: float
    weight: float = 1.0
    strategy: Strategy = "random"
    reweight: bool = True


ARMS: dict[str, Arm] = {
    "lead-kd": Arm("lead", 8e-4),
    "lead, equal weights": Arm("lead", 8e-4, reweight=False),
    "lead, last layers": Arm("lead", 4e-4, strategy="last"),
    "none": Arm("none", 4e-4),
    "response": Arm("response", 4e-4),
    "response x2": Arm("response", 4e-4, weight=2.0),
    "listwise": Arm("listwise", 4e-4),
    "margin-mse": Arm("margin-mse", 2e-4),
    "regression": Arm("regression", 8e-4),
    "embedding": Arm("embedding", 4e-4),
    "minilm": Arm("minilm", 4e-4),
}


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is."""

    train: int = 640
    dev: int = 300
    test: int = 400
    distractors: int = 200
    steps: int = 24
    batch: int = 12
    query_length: int = 14
    passage_length: int = 24
    keep: tuple[int, ...] = (0, 1)
    pairs: int = 2
    redraw: int = 1
    """Steps between draws; the official 10 of 50,000 steps would be three draws in all here."""
    arms: tuple[str, ...] = tuple(ARMS)
    methods: dict[str, Arm] = field(default_factory=lambda: dict(ARMS))


QUICK = Sizes(
    train=96, dev=40, test=60, distractors=40, steps=6, batch=8, arms=("lead-kd", "none", "response")
)


@dataclass(frozen=True)
class Prepared:
    """What all runs share: files in a folder, so that processes can read them."""

    folder: Path
    sizes: Sizes
    data: RetrievalData
    dev: DevSet
    test: DevSet


def teacher_model(sizes: Sizes) -> DualEncoder:
    """The frozen teacher: all-MiniLM-L6-v2; it reads as many tokens as its student, as minilm needs it."""
    return DualEncoder(_model().eval(), None, sizes.query_length, sizes.passage_length)


def student_model(sizes: Sizes) -> DualEncoder:
    """The start of every student: the teacher's first layers, with embeddings that stay as they are."""
    model = prune_layers(_model(), sizes.keep)
    encoder_of(model).embeddings.requires_grad_(False)
    return DualEncoder(model, None, sizes.query_length, sizes.passage_length)


def _model() -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(member_folder(MODEL_PACKAGE, MODEL_FOLDER)), device="cpu")


def prepare(folder: Path, sizes: Sizes) -> tuple[Prepared, dict[str, Any]]:
    """Draw the task, mine negatives with the teacher, cache its vectors, and measure its layers.

    Returns:
        What the runs share; and the test scores of the teacher, of each of its layers, and of the start.
    """
    task = wikipedia_task(sizes.train, sizes.dev, sizes.test, sizes.distractors)
    teacher = teacher_model(sizes)
    queries = list(task.train.judged())
    cache = build_cache(
        teacher, folder / "cache", [task.train.queries[q] for q in queries], list(task.train.corpus)
    )
    q_final = cache.vectors("query", [task.train.queries[q] for q in queries])[1].numpy()
    p_final = cache.vectors("passage", list(task.train.corpus))[1].numpy()
    found = search(q_final, p_final, 12)
    data = replace(
        task.train, negatives=hard_negatives(task.train, queries, found, task.train.corpus.ids, 10)
    )
    dev, test = (dev_set(part, sizes.distractors + len(part.queries)) for part in (task.dev, task.test))
    shared = Prepared(folder, sizes, data, dev, test)
    layers = teacher_layers_table(teacher, test, MEASURES)
    start = student_model(sizes)
    start.eval()
    return shared, {
        "layers": [values for _, values in layers],
        "teacher": layers[-1][1],  # its last layer's scores are its own
        "start": _means(test, dev_run(start.model, test, sizes.query_length, sizes.passage_length)),
    }


def _means(part: DevSet, run: Any) -> dict[str, float]:
    return measure(part.qrels, run, MEASURES).mean


@dataclass(frozen=True)
class Result:
    """What one run reached.

    Attributes:
        mean: Measure -> mean over queries.
        per_query: Query -> nDCG@10.
        history: Of training.
    """

    mean: dict[str, float]
    per_query: dict[str, float]
    history: list[dict[str, Any]]


def run_arm(task: tuple[Prepared, Arm, int, bool]) -> Result:
    """Train and judge one student; `task` is (shared, arm, seed, whether the development part judges)."""
    shared, arm, seed, on_dev = task
    sizes = shared.sizes
    # The same vectors, read or computed: minilm alone needs what goes on inside.
    teacher = (
        teacher_model(sizes)
        if arm.objective == "minilm"
        else CachedTeacher(TeacherCache(shared.folder / "cache"))
    )
    student = student_model(sizes)
    options = LayerOptions(sizes.pairs, arm.strategy, reweight=arm.reweight)
    objective: Objective = (
        Response(arm.weight)
        if arm.objective == "response"
        else make_objective(arm.objective, student, teacher, options, co_train=False, seed=seed)
    )
    schedule = LayerSchedule(
        teacher.n_layers, student.n_layers, sizes.pairs, arm.strategy, sizes.redraw, seed
    )
    trained = distill(
        student,
        teacher,
        objective,
        Sampler(shared.data, sizes.batch, 1, seed),
        Recipe(sizes.steps, lr=arm.rate, log_every=1, seed=seed),
        schedule,
    )
    part = shared.dev if on_dev else shared.test
    run = dev_run(student.model, part, sizes.query_length, sizes.passage_length)
    found = measure(part.qrels, run, MEASURES)
    del teacher, student, objective
    gc.collect()  # few and large objects: Python would let the models of many runs pile up
    return Result(found.mean, found.per_query["nDCG@10"], trained.history)


def choose_rates(
    sizes: Sizes, seeds: Sequence[int] = (100, 101), workers: int = 2
) -> dict[str, dict[float, float]]:
    """Measure every method at every rate on the development queries.

    Returns:
        Method -> rate -> mean nDCG@10 over the seeds.
    """
    with tempfile.TemporaryDirectory() as folder:
        shared, _ = prepare(Path(folder), sizes)
        tasks = [
            (shared, replace(arm, rate=rate), seed, True)
            for arm in (sizes.methods[name] for name in sizes.arms)
            for rate in RATES
            for seed in seeds
        ]
        results = iter(run_all(tasks, workers))
        return {
            name: {rate: float(np.mean([next(results).mean["nDCG@10"] for _ in seeds])) for rate in RATES}
            for name in sizes.arms
        }


def run_all(
    tasks: Sequence[tuple[Prepared, Arm, int, bool]], workers: int, done: Any = lambda count: None
) -> list[Result]:
    """Run tasks in processes of one thread each, in order."""
    results = []
    with WorkerPool(workers) as pool:
        for result in pool.map(run_arm, tasks):
            results.append(result)
            done(len(results))
    return results
