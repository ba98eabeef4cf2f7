"""CPU partitions: disjoint sets of the cores that this process may use.

A worker pins itself to its set before it loads anything and starts no more threads than the set has CPUs.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migperf.backends import Instance, Kind, Launch, Sampler
from migperf.errors import DeviceError, GeometryError
from migperf.geometry import Slot
from migperf.profiles import Layout, Profile

SYSTEM = Path("/sys/devices/system")

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True, order=True)
class Core:
    """A physical core.

    Attributes:
        node: NUMA node.
        package: Socket.
        number: Within the socket.
        cpus: Its hardware threads, as far as this process may use them.
    """

    node: int
    package: int
    number: int
    cpus: tuple[int, ...]


def read_cores(allowed: set[int], system: Path = SYSTEM) -> tuple[Core, ...]:
    """Return the allowed CPUs by physical core, cores of one NUMA node side by side.

    Args:
        allowed: CPUs that the process may use.
        system: Where the kernel describes them; a CPU that it does not describe counts as a core of its own.
    """
    nodes: dict[int, int] = {}
    for folder in sorted(system.glob("node/node[0-9]*")):
        for cpu in parse_cpu_list((folder / "cpulist").read_text()):
            nodes[cpu] = int(folder.name.removeprefix("node"))
    found: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(allowed):
        topology = system / f"cpu/cpu{cpu}/topology"
        package = _number(topology / "physical_package_id", 0)
        number = _number(topology / "core_id", cpu)
        found.setdefault((nodes.get(cpu, 0), package, number), []).append(cpu)
    return tuple(sorted(Core(*place, tuple(cpus)) for place, cpus in found.items()))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Read the kernel's lists of CPUs.

    >>> parse_cpu_list("0-2,8")
    (0, 1, 2, 8)
    """
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def _number(file: Path, otherwise: int) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise


class CpuBackend:
    """The allowed CPUs of this machine, cut into sets of whole physical cores: `1c`, `2c`, ...

    Hardware threads of one core always stay in one set. Sets within one NUMA node are preferred. Where there
    is only one physical core, its hardware threads count as cores, and `not_isolated` says so.

    Args:
        allowed: CPUs to use; those that the process is allowed unless given.
        system: Where the kernel describes them.
    """

    kind: Kind = "cpu"
    simulated: bool = False
    durable: bool = False
    spec: str = "cpu"

    def __init__(self, allowed: set[int] | None = None, system: Path = SYSTEM) -> None:
        cpus = os.sched_getaffinity(0) if allowed is None else allowed
        cores = read_cores(cpus, system)
        split = len(cores) == 1 and len(cores[0].cpus) > 1
        if split:
            (core,) = cores
            cores = tuple(Core(core.node, core.package, cpu, (cpu,)) for cpu in core.cpus)
        self.cores = cores
        self.identity = f"cpu-{platform.node()}"
        count = len(cores)
        profiles = tuple(self._profile(size) for size in range(1, count + 1))
        self.layout = Layout(f"CPU ({count} cores, {len(cpus)} threads)", count, count, profiles)
        shared = ["last-level cache", "memory bandwidth and memory size", "turbo budget and power"]
        if len({core.node for core in cores}) > 1:
            shared.append("memory of other NUMA nodes")
        if split:
            shared.append("the one physical core: partitions are its hardware threads")
        self.not_isolated: tuple[str, ...] = tuple(shared)
        self._there: dict[int, Instance] = {}

    def _profile(self, size: int) -> Profile:
        starts = tuple(range(len(self.cores) - size + 1))
        preference = tuple(sorted(starts, key=lambda start: (self._nodes(start, size), start)))
        return Profile(f"{size}c", size, size, size, starts, len(self.cores) // size, preference=preference)

    def _nodes(self, start: int, size: int) -> int:
        return len({core.node for core in self.cores[start : start + size]})

    def profiles(self) -> Sequence[Profile]:
        """Return `1c` to all cores."""
        return self.layout.profiles

    def placements(self, profile: Profile) -> Sequence[int]:
        """Return where in the order of cores a set of this size is free now."""
        taken = 0
        for instance in self._there.values():
            taken |= Slot(instance.profile, instance.start).mask
        return tuple(start for start in profile.starts if not Slot(profile, start).mask & taken)

    def create(
        self, profile: Profile, start: int | None = None, compute: tuple[int, ...] | None = None
    ) -> Instance:
        """Set cores aside, within one NUMA node where that is possible and the start is not given.

        Raises:
            GeometryError: The cores are taken, or there are not so many.
        """
        free = self.placements(profile)
        if start is None:
            start = next((place for place in profile.preference if place in free), None)
        if compute is not None or start is None or start not in free:
            left = len(self.cores) - sum(instance.profile.size for instance in self._there.values())
            where = "" if start is None else f" from core {start} on"
            raise GeometryError(
                f"no room for {profile.name}{where}: {left} of the {len(self.cores)} cores that this process "
                "may use are free"
            )
        cpus = sorted(cpu for core in self.cores[start : start + profile.size] for cpu in core.cpus)
        uuid = f"cpu:{','.join(map(str, cpus))}"
        self._there[start] = Instance(profile, start, uuid, {"cpus": tuple(cpus)})
        return self._there[start]

    def destroy(self, instance: Instance) -> None:
        """Give the cores back."""
        if self._there.pop(instance.start, None) is None:
            raise DeviceError(f"there is no {Slot(instance.profile, instance.start)} to destroy")

    def instances(self) -> Sequence[Instance]:
        """Return the sets of cores that this object has set aside; they end with it."""
        return tuple(self._there[start] for start in sorted(self._there))

    def processes(self, instance: Instance | None = None) -> Sequence[int]:
        """Return no process: cores can be given back while somebody computes on them."""
        return ()

    def enabled(self) -> bool:
        """Return True: cores can always be set aside."""
        return True

    def enable(self, on: bool) -> None:
        """Do nothing but refuse: there is no mode to change."""
        raise DeviceError("CPUs have no mode to turn on or off")

    def launch(self, instance: Instance) -> Launch:
        """Return the CPUs to pin a worker to, and as many threads as it has physical cores."""
        threads = instance.profile.slices
        return Launch(
            environment=dict.fromkeys(THREAD_VARIABLES, str(threads)),
            cpus=instance.handle["cpus"],
            threads=threads,
        )

    def samplers(self, instance: Instance | None = None) -> Sequence[Sampler]:
        """Return none of its own: what a worker's process used is read by whoever started it."""
        return ()

    def facts(self) -> Mapping[str, Any]:
        """Return the CPU's model, its cores and its governor."""
        model = platform.processor() or platform.machine()
        for line in _lines(Path("/proc/cpuinfo")):
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        first = self.cores[0].cpus[0] if self.cores else 0
        governor = _lines(SYSTEM / f"cpu/cpu{first}/cpufreq/scaling_governor")
        return {
            "device": model,
            "cores": len(self.cores),
            "cpus": sum(len(core.cpus) for core in self.cores),
            "numa_nodes": len({core.node for core in self.cores}),
            "governor": governor[0] if governor else "unknown",
            "simulated": False,
        }


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
