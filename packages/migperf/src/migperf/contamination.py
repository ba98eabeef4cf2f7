"""The contamination guard: whether a run measured the partition, or what else the machine was doing."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migperf.samplers.procfs import CpuSampler, ProcessSampler

CORE_SHARE_LEAST = 0.95
FOREIGN_MOST = 0.05
FOREIGN_BEFORE_MOST = 0.10
"""Before the start it is watched for a quarter of a second, where one tick is 2 %."""
BASELINE_SECONDS = 0.25


@dataclass(frozen=True)
class Evidence:
    """What was seen of one worker's window.

    Attributes:
        pinned: Whether the worker has CPUs of its own.
        core_share: Processor time that it got of what it asked for while it was busy, in 0 to 1.
        foreign_cores: Cores' worth of others' work on the CPUs concerned, in the window.
        foreign_before: Likewise before the workers started.
        stolen_cores: Cores' worth that the hypervisor gave to other machines.
        cores: How many CPUs are concerned.
        gpu_processes: Processes of others on the GPU.
        slowdowns: Why the GPU's clocks were low.
        pressure: Share of the window in which some process of the machine waited for a CPU; only recorded.
    """

    pinned: bool = False
    core_share: float | None = None
    foreign_cores: float | None = None
    foreign_before: float | None = None
    stolen_cores: float | None = None
    cores: int = 1
    gpu_processes: tuple[int, ...] = ()
    slowdowns: tuple[str, ...] = ()
    pressure: float | None = None


def verdict(evidence: Evidence) -> str:
    """Return why the run tells nothing of the partition, "" if nothing speaks against it."""
    found: list[str] = []
    share, cores = evidence.core_share, evidence.cores
    if evidence.pinned and share is not None and share < CORE_SHARE_LEAST:
        found.append(f"the pinned worker got {share:.0%} of the core-time that it asked for")
    if evidence.foreign_cores is not None and evidence.foreign_cores > FOREIGN_MOST * cores:
        found.append(f"other processes used {evidence.foreign_cores:.2f} of {cores} cores")
    if evidence.foreign_before is not None and evidence.foreign_before > FOREIGN_BEFORE_MOST * cores:
        found.append(f"other processes used {evidence.foreign_before:.2f} of {cores} cores before the start")
    if evidence.stolen_cores is not None and evidence.stolen_cores > FOREIGN_MOST * cores:
        found.append(f"the hypervisor took {evidence.stolen_cores:.2f} of {cores} cores")
    if evidence.gpu_processes:
        found.append(f"other processes on the GPU: {', '.join(map(str, evidence.gpu_processes))}")
    if evidence.slowdowns:
        found.append(f"the GPU's clocks were low: {', '.join(evidence.slowdowns)}")
    return "; ".join(found)


def core_share(ran: float | None, waited: float | None) -> float | None:
    """Return processor time over the time in which the process wanted to run; None if it never did.

    Args:
        ran: Seconds on a CPU, of all threads.
        waited: Seconds runnable without a CPU, of all threads.
    """
    if ran is None or waited is None or ran + waited <= 0:
        return None
    return ran / (ran + waited)


def baseline(seconds: float | None = None, cpus: Sequence[int] | None = None) -> float:
    """Measure how many cores' worth of work others do now, on the allowed CPUs or on those given.

    Args:
        seconds: How long; `BASELINE_SECONDS` unless given.
        cpus: Which.
    """
    watched = CpuSampler(sorted(os.sched_getaffinity(0)) if cpus is None else cpus)
    own = ProcessSampler("own", [os.getpid()])
    begin, busy, mine = time.perf_counter(), watched.sample(), own.sample()
    time.sleep(BASELINE_SECONDS if seconds is None else seconds)
    end, busy_then, mine_then = time.perf_counter(), watched.sample(), own.sample()
    used = busy_then["busy_seconds_total"] - busy["busy_seconds_total"]
    used -= mine_then["cpu_seconds_total"] - mine["cpu_seconds_total"]
    return max(0.0, used / (end - begin))


def strangers(api: Any, device: Any, own: Sequence[int]) -> tuple[int, ...]:
    """Return the processes on a GPU that are not ours; () where it cannot be told.

    Args:
        api: A module or object with the names of NVIDIA's Python bindings.
        device: Handle of the GPU.
        own: Our processes.
    """
    try:
        found = api.nvmlDeviceGetComputeRunningProcesses(device)
    except (AttributeError, api.NVMLError):
        return ()
    return tuple(sorted({process.pid for process in found} - set(own)))
