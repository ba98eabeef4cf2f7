"""One GPU without MIG: used whole, or shared in time slices or by MPS. MIG mode is never touched."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from migperf.backends import Instance, Kind, Launch, Sampler
from migperf.backends.driver_errors import driver_error
from migperf.errors import DeviceError, GeometryError
from migperf.profiles import Layout, Profile
from shared_core import InputError

CONTROL = "nvidia-cuda-mps-control"

MAX_CLIENTS = 48
"""Clients that one MPS server takes."""

PATIENCE = 10.0
"""Seconds that the control daemon has for an answer."""


@dataclass(frozen=True)
class Sharing:
    """Processes that share one GPU.

    Attributes:
        instances: One a process, each to be launched.
        wanted: What was asked for.
        control: The MPS daemon started for it.
    """

    instances: tuple[Instance, ...]
    wanted: Literal["timeslice", "mps"]
    control: "MpsControl | None" = None

    @property
    def mode(self) -> Literal["timeslice", "mps"]:
        """What is so now: `mps` only while a server process of our daemon is seen to live.

        A client that finds no daemon runs without MPS and says nothing, so ask while the workers run.
        """
        return "mps" if self.control is not None and self.control.servers() else "timeslice"


class MpsControl:
    """A control daemon of MPS in directories of its own.

    Args:
        folder: Where it keeps its pipes and logs.
        device: UUID of the GPU that it serves.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.environment = {
            "CUDA_VISIBLE_DEVICES": device,
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
        }
        for variable in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            Path(self.environment[variable]).mkdir(parents=True)

    def start(self) -> None:
        """Start the daemon, and a server of the present user.

        Raises:
            DeviceError: There is no MPS here, or the daemon does not start.
        """
        if shutil.which(CONTROL) is None:
            raise DeviceError(f"{CONTROL} is not on PATH: MPS comes with the NVIDIA driver's utilities")
        self._run("-d")
        self._ask(f"start_server -uid {os.getuid()}")

    def servers(self) -> tuple[int, ...]:
        """Return the ids of the daemon's servers that are alive."""
        try:
            answer = self._ask("get_server_list")
        except DeviceError:
            return ()
        listed = (int(word) for word in answer.split() if word.isdigit())
        return tuple(process for process in listed if _lives(process))

    def stop(self) -> None:
        """Stop the daemon and its servers; a daemon that is gone already is none to stop."""
        with suppress(DeviceError):
            self._ask("quit")

    def _ask(self, command: str) -> str:
        return self._run(text=f"{command}\n")

    def _run(self, *arguments: str, text: str = "") -> str:
        # Answers go to a file: a daemon that inherits a pipe would keep it open for good.
        with tempfile.TemporaryFile("w+") as answer:
            try:
                ended = subprocess.run(
                    [CONTROL, *arguments],
                    input=text,
                    stdout=answer,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=PATIENCE,
                    env={**os.environ, **self.environment},
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise DeviceError(f"{CONTROL} gave no answer in {PATIENCE:.0f} s") from error
            answer.seek(0)
            said = answer.read()
        if ended.returncode:
            raise DeviceError(f"{CONTROL} failed: {said.strip() or f'exit code {ended.returncode}'}")
        return said


def _lives(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class GpuBackend:
    """One GPU as a single instance, `whole`, which several processes may share.

    Args:
        api: A module or object with the names of NVIDIA's Python bindings.
        index: Of the GPU.
        spec: What opened it.

    Raises:
        DeviceError: There is no such GPU, or MIG mode is on, in which it cannot be used whole.
    """

    kind: Kind = "gpu"
    simulated: bool = False
    durable: bool = False
    not_isolated: tuple[str, ...] = (
        "SMs, unless one process has the GPU",
        "memory and its bandwidth",
        "caches",
        "power and clocks",
    )

    def __init__(self, api: Any, index: int = 0, *, spec: str) -> None:
        self.api = api
        self.spec = spec
        try:
            api.nvmlInit()
            count = api.nvmlDeviceGetCount()
            if index >= count:
                raise DeviceError(f"{spec}: the driver has {f'GPUs 0 to {count - 1}' if count else 'no GPU'}")
            self.device = api.nvmlDeviceGetHandleByIndex(index)
            self.identity = _text(api.nvmlDeviceGetUUID(self.device))
            name = _text(api.nvmlDeviceGetName(self.device))
            memory = api.nvmlDeviceGetMemoryInfo(self.device).total / 2**20
            self.driver = _text(api.nvmlSystemGetDriverVersion())
        except api.NVMLError as error:
            raise driver_error(error.value, f"open {spec}") from error
        if self._mig():
            raise DeviceError(
                f"{name} is in MIG mode, in which nobody can use it whole: open it as nvml:{index}"
            )
        whole = Profile("whole", 0, 1, 1, (0,), 1, memory_mib=memory)
        self.layout = Layout(name, 1, 1, (whole,), total_mib=memory)
        self._there: Instance | None = None

    def _mig(self) -> bool:
        try:
            return bool(self.api.nvmlDeviceGetMigMode(self.device)[0])
        except self.api.NVMLError:  # a GPU that has no MIG
            return False

    def profiles(self) -> Sequence[Profile]:
        """Return the one profile, `whole`."""
        return self.layout.profiles

    def placements(self, profile: Profile) -> Sequence[int]:
        """Return 0 unless the GPU is taken."""
        return () if self._there else (0,)

    def create(
        self, profile: Profile, start: int | None = None, compute: tuple[int, ...] | None = None
    ) -> Instance:
        """Take the GPU.

        Raises:
            GeometryError: It is taken, or cannot be cut like that.
        """
        if self._there or start not in (None, 0) or compute is not None:
            raise GeometryError(
                f"{self.layout.device} has one instance, whole@0; use share for several processes"
            )
        self._there = Instance(profile, 0, self.identity)
        return self._there

    def destroy(self, instance: Instance) -> None:
        """Give the GPU back."""
        if self._there is None:
            raise DeviceError(f"{self.layout.device} was not taken")
        self._there = None

    def instances(self) -> Sequence[Instance]:
        """Return the GPU if it was taken by this object."""
        return () if self._there is None else (self._there,)

    def processes(self, instance: Instance | None = None) -> Sequence[int]:
        """Return the ids of the processes that compute on the GPU."""
        try:
            found = self.api.nvmlDeviceGetComputeRunningProcesses(self.device)
        except self.api.NVMLError as error:
            raise driver_error(error.value, "list processes") from error
        return tuple(sorted({process.pid for process in found}))

    def enabled(self) -> bool:
        """Return True: a GPU without MIG needs no mode."""
        return True

    def enable(self, on: bool) -> None:
        """Refuse: this backend never touches MIG mode."""
        raise DeviceError(f"{self.spec} never touches MIG mode: open the GPU as nvml:N")

    def launch(self, instance: Instance) -> Launch:
        """Return how a worker gets to the GPU, with its part of an MPS daemon's environment."""
        return Launch(
            environment={"CUDA_VISIBLE_DEVICES": self.identity, **instance.handle.get("environment", {})},
            torch_device="cuda:0",
            expected_memory_mib=self.layout.total_mib,
        )

    @contextmanager
    def share(
        self, mode: Literal["timeslice", "mps"], processes: int, thread_percentage: float | None = None
    ) -> Iterator[Sharing]:
        """Let several processes use the GPU at once.

        Args:
            mode: `timeslice`: they take turns. `mps`: they run side by side through an MPS daemon of our own,
                in private directories, which ends with the block. A daemon of somebody else is never touched.
            processes: How many.
            thread_percentage: Cap on the SMs that a client may use, in percent; `mps` only.

        Raises:
            InputError: A number is out of range.
            DeviceError: MPS is not installed, or does not start.
        """
        limit = MAX_CLIENTS if mode == "mps" else None
        if processes < 1 or (limit and processes > limit):
            raise InputError(f"expected 1 to {limit or 'any number'}", field="processes", value=processes)
        if thread_percentage is not None and (mode != "mps" or not 0 < thread_percentage <= 100):
            expected = "expected more than 0, up to 100, and only with MPS"
            raise InputError(expected, field="thread_percentage", value=thread_percentage)
        if mode == "timeslice":
            yield Sharing(self._shares(processes, {}), mode)
            return
        with tempfile.TemporaryDirectory(prefix="migperf-mps-") as folder:
            control = MpsControl(Path(folder), self.identity)
            environment = {k: v for k, v in control.environment.items() if k != "CUDA_VISIBLE_DEVICES"}
            if thread_percentage is not None:
                environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{thread_percentage:g}"
            control.start()
            try:
                yield Sharing(self._shares(processes, environment), mode, control)
            finally:
                control.stop()

    def _shares(self, processes: int, environment: Mapping[str, str]) -> tuple[Instance, ...]:
        (whole,) = self.layout.profiles
        handle = {"environment": dict(environment)}
        return tuple(Instance(whole, 0, self.identity, handle) for _ in range(processes))

    def samplers(self, instance: Instance | None = None) -> Sequence[Sampler]:
        """Return the sources of measurements of the board; nothing is known of a process's share alone."""
        from migperf.samplers import of_device

        return of_device(self) if instance is None else ()

    def facts(self) -> Mapping[str, Any]:
        """Return name, UUID, driver and memory of the GPU."""
        return {
            "device": self.layout.device,
            "uuid": self.identity,
            "driver": self.driver,
            "memory_mib": self.layout.total_mib,
            "simulated": False,
        }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def open_gpu(spec: str) -> GpuBackend:
    """Open a real GPU without MIG: `cuda:0`, by the driver's index.

    Raises:
        DeviceError: No driver, no such GPU, or MIG mode is on.
    """
    from migperf.backends.nvml import bindings, index_of

    index = index_of(spec)
    return GpuBackend(bindings(), index, spec=spec)
