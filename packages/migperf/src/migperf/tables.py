"""Tables: what records say of each workload on each profile at each batch, over the repeats."""

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal

import numpy as np

from migperf.errors import DataError
from migperf.records import Record, read
from shared_core import InputError

Source = Literal["measured", "predicted"]
CellStatus = Literal["ok", "oom", "failed", "insufficient"]
Key = tuple[str, str, int]
"""Workload, profile's name, batch."""

_OF_A_PROFILE = ("partition", "whole")  # other modes share an instance, and say nothing of a profile alone


@dataclass(frozen=True)
class Spread:
    """A number over repeats: their median, and the range they (and their own intervals) cover."""

    middle: float
    low: float
    high: float
    repeats: int = 1

    def scaled(self, factor: float) -> "Spread":
        """Return the spread in another unit."""
        return replace(self, middle=self.middle * factor, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True)
class OpenLoop:
    """What happened when items arrived at a rate, whatever the server was doing.

    Attributes:
        rate: Items per second that arrived.
        status: `ok`, or `saturated` (then there is no latency, only what was achieved), or `insufficient`.
        latency_ms: By percentile (`p99`), from scheduled arrival to completion.
        achieved: Items per second that were completed.
    """

    rate: float
    status: Literal["ok", "saturated", "insufficient"]
    latency_ms: Mapping[str, Spread] = field(default_factory=dict)
    achieved: Spread | None = None


@dataclass(frozen=True)
class Cell:
    """A workload at a batch in an instance of a profile.

    Attributes:
        workload: Key of the workload, see `workload_key`.
        profile: Name of the profile.
        batch: Items of a step.
        status: What is known; `oom` if it ran out of memory once.
        throughput: Items per second of the closed loop; None unless it was measured (or predicted).
        service_ms: Time of one step without a queue: `mean`, and percentiles where they are known.
        open_loop: By ascending rate.
        memory_mib: Largest peak over the repeats.
        joules_per_item: Of the whole board.
        source: `predicted` where a law stands in for a measurement.
        message: Why it is not ok, or what the prediction rests on.
    """

    workload: str
    profile: str
    batch: int
    status: CellStatus
    throughput: Spread | None = None
    service_ms: Mapping[str, Spread] = field(default_factory=dict)
    open_loop: tuple[OpenLoop, ...] = ()
    memory_mib: float | None = None
    joules_per_item: Spread | None = None
    source: Source = "measured"
    message: str = ""


