"""The small proof: geometry, recorded creation orders, the recommender, and CPU partitions measured here."""

import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from migperf import contamination, page, plans, rivals, summaries
from migperf.backends.mig import MigBackend
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import DriverError
from migperf.exhaustive import best_ranks
from migperf.geometry import Geometry, enumerate_geometries, undominated
from migperf.jobs import InferenceJob, Job, TrainingJob
from migperf.profiles import layout
from migperf.proof_partitions import IMAGE, MODEL, Stage, prove_guard, prove_partitions, two_cores
from migperf.recommender import prepare, recommend
from migperf.records import Writer
from migperf.tables import official_a100
from shared_core.proof import ProofRun

if TYPE_CHECKING:
    pass

SOURCE = "Zhang et al., MIGPerf, 2023 (arXiv 2301.00407); NVIDIA's MIG guide and recorded driver logs"
BUDGET, QUICK_BUDGET = 132.0, 60.0
"""Seconds after which no window begins: the proof has 150."""
MIXES = 6
"""Mixes of jobs a seed."""

MAXIMAL = (
    "7@0|4@0 3@4|4@0 2@4 1@6|4@0 1@4 1@5 1@6|3@0 3@4|3@0 2@4 1@6|3@0 1@4 1@5 1@6|2@0 2@2 3@4|2@0 2@2 2@4 1@6|"
    "2@0 2@2 1@4 1@5 1@6|2@0 1@2 1@3 3@4|2@0 1@2 1@3 2@4 1@6|2@0 1@2 1@3 1@4 1@5 1@6|1@0 1@1 2@2 3@4|"
    "1@0 1@1 2@2 2@4 1@6|1@0 1@1 2@2 1@4 1@5 1@6|1@0 1@1 1@2 1@3 3@4|1@0 1@1 1@2 1@3 2@4 1@6|"
    "1@0 1@1 1@2 1@3 1@4 1@5 1@6"
)
"""The 19 maximal placed geometries of a device with seven compute slices: compute slices @ start."""

ORDERS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("a100-40gb", (9, 9), (4, 0)),
    ("a100-40gb", (19, 19, 14, 9), (6, 4, 0)),
    ("a100-40gb", (9, 19, 14, 19), (4, 0, 2, 1)),
    ("a100-40gb", (14, 19, 19, 19, 19, 19), (4, 6, 0, 1, 2, 3)),
    ("h100-80gb", (19,) * 7, (6, 4, 5, 0, 1, 2, 3)),
)
"""Device, ids of the profiles in the order of creation, and the starts that the driver's log shows. Fewer
starts than profiles: the next creation ended with Insufficient Resources."""

STATIC = {
    "all 1g": "1g*7", "all 2g": "2g*3,1g", "all balanced": "3g,2g,1g*2", "whole GPU": "7g"
}  # fmt: skip
"""Partitions that do not look at the jobs; `all balanced` is mig-parted's."""


