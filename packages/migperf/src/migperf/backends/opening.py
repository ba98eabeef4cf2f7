"""Opens a device by its name."""

from pathlib import Path

from migperf.backends import Backend
from migperf.errors import DeviceError


def open(spec: str, *, allow_mode_change: bool = False) -> Backend:
    """Open a device.

    Args:
        spec: `nvml:0`: a GPU cut by MIG. `cuda:0`: a GPU used whole, time-sliced or by MPS. `cpu`: the
            allowed CPUs, cut into sets of cores. `sim:a100-40gb`: a GPU that exists only as a table, in this
            process; `sim:a100-40gb@gpu.json`: one that outlives it in a file.
        allow_mode_change: Whether MIG mode may be turned on and off.

    Raises:
        DeviceError: There is no such device here; the message says what to do.
    """
    kind, _, rest = spec.partition(":")
    if kind == "nvml":
        from migperf.backends.nvml import open_nvml

        return open_nvml(spec, allow_mode_change=allow_mode_change)
    if kind == "cuda":
        from migperf.backends.gpu import open_gpu

        return open_gpu(spec)
    if kind == "sim":
        from migperf.backends.mig import MigBackend
        from migperf.backends.simulated import SimulatedNvml
        from migperf.profiles import layout

        model, _, file = rest.partition("@")
        api = SimulatedNvml(layout(model), state=Path(file) if file else None)
        return MigBackend(
            api, spec=spec, kind="simulated", allow_mode_change=allow_mode_change, durable=bool(file)
        )
    if spec == "cpu":
        from migperf.backends.cpu import CpuBackend

        return CpuBackend()
    raise DeviceError(f"no device {spec!r}: there are nvml:0, cuda:0, cpu and sim:a100-40gb")
