"""A simulated driver beside its calls: its GPU, kept in a file if wanted, and injected faults."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from migperf.backends.nvml_types import NVML_ERROR_UNINITIALIZED, NVMLError
from migperf.errors import DeviceError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Library = TypeVar("_Library", bound="SimulatedLibrary")


@dataclass
class Compute:
    """A compute instance."""

    id: int
    slices: int
    index: int  # of the MIG device


@dataclass
class Gpu:
    """What a driver remembers of its GPU."""

    model: str
    current: int
    pending: int
    instances: dict[int, "GpuInstance"] = field(default_factory=dict)
    clients: dict[int, str] = field(default_factory=dict)  # process id -> UUID of where it works


@dataclass
class GpuInstance:
    """A GPU instance; `profile` is an id."""

    id: int
    profile: int
    start: int
    computes: list[Compute] = field(default_factory=list)


def driver_call(
    function: Callable[Concatenate[_Library, _P], _R],
) -> Callable[Concatenate[_Library, _P], _R]:
    """Make a method a call of the driver: initialised, counted, open to injected faults, on stored state."""
    name = function.__name__

    @wraps(function)
    def call(self: _Library, *arguments: _P.args, **named: _P.kwargs) -> _R:
        self._enter(name)
        if self._store is None:
            return function(self, *arguments, **named)
        with self._store.transaction(self):
            return function(self, *arguments, **named)

    return call


class SimulatedLibrary:
    """State and faults of a simulated driver.

    Args:
        gpu: Its GPU at first.
        state: File in which the GPU outlives the process; without it, it ends with this object.

    Attributes:
        gpu: What the driver remembers.
        calls: How often each function was called.
    """

    def __init__(self, gpu: Gpu, state: Path | None) -> None:
        self.gpu = gpu
        self.calls: Counter[str] = Counter()
        self._store = _Store(state) if state else None
        self._faults: dict[str, list[tuple[int, int | Callable[[], object]]]] = {}
        self._initialised = 0

    def _here(self) -> AbstractContextManager[None]:
        return self._store.transaction(self) if self._store else nullcontext()

    def _enter(self, name: str) -> None:
        if not self._initialised:
            raise NVMLError(NVML_ERROR_UNINITIALIZED)
        self.calls[name] += 1
        if name in self._faults:
            self._inject(name)

    def nvmlInit(self) -> None:
        """Start the library."""
        self._initialised += 1

    def nvmlShutdown(self) -> None:
        """Stop it; as many times as it was started."""
        if not self._initialised:
            raise NVMLError(NVML_ERROR_UNINITIALIZED)
        self._initialised -= 1

    def attach(self, process: int, device: str = "") -> None:
        """Let a process work in a MIG device, or on the GPU when no UUID is given."""
        with self._here():
            self.gpu.clients[process] = device

    def detach(self, process: int) -> None:
        """Let a process end."""
        with self._here():
            self.gpu.clients.pop(process, None)

    def reset(self) -> None:
        """Reset the GPU: the pending mode becomes the mode, and all instances vanish."""
        with self._here():
            self.gpu.current = self.gpu.pending
            self.gpu.instances.clear()

    def fail(self, function: str, action: int | Callable[[], object], after: int = 0) -> None:
        """Let a later call of a function fail once.

        Args:
            function: Its name.
            action: The error's number, or what to do in place of failing, such as ending the process.
            after: How many calls go well first.
        """
        self._faults.setdefault(function, []).append((self.calls[function] + after + 1, action))

    def _inject(self, name: str) -> None:
        due = [fault for fault in self._faults[name] if fault[0] == self.calls[name]]
        for fault in due:
            self._faults[name].remove(fault)
            if not callable(fault[1]):
                raise NVMLError(fault[1])
            fault[1]()


class _Store:
    """The file in which a simulated GPU outlives the processes that use it, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def transaction(self, driver: SimulatedLibrary) -> Iterator[None]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            before = os.pread(descriptor, 1 << 20, 0)
            if before:
                driver.gpu = self._loaded(before, driver.gpu.model)
            try:
                yield
            finally:
                after = json.dumps(asdict(driver.gpu)).encode()
                if after != before:
                    # Padded, so that a kill between the two calls cannot leave half an old state behind.
                    os.pwrite(descriptor, after.ljust(len(before)), 0)
                    os.ftruncate(descriptor, len(after))
        finally:
            os.close(descriptor)

    def _loaded(self, text: bytes, model: str) -> Gpu:
        try:
            state = json.loads(text)
            instances = {
                int(gi): GpuInstance(**{**one, "computes": [Compute(**part) for part in one["computes"]]})
                for gi, one in state["instances"].items()
            }
            clients = {int(process): device for process, device in state["clients"].items()}
            gpu = Gpu(state["model"], state["current"], state["pending"], instances, clients)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeviceError(f"{self.path} does not hold a simulated GPU: name a new file") from error
        if gpu.model != model:
            raise DeviceError(f"{self.path} holds a simulated {gpu.model}, not {model}: name another file")
        return gpu