def run_proof(out: Path, seeds: Sequence[int], quick: bool) -> int:
    """Run all parts, write proof.json, pictures and records to `out`, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    deadline = time.monotonic() + (QUICK_BUDGET if quick else BUDGET)
    data = {
        "geometry": "tables of A100, A30 and H100; five creation orders from public driver logs",
        "recommender": "bar labels of the official A100 charts; mixes of three jobs drawn by the seed",
        "measured": f"{MODEL}, random weights, synthetic images of {IMAGE} pixels, two cores of this machine",
    }
    bar = Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
                   console=Console(stderr=True), transient=True)  # fmt: skip
    with (
        ProofRun(
            package="migperf",
            version=metadata.version("migperf"),
            source=SOURCE,
            data=data,
            seeds=seeds,
            out=out,
            quick=quick,
            command="migperf sweep --device nvml:0 --study inference --out runs/a100",
        ) as run,
        bar,
    ):
        bar.add_task("geometry", total=None)
        stage = Stage(run, seeds, quick, bar, deadline)
        prove_geometry(run)
        prove_orders(run)
        prove_recommender(stage)
        with two_cores() as backend:
            prove_guard(stage, backend)
            prove_partitions(stage, backend)
        run.meaning(_meaning(run))
        _keep(stage, out)
    return run.finish()


def _meaning(run: ProofRun) -> str:
    exact, measured = run.claims[:3], run.claims[3:]
    return (
        (
            "What is planned for a GPU can be relied on: geometries, orders and recommendations are exact. "
            if all(claim.holds for claim in exact)
            else "Not all that is planned for a GPU is right; see which exact claim fails. "
        )
        + "On this machine's cores partitions "
        + (
            "keep a service's latency as the paper says."
            if measured and all(claim.holds for claim in measured)
            else "were not shown to do all that the paper says of them."
        )
    )


def prove_geometry(run: ProofRun) -> None:
    """Part 1: the 19 maximal geometries and the counts of both kinds of device."""

    def counts(device: str, profiles: Any) -> tuple[int, int, int]:
        placed = enumerate_geometries(device, profiles)
        maximal = enumerate_geometries(device, profiles, maximal=True)
        return len(placed), len(maximal), len(enumerate_geometries(device, profiles, multisets=True))

    a100, a30 = "a100-40gb", "a30-24gb"
    maximal = enumerate_geometries(a100, maximal=True)
    shown = {
        " ".join(
            f"{slot.profile.slices}@{slot.start}" for slot in sorted(g.slots, key=lambda s: s.start or 0)
        )
        for g in maximal
    }
    doubled = [p.name for p in layout(a100).profiles if not p.media]
    found = {
        "A100 1g-7g": counts(a100, "base"),
        "A100 with doubled memory": counts(a100, doubled),
        "A100 all": counts(a100, "all"),
        "A30 base": counts(a30, "base"),
        "A30 all": counts(a30, "all"),
    }
    expected = {
        "A100 1g-7g": (298, 19, 38), "A100 with doubled memory": (723, 78, 78), "A100 all": (2319, 239, 128),
        "A30 base": (26, 5, 10), "A30 all": (76, 17, 20),
    }  # fmt: skip
    old = len(enumerate_geometries(a100, maximal=True, legacy_driver=True))
    largest = len(undominated(maximal))
    run.detail("geometry", {"placed, maximal, multisets": found, "maximal before R510": old})
    run.claim(
        "The placement rules give exactly the geometries that the hardware has.",
        rule="the 19 maximal placed geometries are the listed ones, and placed states, maximal states and "
        "multisets of A100 and A30 number as published (298/19/38, 723/78/78, 2319/239/128; 26/5/10, "
        "76/17/20; 18 before driver R510; 12 multisets not contained in another)",
        holds=shown == set(MAXIMAL.split("|")) and found == expected and old == 18 and largest == 12,
        reason=f"{len(shown)} maximal, {len(shown & set(MAXIMAL.split('|')))} of them as listed; "
        + ", ".join(f"{name}: {'/'.join(map(str, three))}" for name, three in found.items())
        + f"; {old} before R510; {largest} undominated",
    )


def prove_orders(run: ProofRun) -> None:
    """Part 2: the controller repeats the logs on the simulated driver; the planner does better."""
    same, shown = 0, []
    planned = ""
    for device, ids, starts in ORDERS:
        backend = _simulated(device)
        made: list[int] = []
        try:
            made.extend(backend.create(backend.layout.by_id(i)).start for i in ids)
        except DriverError as error:
            refused = error.code == plans.INSUFFICIENT_RESOURCES
            fresh = _simulated(device)
            wanted = ",".join(fresh.layout.by_id(i).name for i in ids)
            there = plans.apply(fresh, plans.plan(fresh, Geometry.parse(wanted, fresh)))
            planned = ",".join(f"{one.profile.name}@{one.start}" for one in there)
        else:
            refused = False
        found = tuple(made)
        same += found == starts and refused == (len(starts) < len(ids))
        shown.append({"device": device, "ids": ids, "starts": found, "refused": refused})
    run.detail("orders", {"recorded": shown, "planned": planned})
    run.claim(
        "Created in recorded orders, instances land where real drivers put them, and the planner places what "
        "the driver's own order cannot.",
        rule="all five orders give the recorded starts through the controller, one ends with Insufficient "
        "Resources after three instances, and the planner creates that same set of four",
        holds=same == len(ORDERS) and planned.count("@") == 4,
        reason=f"{same} of {len(ORDERS)} orders as recorded; planned: {planned or 'nothing'}",
    )


def _simulated(device: str) -> MigBackend:
    backend = MigBackend(
        SimulatedNvml(layout(device)), spec=f"sim:{device}", kind="simulated", allow_mode_change=True,
        durable=False,
    )  # fmt: skip
    backend.enable(True)
    return backend


def mix_of(seed: int, number: int) -> list[Job]:
    """Draw two services and a training, or a service and two trainings, of the official figures' models."""
    rng = np.random.default_rng([seed, number])
    services = ("bert-base-multilingual", "minilm-l12", "distiluse-v1")
    trainings = (("vit_base_patch16", 8), ("vit_base_patch16", 32), ("moco-v2-resnet50", 8))
    count = int(rng.integers(1, 3))
    jobs: list[Job] = []
    for place, index in enumerate(rng.permutation(3)[:count]):
        rate, slo = float(rng.integers(100, 4000)), float(rng.choice([60, 120, 250, 500]))
        jobs.append(InferenceJob(f"service {place}", services[int(index)], rate, slo))
    for place, index in enumerate(rng.permutation(3)[: 3 - count]):
        model, batch = trainings[int(index)]
        jobs.append(TrainingJob(f"training {place}", model, batch, weight=float(rng.integers(1, 4))))
    return jobs


