"""Benches: what a configuration file says, run as it says, each finished repeat kept at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from migperf import loads, measuring, sweeps
from migperf.backends import Backend, Instance
from migperf.config import BenchConfig, DeviceConfig, JobConfig, read
from migperf.geometry import Geometry, Slot
from migperf.loads import Load
from migperf.records import Record, Writer
from migperf.workloads import Workload, parse
from shared_core import InputError

Open = Callable[[str], Backend]


def bench(
    config: BenchConfig | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    open_device: Open | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> list[Record]:
    """Run a configuration: one device after another, all its workers at once.

    Repeats that the folder holds already are not run again.

    Args:
        config: The configuration, or its file.
        folder: For records; of several devices each has a folder of its own in it.
        open_device: Opens a device by its spec.
        progress: Told how many repeats are finished, of how many, and what comes next.
        options: Of `migperf.run`.

    Returns:
        All records of the configuration, earlier ones included.

    Raises:
        InputError: The file is wrong, or a folder cannot be written to.
        GeometryError: A geometry cannot exist; nothing was measured.
    """
    known = config if isinstance(config, BenchConfig) else read(config)
    if open_device is None:
        from migperf.backends.opening import open as open_device
    jobs = {name: job_of(job) for name, job in known.jobs.items()}
    benches = [_Bench(one, open_device(one.spec), jobs) for one in known.devices]
    folders = [
        Path(folder, *([one.spec.replace(":", "-")] if len(benches) > 1 else [])) for one in known.devices
    ]
    if len(set(folders)) < len(folders):
        raise InputError("a device stands there twice: write its parts in one entry", field="gpus")
    found: list[Record] = []
    total = known.repeats * len(benches)
    for number, (one, place) in enumerate(zip(benches, folders, strict=True)):
        done = number * known.repeats
        found += one.run(
            place, known, lambda i, what, done=done: progress and progress(done + i, total, what), options
        )
    if progress is not None:
        progress(total, total, "")
    return found


def job_of(job: JobConfig) -> tuple[Workload, Load]:
    """Return what a job of the file does and what asks it.

    Raises:
        InputError: The workload or the load cannot be; the message names the job.
    """
    try:
        workload = parse(job.workload, mode=job.mode, batch=job.batch, **job.options)
        return workload, loads.from_spec(job.load)
    except InputError as error:
        place = f"job_configs.{job.name}" + (f".{error.field}" if error.field else "")
        raise InputError(error.message, field=place, value=error.value) from error


class _Bench:
    """One device of a configuration."""

    def __init__(
        self, config: DeviceConfig, backend: Backend, jobs: dict[str, tuple[Workload, Load]]
    ) -> None:
        self.config, self.backend = config, backend
        if config.mode == "partition":
            slots = [Geometry.parse(profile, backend).slots[0] for profile, _ in config.parts]
            self.geometry = Geometry(backend.layout, tuple(slots)).require()
            order = _ranks(slots)
        else:
            self.geometry = Geometry(backend.layout)
            order = list(range(len(config.parts)))
        self.names = [config.parts[index][1] for index in order]
        self.workloads = tuple(jobs[name][0] for name in self.names)
        self.loads = tuple(jobs[name][1] for name in self.names)

    @property
    def cell(self) -> sweeps.Cell:
        where = str(self.geometry) if self.config.mode == "partition" else f"whole x{len(self.names)}"
        return sweeps.Cell(where, self.workloads, self.loads, self.config.mode)

    def run(
        self, folder: Path, config: BenchConfig, tell: Callable[[int, str], Any], options: dict[str, Any]
    ) -> list[Record]:
        writer = Writer(folder, self.backend.simulated)
        name = self.cell.name(config.duration)
        run_id = writer.written[0].run_id if writer.written else ""
        for repeat in range(config.repeats):
            tell(repeat, f"{self.config.spec} {self.cell.geometry}")
            if (name, repeat) in writer.finished:
                continue
            with self._cut() as (instances, seen):
                result = measuring.run(
                    self.workloads, instances, self.backend, self.loads, config.duration, 1, self.config.mode,
                    run_id=run_id, cell=name, first_repeat=repeat, observed_mode=seen, **options,
                )  # fmt: skip
            run_id = result.records[0].run_id
            writer.append(result.records, result.raws)
        return [record for record in writer.written if record.cell == name]

    @contextmanager
    def _cut(self) -> Iterator[tuple[Sequence[Instance], Callable[[], str] | None]]:
        if self.config.mode == "partition":
            with sweeps.cut(self.backend, str(self.geometry)) as instances:
                yield instances, None
            return
        share: Any = getattr(self.backend, "share", None)
        if share is None:
            raise InputError(
                "has no time slices or MPS: set mig to true", field="device", value=self.config.spec
            )
        within: AbstractContextManager[Any] = share(self.config.mode, len(self.names))
        with within as sharing:
            yield sharing.instances, lambda: sharing.mode


def _ranks(slots: Sequence[Slot]) -> list[int]:
    """Return the order in which a geometry has its slots: the largest first."""
    return sorted(range(len(slots)), key=lambda index: slots[index].order)
