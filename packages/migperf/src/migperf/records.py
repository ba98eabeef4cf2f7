"""Records: what one measurement was and what it gave, one JSON line each, raw latencies beside it."""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from shared_core import InputError, files

SCHEMA = 1

Status = Literal["ok", "oom", "failed", "saturated", "insufficient"]
"""`ok`; `oom`: out of memory, nothing else is known; `failed`; `saturated`: the queue grew without end, so no
percentile is given; `insufficient`: too short or too few samples."""


@dataclass(frozen=True)
class Record:
    """One worker's measurement in one cell (a geometry with its workloads and loads) and one repeat.

    Attributes:
        run_id: Of the sweep or bench; with `cell`, `repeat` and `worker` it names the record.
        cell: Of the sweep.
        repeat: From 0.
        worker: From 0, in the order of instances.
        started: UTC, ISO 8601.
        backend: Kind of backend.
        device: Model of the device.
        simulated: Whether any number comes from a model and not from a clock.
        contaminated: Why the run tells nothing of the partition ("" if it does).
        mode: How the device was shared: `partition`, `whole`, `timeslice`, `mps`, `unpinned`,
            `unpinned-matched`.
        geometry: Of all instances, `3g.20gb@4,2g.10gb@0`.
        instance: The worker's own, `2g.10gb@0`; "" where it has none.
        profile: Its profile's name.
        slices: Its compute slices.
        memory_slices: Its length on the memory axis.
        workload: Spec: source, model, mode ("infer", "train", "generate"), batch, shapes, dtype, seed.
        load: Spec: kind ("closed", "poisson", "constant", "gamma"), concurrency or rate, seed, duration.
        status: What it came to.
        message: One line, where the status is not ok.
        items_per_second: Of the measured window; None unless measured.
        latency_ms: mean, p50, p90, p95, p99, max; p99 is left out below 100 samples. Closed loop: service
            time. Open loop: from the scheduled arrival to completion.
        latency_interval_ms: 95 % interval by percentile, p50 -> (low, high).
        samples: Requests or steps measured.
        window_seconds: Length of the overlap window.
        peak_memory_mib: Largest memory of the worker's device (GPU) or process (CPU).
        energy_joules: Of the whole board in the window; None where there is no counter.
        metrics: Means of samplers in the window, and facts such as send lag, backlog, core share.
        host: Facts about host and software.
        raw: Name of the file of raw latencies beside the records; "" if there is none.
        extra: Whatever a workload adds (time to first token), and warnings.
        schema: Version of this list of fields.
        workers: How many workers the cell has; it is finished when each of them has its record.
    """

    run_id: str
    cell: str
    repeat: int
    worker: int
    started: str
    backend: str
    device: str
    simulated: bool
    contaminated: str
    mode: str
    geometry: str
    instance: str
    profile: str
    slices: int
    memory_slices: int
    workload: dict[str, Any]
    load: dict[str, Any]
    status: Status
    message: str = ""
    items_per_second: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_interval_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: int = 0
    window_seconds: float = 0.0
    peak_memory_mib: float | None = None
    energy_joules: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    raw: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    workers: int = 1


def file_name(simulated: bool) -> str:
    """Return the name of the file of records: one that says so where they are simulated."""
    return "records.simulated.jsonl" if simulated else "records.jsonl"


