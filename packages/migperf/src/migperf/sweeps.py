"""Sweeps: geometries times workloads times loads, interleaved at random, each finished cell kept at once.

The protocol: at least three repeats, geometries interleaved in random order, so that a drift of the machine
does not look like a difference between geometries.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from migperf import loads, measuring
from migperf.backends import Backend, Instance
from migperf.loads import CLOSED, Load
from migperf.records import Record, Writer
from migperf.workloads import Workload
from shared_core import InputError

Partition = Callable[[Backend, str], AbstractContextManager[Sequence[Instance]]]
"""Cuts the device as the text says for the length of a block, and puts it back."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        geometry: Of the device, `3g.20gb@4,1g.5gb*2`.
        workloads: One for all instances, or one each in the geometry's order, largest first.
        loads: Likewise.
        mode: As for `migperf.run`.
    """

    geometry: str
    workloads: tuple[Workload, ...]
    loads: tuple[Load, ...] = (CLOSED,)
    mode: str = "partition"

    def name(self, duration: float) -> str:
        """Return what names the cell in records: readable, and different for all that differs."""
        specs = [[one.spec for one in self.workloads], [loads.spec_of(one) for one in self.loads], duration]
        same = json.loads(json.dumps(specs), parse_int=float)  # 2 s are 2.0 s
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
        what = "+".join(f"{one.name} {one.mode} b{one.batch}" for one in self.workloads)
        how = "+".join(_short(one) for one in self.loads)
        return f"{self.geometry} {self.mode} {what} {how} #{digest}"


def _short(load: Load) -> str:
    spec = loads.spec_of(load)
    return f"{spec['kind']} {spec.get('rate', spec.get('concurrency')):g}"


def cells(
    geometries: Sequence[str],
    workloads: Sequence[Workload],
    load: Sequence[Load] = (CLOSED,),
    mode: str = "partition",
) -> list[Cell]:
    """Return every geometry with every workload under every load, the same in all instances."""
    return [
        Cell(geometry, (workload,), (one,), mode)
        for geometry in geometries
        for workload in workloads
        for one in load
    ]


def interleaved(count: int, repeats: int, seed: int) -> list[tuple[int, int]]:
    """Return (index of the cell, repeat): in each repeat all cells, in a random order of its own.

    >>> sorted(interleaved(2, 2, seed=0))
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    rng = np.random.default_rng(seed)
    return [(int(index), repeat) for repeat in range(repeats) for index in rng.permutation(count)]


@contextmanager
def cut(backend: Backend, geometry: str) -> Iterator[Sequence[Instance]]:
    """Cut a device for the length of a block; see `migperf.partitioned`."""
    from migperf.geometry import Geometry
    from migperf.journal import partitioned

    with partitioned(backend, Geometry.parse(geometry, backend)) as instances:
        yield instances


def sweep(
    backend: Backend,
    wanted: Sequence[Cell],
    folder: str | os.PathLike[str],
    *,
    duration: float = 10.0,
    repeats: int = 3,
    seed: int = 0,
    partition: Partition = cut,
    progress: Callable[[int, int, str], None] | None = None,
    model: Any = None,
    **options: Any,
) -> list[Record]:
    """Measure all cells and keep each as it is finished.

    What the folder holds already is not measured again, so a sweep that was interrupted goes on where it
    stopped. An interruption (Ctrl-C) puts the device back, keeps what is finished, and is raised.

    Args:
        backend: The device.
        wanted: What to measure, each once a repeat.
        folder: For records and raw latencies.
        duration: Seconds of each window.
        repeats: How often each cell is measured.
        seed: Of the order.
        partition: Cuts the device for the length of a block.
        progress: Told how many are finished, of how many, and what comes next.
        model: For simulated devices.
        options: `timeout`, `warmup_seconds` of `migperf.run`.

    Returns:
        All records of the wanted cells, earlier ones included.

    Raises:
        InputError: A cell stands there twice; the folder cannot be written to, or is another device's.
        GeometryError: A geometry cannot exist; nothing was measured.
    """
    names = [cell.name(duration) for cell in wanted]
    if len(set(names)) < len(names):
        raise InputError("a cell stands there twice", field="cells", value=_first_double(names))
    if not wanted:
        raise InputError("there is nothing to measure", field="cells")
    if partition is cut:
        _check_geometries(backend, wanted)
    writer = Writer(folder, backend.simulated)
    _check_device(writer, backend)
    run_id = writer.written[0].run_id if writer.written else ""
    todo = interleaved(len(wanted), repeats, seed)
    finished = writer.finished
    left = [(index, repeat) for index, repeat in todo if (names[index], repeat) not in finished]
    for number, (index, repeat) in enumerate(left):
        if progress is not None:
            progress(len(todo) - len(left) + number, len(todo), names[index])
        result = _measure(
            backend, wanted[index], names[index], partition, repeat,
            run_id=run_id, duration=duration, model=model, **options,
        )  # fmt: skip
        run_id = result.records[0].run_id
        writer.append(result.records, result.raws)
    if progress is not None:
        progress(len(todo), len(todo), "")
    asked = {(name, repeat) for name in names for repeat in range(repeats)}
    return [record for record in writer.written if (record.cell, record.repeat) in asked]


def _measure(
    backend: Backend, cell: Cell, name: str, partition: Partition, repeat: int, **options: Any
) -> measuring.Result:
    with partition(backend, cell.geometry) as instances:
        workloads = cell.workloads * len(instances) if len(cell.workloads) == 1 else cell.workloads
        given = cell.loads * len(instances) if len(cell.loads) == 1 else cell.loads
        result = measuring.run(
            workloads, instances, backend, given, mode=cell.mode,
            cell=name, repeats=1, first_repeat=repeat, **options,
        )  # fmt: skip
    if cell.mode.startswith("unpinned"):
        result.records = [replace(record, geometry=cell.geometry) for record in result.records]
    return result


def _check_geometries(backend: Backend, wanted: Sequence[Cell]) -> None:
    from migperf.geometry import Geometry

    for geometry in dict.fromkeys(cell.geometry for cell in wanted):
        Geometry.parse(geometry, backend).require()


def _check_device(writer: Writer, backend: Backend) -> None:
    others = {record.device for record in writer.written} - {backend.layout.device}
    if others:
        names = ", ".join(sorted(others))
        raise InputError(
            f"holds records of {names}: choose another folder for {backend.layout.device}", file=writer.path
        )


def _first_double(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
