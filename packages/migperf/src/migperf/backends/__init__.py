"""Backends: one interface to cut a device into instances and to start processes inside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from migperf.profiles import Layout, Profile

Kind = Literal["nvml", "simulated", "cpu", "gpu"]


@dataclass(frozen=True)
class Instance:
    """A part of a device that exists now.

    Attributes:
        profile: Its size.
        start: Where it begins on the memory axis (CPU: index of its first core; 0 for a whole GPU).
        uuid: What names it to a process: `MIG-...`, `GPU-...`, `cpu:0,1`.
        handle: What the backend needs to find it again (MIG: ids of GPU and compute instance).
        compute: Slices of its compute instances where they are not one of `profile.slices`: nobody can work
            in a GPU instance that has none, and one that has several is seen by its first.
    """

    profile: Profile
    start: int
    uuid: str
    handle: Mapping[str, Any] = field(default_factory=dict, compare=False)
    compute: tuple[int, ...] | None = None


class Instances(tuple[Instance, ...]):
    """Instances with the backend that made them: what runs in them need not be told whose they are.

    Args:
        instances: In the order of their geometry.
        backend: That they are parts of.
    """

    backend: "Backend"

    def __new__(cls, instances: Sequence[Instance], backend: "Backend") -> "Instances":
        """Make the tuple and remember the backend."""
        made = super().__new__(cls, instances)
        made.backend = backend
        return made


@dataclass(frozen=True)
class Launch:
    """How a worker process gets into an instance.

    Attributes:
        environment: Variables to set before the child imports anything, CUDA_VISIBLE_DEVICES and the like.
        cpus: CPUs that the child pins itself to first; None leaves its affinity alone.
        threads: Threads of torch and BLAS; None leaves them alone.
        torch_device: `cpu` or `cuda:0`.
        expected_memory_mib: What the child must find as its device's memory; None: nothing is promised.
        expected_sms: Likewise of streaming multiprocessors.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] | None = None
    threads: int | None = None
    torch_device: str = "cpu"
    expected_memory_mib: float | None = None
    expected_sms: int | None = None


@runtime_checkable
class Sampler(Protocol):
    """A source of measurements beside the workers."""

    name: str

    def sample(self) -> Mapping[str, float]:
        """Return what it reads now, metric -> value; counters are named `..._total`."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A device that can be cut into instances."""

    spec: str
    """What opened it: `nvml:0`, `sim:a100-40gb`, `cpu`, `cuda:0`."""
    kind: Kind
    simulated: bool
    identity: str
    """What names the device itself, across restarts and other ways to open it: `GPU-...`."""
    durable: bool
    """Whether instances outlive the process that made them, and so have to be put back after a crash."""
    layout: Layout
    not_isolated: tuple[str, ...]
    """What instances still share, for the report."""

    def profiles(self) -> Sequence[Profile]:
        """Return all profiles of the device."""
        ...

    def placements(self, profile: Profile) -> Sequence[int]:
        """Return the starts at which the profile would fit beside the instances that exist now."""
        ...

    def create(
        self, profile: Profile, start: int | None = None, compute: tuple[int, ...] | None = None
    ) -> Instance:
        """Make an instance, at the start or where the driver puts it.

        `compute` are the slices of the compute instances in it, one of `profile.slices` unless given.
        """
        ...

    def destroy(self, instance: Instance) -> None:
        """Remove an instance that no process uses."""
        ...

    def instances(self) -> Sequence[Instance]:
        """Return the instances that exist now, by start."""
        ...

    def processes(self, instance: Instance | None = None) -> Sequence[int]:
        """Return the ids of the processes that work in an instance, or anywhere on the device."""
        ...

    def enabled(self) -> bool:
        """Return whether the device can be cut now; on a GPU, whether MIG mode is on."""
        ...

    def enable(self, on: bool) -> None:
        """Turn the mode in which the device can be cut on or off; refused without the user's consent."""
        ...

    def launch(self, instance: Instance) -> Launch:
        """Return how a worker gets into the instance."""
        ...

    def samplers(self, instance: Instance | None = None) -> Sequence[Sampler]:
        """Return the sources of measurements for an instance, or for the whole device."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Return what a record says of the device: name, driver, memory, clocks, CPU, governor."""
        ...