class Writer:
    """Appends finished cells to a folder, so that an interrupted sweep keeps them and goes on after them.

    What a killed process left of a line is cut off: its cell counts as not finished.

    Args:
        folder: Made if it is not there.
        simulated: Which kind of records it takes.
        mixed: Whether both kinds may stand in one file.

    Raises:
        InputError: The folder cannot be written to, or the file holds records of the other kind.
    """

    def __init__(self, folder: str | os.PathLike[str], simulated: bool, *, mixed: bool = False) -> None:
        self.folder, self.simulated, self.mixed = Path(folder), simulated, mixed
        self.path = self.folder / file_name(simulated)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot be made: {error.strerror}", file=self.folder) from error
        if not os.access(self.folder, os.W_OK) or (self.path.exists() and not os.access(self.path, os.W_OK)):
            raise InputError("cannot be written to", file=self.folder)
        _cut_torn_line(self.path)
        self.written = read(self.path, mixed=True) if self.path.exists() else []
        if not mixed and any(record.simulated is not simulated for record in self.written):
            raise _mixed(self.path)

    def append(self, records: Sequence[Record], raws: Mapping[str, Any] | None = None) -> None:
        """Add the records of one cell at once, after their raw latencies.

        Args:
            records: Of one cell and repeat.
            raws: Name of the file -> latencies in ns, as the records name them.
        """
        import numpy as np

        if not self.mixed and any(record.simulated is not self.simulated for record in records):
            raise _mixed(self.path)
        for name, latencies in (raws or {}).items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            with files.atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
                np.save(file, latencies, allow_pickle=False)
        text = "".join(to_line(record) for record in records)
        with open(self.path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.written += records

    @property
    def finished(self) -> set[tuple[str, int]]:
        """Cells and repeats that need not be measured again."""
        return finished(self.written)


def to_line(record: Record) -> str:
    """Return the record as one line of JSON."""
    return json.dumps(asdict(record), allow_nan=False, ensure_ascii=False, default=str) + "\n"


def from_fields(values: Mapping[str, Any], where: str = "") -> Record:
    """Make a record of the fields of a line.

    Raises:
        InputError: A field is missing, or the schema is one that this version does not know.
    """
    if values.get("schema") != SCHEMA:
        raise InputError(f"{where}expected schema {SCHEMA}", field="schema", value=values.get("schema"))
    known = {one.name for one in fields(Record)}
    given = {name: value for name, value in values.items() if name in known}
    intervals = given.get("latency_interval_ms") or {}
    given["latency_interval_ms"] = {name: (low, high) for name, (low, high) in intervals.items()}
    try:
        return Record(**given)
    except TypeError as error:
        raise InputError(f"{where}is no record: {error}") from error


def read(path: str | os.PathLike[str], *, mixed: bool = False) -> list[Record]:
    """Read the records of a file, or of all files of a folder.

    The last line may be torn: the process that wrote it was killed, and its cell is not finished.

    Args:
        path: A file, or a folder with `records.jsonl` or `records.simulated.jsonl`.
        mixed: Whether real and simulated records may come together.

    Raises:
        InputError: There is none, a line other than the last is no record, or the kinds are mixed.
    """
    folder = Path(path)
    if folder.is_dir():
        paths = [folder / file_name(simulated) for simulated in (False, True)]
        paths = [one for one in paths if one.exists()]
        if not paths:
            raise InputError(f"has no {file_name(False)} and no {file_name(True)}", file=path)
    else:
        paths = [folder]
    found = [record for one in paths for record in _read_file(one)]
    if not mixed and len({record.simulated for record in found}) > 1:
        raise _mixed(path)
    return found


def _read_file(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"line {number} is no JSON: {error}", file=path) from error
        if not isinstance(values, dict):
            raise InputError(f"line {number} is no record", file=path)
        found.append(from_fields(values, f"{path}: line {number}: "))
    return found


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(len(data) - len(tail))
        else:
            file.write(b"\n")  # only the end of the line was lost


def _mixed(path: str | os.PathLike[str]) -> InputError:
    return InputError("real and simulated records are not mixed unless asked for", file=path)


def finished(records: Iterable[Record]) -> set[tuple[str, int]]:
    """Return the cells and repeats of which every worker has its record."""
    workers: dict[tuple[str, int], set[int]] = defaultdict(set)
    expected: dict[tuple[str, int], int] = {}
    for record in records:
        workers[record.cell, record.repeat].add(record.worker)
        expected[record.cell, record.repeat] = record.workers
    return {key for key, seen in workers.items() if len(seen) >= expected[key]}


def write_csv(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Write the records as a table: one column a field, nested fields as `latency_ms.p99`."""
    rows = [dict(_flat(asdict(record))) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with files.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", json.dumps(value, default=str)
        else:
            yield f"{prefix}{name}", value


def raw_latencies(records: Sequence[Record], folder: str | os.PathLike[str]) -> Any:
    """Return the raw latencies of the records, pooled, in ns.

    Raises:
        InputError: A file is missing.
    """
    import numpy as np

    parts = []
    for name in [record.raw for record in records if record.raw]:
        try:
            parts.append(np.load(Path(folder, name), allow_pickle=False))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", file=Path(folder, name)) from error
    return np.concatenate(parts) if parts else np.array([], dtype=np.int64)
