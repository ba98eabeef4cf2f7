"""Summaries: what a cell's workers gave together over its repeats, as rows for tables and plots."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from migperf.errors import DataError
from migperf.measuring import Result
from migperf.records import Record, raw_latencies
from migperf.sharing import gain, interference, jain
from migperf.tables import workload_key
from shared_core import InputError


@dataclass(frozen=True)
class Row:
    """One job of a cell, all its workers and repeats together.

    Attributes:
        cell: Its name.
        device: Model of the device.
        simulated: Whether any number comes from a model and not from a clock.
        geometry: Of all instances.
        mode: How the device was shared.
        workload: Key of the workload.
        batch: Items of a step.
        load: What asked.
        open_loop: Whether requests arrived on their own; only then latency includes waiting.
        offered: Requests per second that arrived at each worker; None in a closed loop.
        items_per_second: Of all workers together, median over clean repeats.
        span: Least and greatest of the repeats.
        latency_ms: Percentiles of all clean requests pooled.
        interval_ms: Their 95 % intervals.
        samples: Requests pooled.
        workers: How many processes do this.
        slices: Compute slices (CPU: cores) of all of them together.
        neighbours: How many processes do something else beside them.
        memory_mib: Largest peak of one worker.
        joules_per_item: Of the whole board, median over repeats.
        idle_watts: Of the whole board before the workers started.
        activity: Of the whole device: each instance's, weighed with its slices; None where it was not read.
        fairness: Jain's, over the workers' throughputs; None for one worker.
        repeats: How many.
        clean: How many of them nothing spoke against.
        statuses: What the workers came to.
        notes: Contamination, warnings and messages, each once.
    """

    cell: str
    device: str
    simulated: bool
    geometry: str
    mode: str
    workload: str
    batch: int
    load: str
    open_loop: bool
    offered: float | None
    items_per_second: float | None
    span: tuple[float, float] | None
    latency_ms: Mapping[str, float]
    interval_ms: Mapping[str, tuple[float, float]]
    samples: int
    workers: int
    slices: int
    neighbours: int
    memory_mib: float | None
    joules_per_item: float | None
    idle_watts: float | None
    activity: float | None
    fairness: float | None
    repeats: int
    clean: int
    statuses: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether it says something of its partition: a clean repeat, in which something was found out."""
        return self.clean > 0 and set(self.statuses) != {"insufficient"}

    @property
    def label(self) -> str:
        """The way of sharing, short: `1c@0,1c@1`, or `unpinned x2`."""
        if self.mode in ("partition", "whole"):
            return self.geometry
        return f"{self.mode} x{self.workers + self.neighbours}"


def rows(records: Iterable[Record], folder: str | os.PathLike[str] | None = None) -> list[Row]:
    """Return a row for each job of each cell, in the order in which the cells were first measured.

    Args:
        records: Of any number of runs.
        folder: Where their raw latencies are; without it, or where a file is missing, percentiles are those
            of the records, which only exist for one worker and one repeat.
    """
    jobs: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        job = workload_key(record.workload), record.workload.get("batch"), load_text(record.load)
        jobs.setdefault((record.cell, record.device, *job), []).append(record)
    return [_row(of_job, folder) for of_job in jobs.values()]


def _row(records: Sequence[Record], folder: str | os.PathLike[str] | None) -> Row:
    first = records[0]
    raws, lost = _raws(records, folder)
    summary = Result(list(records), raws).summary()
    clean = [r for r in records if not r.contaminated and r.status == "ok"] or list(records)
    latency, interval = summary["latency_ms"], summary["latency_interval_ms"]
    if not latency and len(clean) == 1:
        latency, interval = clean[0].latency_ms, clean[0].latency_interval_ms
    workers = len({record.worker for record in records})
    of_workers = _by_worker(clean)
    peaks = [r.peak_memory_mib for r in records if r.peak_memory_mib is not None]
    notes = [*summary["contaminated"], *summary["messages"], summary["warning"], *lost, *_warnings(records)]
    return Row(
        cell=first.cell,
        device=first.device,
        simulated=summary["simulated"],
        geometry=first.geometry,
        mode=first.mode,
        workload=workload_key(first.workload),
        batch=int(first.workload.get("batch", 1)),
        load=load_text(first.load),
        open_loop=first.load.get("kind") != "closed",
        offered=first.load.get("rate"),
        items_per_second=summary["items_per_second"],
        span=summary["range"],
        latency_ms=latency,
        interval_ms=interval,
        samples=summary["samples"],
        workers=workers,
        slices=sum({record.worker: record.slices for record in records}.values()),
        neighbours=first.workers - workers,
        memory_mib=max(peaks, default=None),
        joules_per_item=_joules(clean) if workers == first.workers else None,
        idle_watts=_median(clean, "idle_watts"),
        activity=_median(clean, "device_activity"),
        fairness=jain(of_workers) if len(of_workers) > 1 and any(of_workers) else None,
        repeats=summary["repeats"],
        clean=summary["clean_repeats"],
        statuses=summary["statuses"],
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )


