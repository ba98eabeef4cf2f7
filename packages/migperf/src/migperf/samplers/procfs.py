"""What Linux says of processes and CPUs in /proc."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PROC = Path("/proc")
TICK = os.sysconf("SC_CLK_TCK")


class ProcessSampler:
    """Processor time, time spent runnable without a processor, and memory of processes and their children.

    Waiting to run is how foreign load shows: a process that got all the cores that it wanted waits for none.
    A thread that ended keeps the time that it had when it was last read.

    Args:
        name: Of the sampler, `worker0`.
        pids: Roots of the process trees.
        tree: Whether their children count too.
    """

    def __init__(self, name: str, pids: Sequence[int], tree: bool = False) -> None:
        self.name, self.pids, self.tree = name, tuple(pids), tree
        self._times: dict[tuple[int, str], tuple[int, int]] = {}

    def sample(self) -> Mapping[str, float]:
        """Return `cpu_seconds_total`, `wait_seconds_total` and `rss_mib`."""
        pages = 0
        for pid in self.members():
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/statm", "rb") as file:
                    pages += int(file.read().split()[1])
                for task in os.listdir(f"/proc/{pid}/task"):
                    # threads may end between the listing and this
                    with (
                        contextlib.suppress(OSError),
                        open(f"/proc/{pid}/task/{task}/schedstat", "rb") as file,
                    ):
                        ran, waited, *_ = file.read().split()
                        self._times[pid, task] = int(ran), int(waited)
        return {
            "cpu_seconds_total": sum(ran for ran, _ in self._times.values()) / 1e9,
            "wait_seconds_total": sum(waited for _, waited in self._times.values()) / 1e9,
            "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        }

    def members(self) -> list[int]:
        """Return the processes that exist now."""
        found = list(self.pids)
        if self.tree:
            for pid in found:
                with contextlib.suppress(OSError):
                    for task in os.listdir(f"/proc/{pid}/task"):
                        children = Path(f"/proc/{pid}/task/{task}/children").read_bytes().split()
                        found += [int(child) for child in children]
        return found


class CpuSampler:
    """How busy CPUs are with anything, per the kernel's ticks.

    Args:
        cpus: Which; all where None.
        file: The kernel's statistics.
    """

    name = "cpus"

    def __init__(self, cpus: Sequence[int] | None = None, file: Path = PROC / "stat") -> None:
        self.cpus = None if cpus is None else {f"cpu{cpu}" for cpu in cpus}
        self.file = file

    def sample(self) -> Mapping[str, float]:
        """Return `busy_seconds_total`, and `steal_seconds_total` that the hypervisor gave to others."""
        busy = steal = 0
        for line in self.file.read_text().splitlines():
            name, *fields = line.split()
            if not name.startswith("cpu"):
                break
            if name == "cpu" or (self.cpus is not None and name not in self.cpus):
                continue
            ticks = [int(field) for field in fields]
            busy += sum(ticks[:8]) - ticks[3] - ticks[4]  # all but idle and waiting for I/O
            steal += ticks[7]
        return {"busy_seconds_total": (busy - steal) / TICK, "steal_seconds_total": steal / TICK}