def prove_recommender(stage: Stage) -> None:
    """Part 5: over random mixes, the recommender's answer is that of exhaustive search."""
    run, device, table = stage.run, layout("a100-40gb"), official_a100()
    run.metric("objectives", "latency objectives met a mix (official A100 figures)", fmt=".2f")
    run.metric("training", "weighted training throughput a mix (official A100 figures)", fmt=".3f")
    names = sorted({profile for _, profile, _ in table.cells})
    equal = total = 0
    as_good = dict.fromkeys((*rivals.RULES, *STATIC), 0)
    rows = []
    for seed in stage.seeds:
        scores: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("migperf", *rivals.RULES, *STATIC)
        }
        for number in range(2 if stage.quick else MIXES):
            stage.tell("recommender against exhaustive search")
            jobs = mix_of(seed, number)
            answer = recommend(device, jobs, table, predict=False)
            best = best_ranks(device, jobs, table, names)
            total += 1
            equal += bool(np.allclose(answer.ranks, best, atol=1e-6))
            scores["migperf"].append((answer.ranks[0], answer.ranks[1]))
            for rival in rivals.compare(device, jobs, table):
                scores[rival.name].append((rival.met, rival.trained))
            mix = prepare(device, jobs, table, predict=False)
            for name, geometry in STATIC.items():
                have = Geometry.parse(geometry, device).require().profiles
                scores[name].append(rivals.best_shared(mix, tuple(have[p.name] for p in mix.profiles)))
            rows.append({"seed": seed, "geometry": str(answer.geometry), "ranks": answer.ranks, "best": best})
        for name in as_good:
            pairs = zip(scores[name], scores["migperf"], strict=True)
            as_good[name] += sum(bool(np.allclose(one, best, atol=1e-6)) for one, best in pairs)
        for name, pairs in scores.items():
            run.add(name, "objectives", np.mean([met for met, _ in pairs]))
            run.add(name, "training", np.mean([trained for _, trained in pairs]))
    run.detail("recommender", rows)
    run.detail("mixes in which a rule does as well", {"of": total, **as_good})
    run.note(
        f"Of {total} mixes, other rules do as well as the exact answer in: "
        + ", ".join(f"{name} {count}" for name, count in as_good.items())
        + "."
    )
    run.claim(
        "The recommender's answer is the best of all placed geometries and assignments.",
        rule="for every mix drawn, all four levels of its answer equal those of exhaustive search over all "
        "placed geometries and all owners of all instances, which shares no code with it",
        holds=equal == total,
        reason=f"{equal} of {total} mixes equal",
    )


def _keep(stage: Stage, out: Path) -> None:
    """Write records, their page, and the pictures of throughput and p99 by geometry."""
    from shared_core.plot import save

    folder = out / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    writer = Writer(folder, simulated=False)
    for records, raws in stage.records:
        writer.append(records, raws)
    rows = summaries.rows(writer.written, folder)
    if rows:
        page.report(folder, folder / "report.html")
    foreign = contamination.baseline()
    stage.run.note(
        f"Other processes used {foreign:.2f} cores at the end. Partitions share caches and memory bandwidth."
    )
    pictures: list[tuple[str, str, Any, Any]] = [
        ("throughput", "Items/s by geometry", page.throughput, lambda row: row.items_per_second is not None),
        ("p99", "p99 by geometry, requests pooled", page.tails, lambda row: "p99" in row.latency_ms),
    ]
    for name, title, draw, wanted in pictures:
        some = [row for row in rows if wanted(row)]
        if some:
            save(draw(some, title), stage.run.picture(name))
    _draw_mixes(stage.run)


def _draw_mixes(run: ProofRun) -> None:
    from shared_core.plot import COLOURS, figure, save

    title = "Official A100 figures: recommended, other rules', and static partitions"
    picture, axes = figure(1, 2, height=420, title=title)
    methods = [name for name in ("migperf", *rivals.RULES, *STATIC) if name in run.methods]
    for axis, metric, label in (
        (axes[0], "objectives", "latency objectives met a mix"),
        (axes[1], "training", "weighted training throughput a mix"),
    ):
        means = [float(np.mean(run.methods[name][metric])) for name in methods]
        axis.barh(methods[::-1], means[::-1], color=COLOURS[0], alpha=0.75)
        for place, mean in enumerate(means[::-1]):
            axis.text(mean, place, f" {mean:.2f}", ha="left", va="center", fontsize=8)
        axis.set_xlabel(label)
        axis.tick_params(axis="y", labelsize=8)
    save(picture, run.picture("recommender"))
