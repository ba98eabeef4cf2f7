"""Parts: which worker of a cell runs where, does what, and is asked by which load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from migperf import loads
from migperf.backends import Backend, Instance, Launch
from migperf.loads import CLOSED, Closed, Load, Open
from migperf.workloads import Workload
from shared_core import InputError

MODES = ("partition", "whole", "timeslice", "mps", "unpinned", "unpinned-matched")


@dataclass(frozen=True)
class Part:
    """One worker of a cell: where it runs, what it does, and what asks it to."""

    instance: Instance
    workload: Workload
    load: Load
    launch: Launch


def assign(
    workloads: Workload | Sequence[Workload],
    instances: Sequence[Instance],
    backend: Backend,
    load: Load | Sequence[Load] = CLOSED,
    mode: str = "partition",
) -> list[Part]:
    """Give each instance its workload and load, and its worker the way into it.

    Raises:
        InputError: There is no instance, the numbers differ, the mode is unknown, or a load gathers requests
            that are batches already.
    """
    if mode not in MODES:
        raise InputError(f"expected one of {', '.join(MODES)}", field="mode", value=mode)
    if not instances:
        raise InputError("there is no instance to run in", field="instances")
    every = [workloads] * len(instances) if isinstance(workloads, Workload) else list(workloads)
    asked = [load] * len(instances) if isinstance(load, Closed | Open) else list(load)
    for name, given in (("workloads", every), ("load", asked)):
        if len(given) != len(instances):
            raise InputError(f"expected 1 or {len(instances)}, one an instance", field=name, value=len(given))
    parts = []
    for instance, workload, one in zip(instances, every, asked, strict=True):
        if isinstance(one, Open) and one.collect > 1 and (workload.batch > 1 or workload.mode == "train"):
            raise InputError(
                "only single items of inference are gathered: batch 1", field="collect", value=one.collect
            )
        launch = backend.launch(instance)
        if mode.startswith("unpinned"):
            threads = launch.threads if mode == "unpinned-matched" else None
            launch = replace(launch, cpus=None, threads=threads)
        parts.append(Part(instance, workload, one, launch))
    return parts


def name_of(instance: Instance) -> str:
    """Return `3g.20gb@4`."""
    return f"{instance.profile.name}@{instance.start}"


def cell_name(parts: Sequence[Part], mode: str) -> str:
    """Return what names a cell: mode, instances, workloads and loads."""

    def of(part: Part) -> str:
        spec = loads.spec_of(part.load)
        how = f"{spec['kind']}{spec.get('rate') or spec.get('concurrency')}"
        w = part.workload
        return f"{name_of(part.instance)}={w.name},{w.mode},b{w.batch},{how}"

    return f"{mode} " + " ".join(of(part) for part in parts)


def own_schedule(load: Load, worker: int, repeat: int) -> Load:
    """Give each worker and repeat a schedule of its own, named by its seed in the record."""
    seed = getattr(load, "seed", None)
    return load if seed is None else replace(load, seed=seed + 1009 * repeat + worker)  # pyright: ignore[reportCallIssue]