@dataclass(frozen=True)
class Table:
    """All cells of one device.

    Attributes:
        device: Model of the device.
        simulated: Whether any of it comes from a model and not from a clock.
        cells: By workload, profile and batch.
        records: Records it was made of.
        contaminated: Records left out because other load was on the machine.
    """

    device: str
    simulated: bool
    cells: Mapping[Key, Cell]
    records: int = 0
    contaminated: int = 0

    def workloads(self) -> list[str]:
        """Return the keys of all workloads."""
        return sorted({workload for workload, _, _ in self.cells})

    def batches(self, workload: str) -> list[int]:
        """Return the batches at which a workload has a cell."""
        return sorted({batch for name, _, batch in self.cells if name == workload})

    def resolve(self, name: str, mode: str) -> str:
        """Return the one workload that a name means: `model`, `source/model`, and any of its options.

        Raises:
            InputError: None does, or several do; the message lists them.
        """
        of_mode = [key for key in self.workloads() if key.split()[1:2] == [mode]]
        if name in of_mode:
            return name
        model, *options = name.split()
        found = [
            key
            for key in of_mode
            if model in (key.split()[0], key.split()[0].partition("/")[2])
            and set(options) <= set(key.split()[1:])
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"means several: {'; '.join(found)}", field="workload", value=name)
        near = difflib.get_close_matches(name, [key.split()[0] for key in of_mode], 1, 0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        known = "; ".join(of_mode) or "none"
        raise InputError(
            f"no {mode} of it was measured{hint} (there are: {known})", field="workload", value=name
        )


def workload_key(spec: Mapping[str, Any]) -> str:
    """Name a workload by all of its spec but batch and seed: `torchvision/resnet50 infer image=64`.

    >>> workload_key({"source": "timm", "model": "vit", "mode": "train", "batch": 8, "seed": 0, "image": 32})
    'timm/vit train image=32'
    """
    apart = {"source", "model", "mode", "batch", "seed"}
    rest = {
        key: value for key, value in sorted(spec.items()) if key not in apart and value not in (None, {}, "")
    }
    options = [
        f"{key}={json.dumps(value, separators=(',', ':')).strip(chr(34))}" for key, value in rest.items()
    ]
    model = spec["model"]
    name = model if not spec.get("source") or "/" in model else f"{spec['source']}/{model}"
    return " ".join([name, spec["mode"], *(option.replace(" ", "_") for option in options)])


def offered_rate(record: Record) -> float | None:
    """Return the items per second that arrive in an open loop; None for a closed one.

    A request is a whole batch, unless the server gathers single items into batches (`collect` above 1).
    """
    rate = record.load.get("rate")
    if record.load.get("kind") == "closed" or rate is None:
        return None
    gathers = int(record.load.get("collect") or 1) > 1
    return float(rate) * (1 if gathers else int(record.workload.get("batch", 1)))


def batch_of(record: Record) -> int:
    """Return the most items of one step: the workload's batch, or what an open loop gathers into one."""
    return max(int(record.workload.get("batch", 1)), int(record.load.get("collect") or 1))


def table_from_records(records: Iterable[Record], *, device: str | None = None, mixed: bool = False) -> Table:
    """Make the table of one device.

    Contaminated records are left out and counted; a cell that ran out of memory once, or failed each time,
    stays as such and never becomes a 0.

    Args:
        records: Of any number of runs.
        device: Model of the device, where the records are of several.
        mixed: Whether real and simulated records may be in one table (which then counts as simulated).

    Raises:
        InputError: Records are of several devices, or real and simulated ones are mixed.
        DataError: No clean record is left.
    """
    chosen = [record for record in records if device is None or record.device == device]
    devices = sorted({record.device for record in chosen})
    if len(devices) > 1:
        raise InputError(f"records are of several devices, choose one: {', '.join(devices)}", field="device")
    if len({record.simulated for record in chosen}) > 1 and not mixed:
        raise InputError("real and simulated records are not mixed unless asked for", field="simulated")
    cells: dict[Key, list[Record]] = defaultdict(list)
    contaminated = 0
    for record in chosen:
        if record.contaminated:
            contaminated += 1
        elif record.mode in _OF_A_PROFILE and record.profile:
            cells[workload_key(record.workload), record.profile, batch_of(record)].append(record)
    if not cells:
        raise DataError(
            f"no clean record of a partition among {len(chosen)} ({contaminated} contaminated)",
            field="records",
        )
    return Table(
        device=devices[0],
        simulated=any(record.simulated for record in chosen),
        cells={key: _cell(key, of_cell) for key, of_cell in sorted(cells.items())},
        records=len(chosen),
        contaminated=contaminated,
    )


def as_table(table: Table | str | os.PathLike[str]) -> Table:
    """Return a table as it is, or that of a folder of records."""
    return table if isinstance(table, Table) else table_from_records(read(table))


def _cell(key: Key, records: Sequence[Record]) -> Cell:
    closed = [r for r in records if offered_rate(r) is None]
    fast = _by_concurrency(closed, max)
    slow = _by_concurrency(closed, min)
    peaks = [r.peak_memory_mib for r in records if r.status != "oom" and r.peak_memory_mib is not None]
    open_loop = _open_loop([r for r in records if offered_rate(r) is not None])
    energies = [
        r.energy_joules / (r.items_per_second * r.window_seconds)
        for r in fast
        if r.energy_joules is not None and r.items_per_second and r.window_seconds
    ]
    statuses = [r.status for r in records]
    status: CellStatus = "ok"
    if "oom" in statuses:
        status = "oom"
    elif not fast and not any(load.status != "insufficient" for load in open_loop):
        status = "insufficient" if "insufficient" in statuses else "failed"
    ran = status != "oom"
    return Cell(
        *key,
        status=status,
        throughput=spread([r.items_per_second for r in fast if r.items_per_second]) if ran else None,
        service_ms=_latencies(slow) if ran else {},
        open_loop=open_loop if ran else (),
        memory_mib=max(peaks, default=None),
        joules_per_item=spread(energies) if ran else None,
        message=next((r.message for r in records if r.status in ("oom", "failed") and r.message), ""),
    )


def _by_concurrency(closed: Sequence[Record], pick: Any) -> list[Record]:
    """Return the measured records of the least or the most concurrency that was tried."""
    measured = [r for r in closed if r.status == "ok" and r.items_per_second]
    if not measured:
        return []
    chosen = pick(int(r.load.get("concurrency") or 1) for r in measured)
    return [r for r in measured if int(r.load.get("concurrency") or 1) == chosen]


def _open_loop(records: Sequence[Record]) -> tuple[OpenLoop, ...]:
    by_rate: dict[float, list[Record]] = defaultdict(list)
    for record in records:
        by_rate[offered_rate(record) or 0.0].append(record)
    loads = []
    for rate, of_rate in sorted(by_rate.items()):
        known = [r for r in of_rate if r.status in ("ok", "saturated")]
        if not known:
            loads.append(OpenLoop(rate, "insufficient"))
            continue
        saturated = any(r.status == "saturated" for r in known)
        latencies = {} if saturated else _latencies(known)
        achieved = spread([r.items_per_second for r in known if r.items_per_second])
        loads.append(OpenLoop(rate, "saturated" if saturated else "ok", latencies, achieved))
    return tuple(loads)


def _latencies(records: Sequence[Record]) -> dict[str, Spread]:
    """Return the latencies that every record has: a percentile is refused below its least sample."""
    names = (
        [name for name in records[0].latency_ms if all(name in r.latency_ms for r in records)]
        if records
        else []
    )
    found = {}
    for name in names:
        middle = spread([r.latency_ms[name] for r in records])
        ends = [end for r in records for end in r.latency_interval_ms.get(name, ())]
        if middle is not None:
            ends += [middle.low, middle.high]
            found[name] = replace(middle, low=min(ends), high=max(ends))
    return found


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and range; None of nothing.

    >>> spread([3.0, 1.0, 2.0])
    Spread(middle=2.0, low=1.0, high=3.0, repeats=3)
    """
    if not values:
        return None
    return Spread(float(np.median(values)), float(min(values)), float(max(values)), len(values))


def official_a100() -> Table:
    """Return the figures that the official project's charts show for one A100 of 40 GB.

    One instance at a time, closed loop; `service_ms` is batch over throughput. Cells that ran out of memory
    are there as such. Source: the bar labels of its published charts.
    """
    text = resources.files("migperf").joinpath("data/official_a100.json").read_text(encoding="utf-8")
    data = json.loads(text)
    cells: dict[Key, Cell] = {}
    for row in data["rows"]:
        workload = f"{row['workload']} {row['mode']}"
        for profile, value in zip(data["profiles"], row["items_per_second"], strict=True):
            key = (workload, profile, row["batch"])
            if value == "OOM":
                cells[key] = Cell(*key, status="oom", message="out of memory in the official chart")
                continue
            rate = Spread(float(value), float(value), float(value))
            milliseconds = 1000.0 * row["batch"] / value
            service = {"mean": Spread(milliseconds, milliseconds, milliseconds)}
            cells[key] = Cell(*key, status="ok", throughput=rate, service_ms=service)
    return Table(device=data["device"], simulated=False, cells=cells, records=len(cells))
