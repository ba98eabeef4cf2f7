"""Numbers for devices that exist only as tables: a stated model, and the real drivers on a simulated clock.

A step of `batch` items takes max(floor, batch · (A/SM + B/MEM)): the two-resource law, with the floor below
which no instance shortens it; SM and MEM are compute and memory slices. All that comes from here is marked
simulated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from migperf import loads
from migperf.profiles import Profile
from migperf.workloads import Workload

if TYPE_CHECKING:
    from migperf.measuring import CellRun


@dataclass(frozen=True)
class Model:
    """How long a step takes and what memory it needs, in an instance of a device that does not exist.

    Attributes:
        floor_ms: Of a step that does not fill the instance.
        compute_ms: A: per item, of one compute slice.
        memory_ms: B: per item, of one memory slice.
        base_mib: Memory that any batch needs.
        item_mib: Memory per item.
    """

    floor_ms: float
    compute_ms: float
    memory_ms: float
    base_mib: float = 1000.0
    item_mib: float = 20.0

    def step_ms(self, profile: Profile, batch: int) -> float:
        """Return the milliseconds of a step."""
        return max(self.floor_ms, batch * (self.compute_ms / profile.slices + self.memory_ms / profile.size))

    def memory_mib(self, batch: int) -> float:
        """Return the memory that the batch needs, in MiB."""
        return self.base_mib + batch * self.item_mib


INFERENCE = Model(11.0, 0.678, 0.880, item_mib=10.0)
"""Fitted on BERT-base inference on 1g and 7g of an A100 at batch 256, with the floor of its small batches
(the official project's charts)."""

TRAINING = Model(31.0, 6.5, 13.1, 1000.0, 150.0)
"""Close to ViT-B/16 training on the same device, memory included: batch 32 does not fit into 5 GB."""


def default_model(workload: Workload) -> Model:
    """Return the model of a workload for which none was given."""
    return TRAINING if workload.mode == "train" else INFERENCE


def simulate(
    cell: "CellRun", model: Model | Mapping[str, Model] | Callable[[Workload], Model] | None
) -> None:
    """Fill in the records of a cell: the same drivers, schedules and windows, on a clock that jumps."""
    for index, part in enumerate(cell.parts):
        chosen = _choose(model, part.workload)
        profile = part.instance.profile
        collect = part.load.collect if isinstance(part.load, loads.Open) else 1
        needed = chosen.memory_mib(part.workload.batch * collect)
        if profile.memory_mib is not None and needed > profile.memory_mib:
            message = f"needs {needed:.0f} MiB, {profile.name} has {profile.memory_mib:.0f} MiB (simulated)"
            cell.records.append(cell.record(index, "oom", message))
            continue
        clock = loads.SimulatedClock()

        def step(
            requests: int, clock: loads.SimulatedClock = clock, index: int = index, model: Model = chosen
        ) -> None:
            part = cell.parts[index]
            clock.advance(model.step_ms(part.instance.profile, part.workload.batch * requests) * 1e6)

        trim = round(chosen.step_ms(profile, part.workload.batch) * 1e6)
        stop = round(cell.duration * 1e9) + 2 * trim
        if isinstance(part.load, loads.Open):
            timings = loads.drive_open(part.load, loads.arrivals(part.load, stop / 1e9), step, clock, 0)
        else:  # one device serves threads one after another
            timings = loads.drive_closed(replace(part.load, concurrency=1), step, stop, clock, 0)
        record = cell.from_timings(index, timings, trim, stop - trim, len(cell.parts))
        extra = {**record.extra, "model": vars(chosen)}
        cell.records.append(replace(record, peak_memory_mib=needed, extra=extra))


def _choose(
    model: Model | Mapping[str, Model] | Callable[[Workload], Model] | None, workload: Workload
) -> Model:
    if model is None:
        return default_model(workload)
    if isinstance(model, Model):
        return model
    if isinstance(model, Mapping):
        return model.get(workload.name) or default_model(workload)
    return model(workload)
