"""Sharing: a partition against what else lets several processes use one device, all under the same load."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from migperf import measuring, sweeps
from migperf.backends import Backend, Instance
from migperf.errors import DeviceError
from migperf.loads import CLOSED, Load
from migperf.measuring import Result
from migperf.records import Writer
from migperf.workloads import Workload
from shared_core import InputError

Seen = Callable[[], str] | None


@dataclass(frozen=True)
class Arrangement:
    """A way for processes to share a device.

    Attributes:
        name: `whole`, `partition`, `unpinned`, `unpinned-matched`, `timeslice`, `mps`, `mps-capped`.
        mode: As records have it, unless the device is seen to be shared otherwise.
        workers: How many processes.
        enter: Gives their instances for the length of a block, and what says how they share in truth.
    """

    name: str
    mode: str
    workers: int
    enter: Callable[[], AbstractContextManager[tuple[Sequence[Instance], Seen]]]


def arrangements(
    backend: Backend, workers: int, partition: sweeps.Partition = sweeps.cut
) -> list[Arrangement]:
    """Return the ways in which so many processes can share this device.

    A CPU: the whole, equal partitions, and two unpinned rivals, one with the libraries' own threads and one
    with as many as a partition has cores. A GPU without MIG: the whole, time slices, MPS without and with a
    cap of its share. A MIG device: the whole instance against equal partitions; the rest needs MIG mode off.

    Raises:
        InputError: Fewer than two workers.
        DeviceError: The device cannot be cut into so many equal parts.
    """
    if workers < 2:
        raise InputError("expected at least 2 processes to share the device", field="workers", value=workers)
    if backend.kind == "gpu":
        return _on_gpu(backend, workers)
    profiles = [profile for profile in backend.profiles() if "+" not in profile.name]
    largest = max(profiles, key=lambda profile: (profile.slices, profile.size))
    equal = [profile for profile in profiles if profile.maximum >= workers]
    if not equal:
        raise DeviceError(f"{backend.layout.device} cannot be cut into {workers} equal parts")
    part = max(equal, key=lambda profile: (profile.slices, profile.size))
    split = f"{part.name}*{workers}"

    def within(geometry: str) -> Callable[[], AbstractContextManager[tuple[Sequence[Instance], Seen]]]:
        @contextmanager
        def enter() -> Iterator[tuple[Sequence[Instance], Seen]]:
            with partition(backend, geometry) as instances:
                yield instances, None

        return enter

    found = [
        Arrangement("whole", "whole", 1, within(largest.name)),
        Arrangement("partition", "partition", workers, within(split)),
    ]
    if backend.kind == "cpu":
        found += [
            Arrangement(mode, mode, workers, within(split)) for mode in ("unpinned", "unpinned-matched")
        ]
    return found


def _on_gpu(backend: Any, workers: int) -> list[Arrangement]:
    def shared(mode: str, processes: int, cap: float | None = None) -> Callable[[], Any]:
        @contextmanager
        def enter() -> Iterator[tuple[Sequence[Instance], Seen]]:
            with backend.share(mode, processes, cap) as sharing:
                yield sharing.instances, lambda: sharing.mode

        return enter

    @contextmanager
    def whole() -> Iterator[tuple[Sequence[Instance], Seen]]:
        with backend.share("timeslice", 1) as sharing:
            yield sharing.instances, None

    return [
        Arrangement("whole", "whole", 1, whole),
        Arrangement("timeslice", "timeslice", workers, shared("timeslice", workers)),
        Arrangement("mps", "mps", workers, shared("mps", workers)),
        Arrangement("mps-capped", "mps", workers, shared("mps", workers, 100 / workers)),
    ]


def share(
    backend: Backend,
    workload: Workload,
    workers: int = 2,
    load: Load = CLOSED,
    *,
    duration: float = 10.0,
    repeats: int = 3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    ways: Sequence[Arrangement] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> dict[str, Result]:
    """Measure a workload in every arrangement, interleaved at random.

    An arrangement that this device does not allow (no MPS installed) has no records; its `problem` says why.

    Args:
        backend: The device.
        workload: What each process does.
        workers: How many processes share the device.
        load: What asks each of them.
        duration: Seconds of each window.
        repeats: How often each arrangement is measured.
        seed: Of the order.
        folder: Where finished cells are kept; None keeps nothing.
        ways: The arrangements; all that the device has unless given.
        progress: Told how many are finished, of how many, and what comes next.
        options: Of `migperf.run`.

    Returns:
        Arrangement -> what it gave, in the order of `arrangements`.
    """
    chosen = arrangements(backend, workers) if ways is None else list(ways)
    writer = None if folder is None else Writer(folder, backend.simulated)
    results = {way.name: Result() for way in chosen}
    order = sweeps.interleaved(len(chosen), repeats, seed)
    run_id = ""
    for number, (index, repeat) in enumerate(order):
        way = chosen[index]
        if results[way.name].problem:
            continue
        if progress is not None:
            progress(number, len(order), way.name)
        cell = sweeps.Cell(f"share {way.name} x{way.workers}", (workload,), (load,), way.mode).name(duration)
        try:
            with way.enter() as (instances, seen):
                found = measuring.run(
                    workload, instances, backend, load, duration, 1, way.mode, run_id=run_id,
                    cell=cell, first_repeat=repeat, observed_mode=seen, **options,
                )  # fmt: skip
        except DeviceError as error:
            results[way.name].problem = str(error)
            continue
        run_id = found.records[0].run_id
        results[way.name].records += found.records
        results[way.name].raws |= found.raws
        if writer is not None:
            writer.append(found.records, found.raws)
    return results


def jain(rates: Sequence[float]) -> float:
    """Return Jain's fairness (Σx)²/(nΣx²): 1 if all get the same, 1/n if one gets all.

    >>> jain([5, 5, 5, 5]), jain([1, 0, 0, 0])
    (1.0, 0.25)
    """
    values = np.asarray(rates, dtype=float)
    if not len(values) or not np.any(values):
        raise InputError("expected at least one rate above 0", field="rates", value=list(rates))
    return float(values.sum() ** 2 / (len(values) * np.sum(values**2)))


def gain(parts: Sequence[float], whole: float) -> float:
    """Return the aggregate gain: the parts' throughputs together over that of the whole device."""
    if whole <= 0:
        raise InputError("expected a throughput above 0", field="whole", value=whole)
    return float(sum(parts) / whole)


def scaling_efficiency(rate: float, slices: int, one: float) -> float:
    """Return the throughput of an instance of k slices over k times that of one slice."""
    if slices < 1 or one <= 0:
        raise InputError("expected slices and a throughput above 0", field="one", value=one)
    return rate / (slices * one)


def interference(alone: Mapping[str, Any], together: Mapping[str, Any]) -> dict[str, float]:
    """Compare two summaries of the same service, without and with neighbours.

    Returns:
        `p99_ratio`, where both have a p99, and `throughput_loss` in 0 to 1, where both have a throughput.
    """
    found: dict[str, float] = {}
    tails = alone["latency_ms"].get("p99"), together["latency_ms"].get("p99")
    if None not in tails:
        found["p99_ratio"] = tails[1] / tails[0]
    rates = alone["items_per_second"], together["items_per_second"]
    if None not in rates and rates[0] > 0:
        found["throughput_loss"] = 1 - rates[1] / rates[0]
    return found
