"""The measured part of the proof: CPU partitions beside the whole device and both unpinned rivals."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from migperf import contamination, measuring
from migperf.backends.cpu import CpuBackend
from migperf.loads import CLOSED, Poisson
from migperf.measuring import Result
from migperf.recommendation import TOLERANCE
from migperf.standing import Measured, interleave
from migperf.sweeps import Cell, cut
from migperf.workloads import Workload, parse
from shared_core.proof import ProofRun

if TYPE_CHECKING:
    from rich.progress import Progress

MODEL, IMAGE = "torchvision/resnet18", 64
WHOLE, DEFAULT, MATCHED = "whole (2 threads)", "unpinned, default threads", "unpinned, matched threads"


@dataclass
class Stage:
    """What all parts share: the record, repeats, and how much time there is."""

    run: ProofRun
    seeds: Sequence[int]
    quick: bool
    progress: "Progress"
    deadline: float
    records: list[Any] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Show what is being done."""
        self.progress.update(self.progress.task_ids[0], description=what, advance=1)

    @property
    def needed(self) -> int:
        """Repeats that must be clean in every arm of a comparison: two thirds."""
        return -(-2 * len(self.seeds) // 3)


@contextmanager
def two_cores() -> Iterator[CpuBackend]:
    """Give the first two cores, and keep the whole proof on them: all arms have the same."""
    allowed = os.sched_getaffinity(0)
    cores = CpuBackend(allowed).cores
    if len(cores) > 2:
        os.sched_setaffinity(0, {cpu for core in cores[:2] for cpu in core.cpus})
    try:
        yield CpuBackend()
    finally:
        os.sched_setaffinity(0, allowed)


RIVAL = "import os; os.sched_setaffinity(0, [{}]); parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Keeps a core busy as long as its parent lives."""


def prove_guard(stage: Stage, backend: CpuBackend) -> None:
    """A process that was put on a partition's core must be seen, and the run refused."""
    import subprocess
    import sys

    stage.tell("contamination guard")
    with cut(backend, "1c") as instances:
        cpu = instances[0].handle["cpus"][0]
        rival = subprocess.Popen([sys.executable, "-c", RIVAL.format(cpu)], stderr=subprocess.DEVNULL)
        try:
            seen = measuring.run(parse("spin:2ms"), instances, backend, duration=0.7, repeats=1)
        finally:
            rival.kill()
            rival.wait()
    (record,) = seen.records
    share = record.metrics.get("core_share")
    stage.run.detail("guard", {"verdict": record.contaminated, "core_share": share})
    stage.run.claim(
        "A run that a foreign process disturbs is refused.",
        rule="a process pinned to the partition's only core makes the guard call the run contaminated",
        holds=bool(record.contaminated),
        reason=record.contaminated or "the guard saw nothing",
    )


@dataclass
class Study:
    """Arms that were measured in turns, and what the clean windows gave."""

    name: str
    measured: dict[str, Measured]
    seeds: Sequence[int]
    needed: int
    worker: int | None = None

    def window(self, arm: str, seed: int) -> dict[str, Any] | None:
        """Return the summary of one window; None if it was not measured."""
        result = self.measured[arm].results.get(seed)
        return None if result is None else self._chosen([result]).summary()

    def _chosen(self, results: Sequence[Result]) -> Result:
        records = [r for one in results for r in one.records if self.worker in (None, r.worker)]
        return Result(records, {name: raw for one in results for name, raw in one.raws.items()})

    def clean(self, arm: str) -> list[int]:
        """Return the repeats of an arm that nothing speaks against."""
        return [seed for seed in self.seeds if not self.measured[arm].dirty(seed)]

    def pooled(self, arm: str) -> dict[str, Any]:
        """Return the summary of all clean windows of an arm together."""
        return self._chosen([self.measured[arm].results[seed] for seed in self.clean(arm)]).summary()

    def inconclusive(self, arms: Sequence[str]) -> str:
        """Return why these arms cannot be compared; "" if they can."""
        short = [f"{arm} {len(self.clean(arm))}" for arm in arms if len(self.clean(arm)) < self.needed]
        if not short:
            failed = {
                record.message or record.status
                for arm in arms for seed in self.clean(arm)
                for record in self.measured[arm].results[seed].records
                # A neighbour that did hardly a step in the window was there; one that failed was not.
                if record.status in ("failed", "oom")
                or (record.status == "insufficient" and self.worker in (None, record.worker))
            }  # fmt: skip
            return f"inconclusive: {'; '.join(sorted(failed))}" if failed else ""
        why = {
            record.contaminated
            for arm in arms for result in self.measured[arm].results.values() for record in result.records
            if record.contaminated
        }  # fmt: skip
        reason = max(why, key=len) if why else "there was no time to measure them"
        return (
            f"inconclusive: clean repeats, {self.needed} are needed of each: {', '.join(short)}; "
            f"for example: {reason}"
        )


def prove_partitions(stage: Stage, backend: CpuBackend) -> None:
    """Parts 3 and 4: one-core partitions beside the whole device and both unpinned rivals."""
    hopeless = "two cores are needed" if len(backend.cores) < 2 else _busy(stage)
    if hopeless:
        for text in RULES:
            stage.run.claim(text, rule=RULES[text], holds=False, reason=f"inconclusive: {hopeless}")
        return
    run_id = f"proof-{int(time.time())}"
    studies = {1: _closed(stage, backend, 1, run_id)}
    _metrics(stage, studies[1], "batch 1")
    _claim_small(stage, studies[1])
    _claim_rival(stage, studies[1])
    _claim_neighbour(stage, _neighbour(stage, backend, studies[1], run_id))
    if not stage.quick:  # last, since no claim rests on it: it has what time is left
        studies[8] = _closed(stage, backend, 8, run_id)
        _metrics(stage, studies[8], "batch 8")
    _note_gain(stage, studies)


BUSY = 0.25
"""Share of the cores that others may use for a measurement to begin at all."""


def _busy(stage: Stage) -> str:
    """Wait a while for a quiet moment; return why there is none, "" if there is one."""
    cores = len(os.sched_getaffinity(0))
    limit = time.monotonic() + (0.0 if stage.quick else 20.0)
    while (foreign := contamination.baseline(1.0)) > BUSY * cores:
        stage.tell("waiting for a quiet moment")
        if time.monotonic() > limit:
            return f"contaminated: other processes use {foreign:.2f} of {cores} CPUs, nothing was measured"
    return ""


def _work(mode: str = "infer", batch: int = 1) -> Workload:
    return parse(MODEL, mode=mode, batch=batch, image_size=IMAGE)


def _measure(
    stage: Stage, backend: CpuBackend, name: str, wanted: dict[str, Cell], run_id: str, duration: float,
    patience: float, worker: int | None = None,
) -> Study:  # fmt: skip
    measured = interleave(
        backend, wanted, duration=0.3 if stage.quick else duration, repeats=stage.seeds, run_id=run_id,
        deadline=stage.deadline, patience=0.0 if stage.quick else patience,
        progress=lambda what: stage.tell(f"{name}: {what}"),
    )  # fmt: skip
    for one in measured.values():
        stage.records += [(result.records, result.raws) for result in one.results.values()]
    stage.run.detail(
        f"windows, {name}",
        {arm: {"measured": one.attempts, "contaminated": one.contaminated} for arm, one in measured.items()},
    )
    return Study(name, measured, stage.seeds, stage.needed, worker)


def _closed(stage: Stage, backend: CpuBackend, batch: int, run_id: str) -> Study:
    work = (_work(batch=batch),)
    wanted = {
        "migperf": Cell("1c*2", work),
        WHOLE: Cell("2c", work, mode="whole"),
        DEFAULT: Cell("1c*2", work, mode="unpinned"),
        MATCHED: Cell("1c*2", work, mode="unpinned-matched"),
    }
    seconds, patience = (2.0, 12.0) if batch == 1 else (1.5, 4.0)
    return _measure(stage, backend, f"batch {batch}", wanted, run_id, seconds, patience)


def _neighbour(stage: Stage, backend: CpuBackend, alone: Study, run_id: str) -> Study | None:
    """Ask a service at half of what one core can do, beside a training; None where that is not known."""
    rates = [
        record.items_per_second
        for result in alone.measured["migperf"].results.values() for record in result.records
        if record.items_per_second
    ]  # fmt: skip
    if not rates:
        return None
    rate = float(np.median(rates)) / 2
    stage.run.detail("rate beside a training", rate)
    work, loads = (_work(), _work("train", 4)), (Poisson(round(rate, 3), seed=666), CLOSED)
    wanted = {
        "migperf": Cell("1c*2", work, loads),
        DEFAULT: Cell("1c*2", work, loads, mode="unpinned"),
        MATCHED: Cell("1c*2", work, loads, mode="unpinned-matched"),
    }
    study = _measure(stage, backend, "beside a training", wanted, run_id, 2.5, 12.0, worker=0)
    _metrics(stage, study, "beside a training", rates=False)
    return study


def _metrics(stage: Stage, study: Study, where: str, *, rates: bool = True) -> None:
    """Add the numbers of each repeat, of the arms that have all; the notes say which are contaminated."""
    kinds: list[tuple[str, str, bool, Callable[[dict[str, Any]], float | None]]] = [
        ("p95", f"p95 ms, {where}", False, lambda found: found["latency_ms"].get("p95"))
    ]
    if rates:
        kinds.insert(0, ("rate", f"items/s, {where}", True, lambda found: found["items_per_second"]))
    for kind, label, higher, of in kinds:
        table = {}
        for arm in study.measured:
            windows = [study.window(arm, seed) for seed in stage.seeds]
            values = [None if found is None else of(found) for found in windows]
            if None not in values:
                table[arm] = values
        if "migperf" not in table:
            continue
        name = f"{kind} {where}"
        stage.run.metric(name, label, higher_is_better=higher, fmt=".1f", measured=True)
        for arm, values in table.items():
            for value in values:
                stage.run.add(arm, name, value)
    shown = {arm: study.pooled(arm) for arm in study.measured if study.clean(arm)}
    stage.run.detail(f"pooled, {where}", {arm: _short(found) for arm, found in shown.items()})
    dirty = {arm: len(stage.seeds) - len(study.clean(arm)) for arm in study.measured}
    if any(dirty.values()):
        listed = ", ".join(f"{arm} {count}" for arm, count in dirty.items() if count)
        stage.run.note(f"Contaminated or missing repeats of {len(stage.seeds)}, {where}: {listed}.")


def _short(found: dict[str, Any]) -> dict[str, Any]:
    names = ("items_per_second", "range", "latency_ms", "latency_interval_ms", "samples", "statuses")
    return {name: found[name] for name in names}


CLAIM_SMALL = "For small work units two one-core partitions together do more than the whole device at once."
CLAIM_RIVAL = (
    "They beat unpinned processes with default threads in throughput and tail, and do not lose to those with "
    "matched threads."
)
CLAIM_NEIGHBOUR = (
    "A service in a partition keeps a shorter tail beside a training than unpinned with default threads."
)
CLEAN = "Two thirds of each arm's repeats must be clean of foreign load, else nothing is shown."
RULES = {
    CLAIM_SMALL: "batch 1, closed loop: the median over clean repeats of the two partitions' items/s is "
    f"above the whole device's. {CLEAN}",
    CLAIM_RIVAL: "batch 1, closed loop, clean repeats: median items/s above and pooled p99 below those of "
    "unpinned processes with default threads; against matched threads at least nine tenths of the items/s, "
    f"and a pooled p99 at most a tenth above or with overlapping 95 % intervals. {CLEAN}",
    CLAIM_NEIGHBOUR: "Poisson arrivals at half of a core's capacity beside a training: pooled p99 from the "
    "scheduled arrival, of clean repeats, below that of unpinned processes with default threads (a saturated "
    f"rival counts as slower). {CLEAN}",
}


def _claim(stage: Stage, text: str, study: Study | None, arms: Sequence[str], decide: Any) -> None:
    why = "inconclusive: nothing was measured" if study is None else study.inconclusive(arms)
    if why or study is None:
        stage.run.claim(text, rule=RULES[text], holds=False, reason=why)
        return
    holds, reason = decide({arm: study.pooled(arm) for arm in study.measured if study.clean(arm)})
    stage.run.claim(text, rule=RULES[text], holds=holds, reason=reason)


def _claim_small(stage: Stage, study: Study) -> None:
    def decide(found: dict[str, dict[str, Any]]) -> tuple[bool, str]:
        ours, whole = (found[arm]["items_per_second"] for arm in ("migperf", WHOLE))
        return ours > whole, f"{ours:.1f} against {whole:.1f} items/s, x{ours / whole:.2f}"

    _claim(stage, CLAIM_SMALL, study, ("migperf", WHOLE), decide)


def _claim_rival(stage: Stage, study: Study) -> None:
    def decide(found: dict[str, dict[str, Any]]) -> tuple[bool, str]:
        ours, default, matched = (found[arm] for arm in ("migperf", DEFAULT, MATCHED))
        rates = [one["items_per_second"] for one in (ours, default, matched)]
        tails = [_tail(one) for one in (ours, default, matched)]
        holds = (
            rates[0] > rates[1]
            and tails[0] < tails[1]
            and rates[0] >= (1 - TOLERANCE) * rates[2]
            and (tails[0] <= (1 + TOLERANCE) * tails[2] or _overlap(ours, matched))
        )
        reason = "; ".join(
            f"{name} {rate:.1f} items/s, p99 {tail:.1f} ms"
            for name, rate, tail in zip(("partitions", DEFAULT, MATCHED), rates, tails, strict=True)
        )
        return holds, reason

    _claim(stage, CLAIM_RIVAL, study, ("migperf", DEFAULT, MATCHED), decide)


def _claim_neighbour(stage: Stage, study: Study | None) -> None:
    def decide(found: dict[str, dict[str, Any]]) -> tuple[bool, str]:
        tails = {arm: _tail(one) for arm, one in found.items()}
        reason = "; ".join(f"{arm} p99 {tail:.1f} ms" for arm, tail in tails.items())
        return tails["migperf"] < tails[DEFAULT], reason

    _claim(stage, CLAIM_NEIGHBOUR, study, ("migperf", DEFAULT), decide)


def _tail(found: dict[str, Any]) -> float:
    """Return p99; infinite where the queue grew without end or the samples were too few."""
    return float(found["latency_ms"].get("p99", np.inf))


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    first, second = (found["latency_interval_ms"].get("p99") for found in (one, other))
    return bool(first and second and first[0] <= second[1] and second[0] <= first[1])


def _note_gain(stage: Stage, studies: dict[int, Study]) -> None:
    """Say whether the gain shrinks with the batch, as the official figures say it does on a GPU."""
    gains = {}
    for batch, study in studies.items():
        if all(study.clean(arm) for arm in ("migperf", WHOLE)):
            ours, whole = (study.pooled(arm)["items_per_second"] for arm in ("migperf", WHOLE))
            if ours and whole:
                gains[batch] = ours / whole
    stage.run.detail("gain by batch", gains)
    if len(gains) < 2:
        stage.run.note(
            "Whether the partitions' gain shrinks with the batch is not known: no clean windows of both."
        )
    else:
        shrinks = "shrinks" if gains[8] < gains[1] else "does not shrink"
        stage.run.note(
            f"The partitions' gain over the whole {shrinks} with the batch: x{gains[1]:.2f} at 1, "
            f"x{gains[8]:.2f} at 8."
        )