def load_text(load: Mapping[str, Any]) -> str:
    """Return a load as a person would say it.

    >>> load_text({"kind": "poisson", "rate": 50, "seed": 1}), load_text({"kind": "closed", "concurrency": 4})
    ('poisson 50/s', 'closed loop, 4 threads')
    """
    if load.get("kind") == "closed":
        threads = int(load.get("concurrency") or 1)
        return "closed loop" if threads == 1 else f"closed loop, {threads} threads"
    gathered = int(load.get("collect") or 1)
    return f"{load.get('kind')} {load.get('rate'):g}/s" + (f", up to {gathered} at once" * (gathered > 1))


def _raws(
    records: Sequence[Record], folder: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], list[str]]:
    raws: dict[str, Any] = {}
    lost: list[str] = []
    for record in records:
        if folder is None or not record.raw:
            continue
        try:
            raws[record.raw] = raw_latencies([record], folder)
        except InputError:
            lost.append(f"raw latencies are missing: {Path(record.raw).name}")
    return raws, lost


def _warnings(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        yield from record.extra.get("warnings") or ()
        missing = record.extra.get("neighbours_missing")
        if missing:
            yield f"{missing} neighbours did not run"


def _by_worker(records: Sequence[Record]) -> list[float]:
    rates: dict[int, list[float]] = {}
    for record in records:
        if record.items_per_second is not None:
            rates.setdefault(record.worker, []).append(record.items_per_second)
    return [float(np.median(values)) for values in rates.values()]


def _joules(records: Sequence[Record]) -> float | None:
    """Return joules an item: the board's, which every worker's record states, over the items of all."""
    found = []
    for repeat in {record.repeat for record in records}:
        some = [record for record in records if record.repeat == repeat]
        board = some[0].energy_joules
        items = sum((r.items_per_second or 0.0) * r.window_seconds for r in some)
        if board is not None and items > 0:
            found.append(board / items)
    return float(np.median(found)) if found else None


def _median(records: Sequence[Record], name: str) -> float | None:
    """Return the median of what the records say beside their fields, None where none does."""
    found = [record.extra[name] for record in records if record.extra.get(name) is not None]
    return float(np.median(found)) if found else None


@dataclass(frozen=True)
class Comparison:
    """A way of sharing beside the whole device under the same workload and load.

    Attributes:
        row: The way.
        whole: The whole device.
        gain: Throughput of all workers over that of the whole device.
        p99_ratio: p99 over that of the whole device.
    """

    row: Row
    whole: Row
    gain: float | None
    p99_ratio: float | None


def comparisons(found: Sequence[Row]) -> list[Comparison]:
    """Compare every way of sharing with one worker that has the whole device, where there is one."""
    wholes: dict[tuple[str, str, int, str], Row] = {}
    for row in found:
        if row.workers == 1 and not row.neighbours and row.items_per_second:
            key = (row.device, row.workload, row.batch, row.load)
            best = wholes.get(key)
            if best is None or (row.mode == "whole", row.slices) > (best.mode == "whole", best.slices):
                wholes[key] = row
    compared = []
    for row in found:
        whole = wholes.get((row.device, row.workload, row.batch, row.load))
        if whole is None or row.workers < 2 or row.neighbours or row.items_per_second is None:
            continue
        ratios = interference(_summary(whole), _summary(row))
        factor = gain([row.items_per_second], whole.items_per_second or 0.0)
        compared.append(Comparison(row, whole, factor, ratios.get("p99_ratio")))
    return compared


def _summary(row: Row) -> dict[str, Any]:
    return {"latency_ms": row.latency_ms, "items_per_second": row.items_per_second}


def text(row: Row) -> str:
    """Return a row as lines for a person."""
    mark = " (SIMULATED)" if row.simulated else ""
    lines = [f"{row.geometry} {row.mode}{mark}: {row.workload}, batch {row.batch}, {row.load}"]
    lines.append(f"  {_rate(row)}; {latency_text(row)}; {row.clean} of {row.repeats} repeats clean")
    return "\n".join([*lines, *(f"  note: {note}" for note in row.notes)])


def _rate(row: Row) -> str:
    if row.items_per_second is None:
        return ", ".join(f"{count} {status}" for status, count in row.statuses.items())
    low, high = row.span or (row.items_per_second, row.items_per_second)
    return f"{row.items_per_second:.4g} items/s ({low:.4g} to {high:.4g})"


def latency_text(row: Row) -> str:
    """Return p50 and p99 with the interval, and what kind of latency it is."""
    kind = "latency from the scheduled arrival" if row.open_loop else "service time"
    if not row.latency_ms:
        return f"no {kind}"
    p50, p99 = row.latency_ms.get("p50"), row.latency_ms.get("p99")
    found = "" if p50 is None else f"p50 {p50:.4g} ms"
    if p99 is not None:
        found += f", p99 {p99:.4g} ms"
        if "p99" in row.interval_ms:
            found += " ({:.4g} to {:.4g})".format(*row.interval_ms["p99"])
    return f"{kind} {found}"


def require_usable(found: Sequence[Row]) -> Sequence[Row]:
    """Return the rows themselves if each says something.

    Raises:
        DataError: Some are contaminated in all repeats, or have too few samples; the message names the first.
    """
    bad = [row for row in found if not row.usable]
    if bad:
        why = bad[0].notes[0] if bad[0].notes else "too few samples"
        raise DataError(f"{len(bad)} of {len(found)} cells tell nothing; {bad[0].label}: {why}")
    return found
