"""NVML itself, through NVIDIA's Python bindings, which are imported only when a real GPU is opened."""

import re
from typing import Any

from migperf.backends.driver_errors import WITHOUT_GPU, driver_error
from migperf.backends.mig import MigBackend
from migperf.errors import DeviceError


def bindings() -> Any:
    """Return the started bindings.

    Raises:
        DeviceError: They are not installed, or there is no driver; the message says what works without.
    """
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"NVIDIA's bindings are not installed: pip install 'migperf[nvidia]'; {WITHOUT_GPU}"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise driver_error(error.value, "reach an NVIDIA GPU") from error  # pyright: ignore[reportAttributeAccessIssue]
    return pynvml


def index_of(spec: str) -> int:
    """Return the GPU's index in `nvml:0` or `cuda:0`; a name without a number is the first GPU."""
    match = re.fullmatch(r"(?:nvml|cuda)(?::(\d+))?", spec)
    if not match:
        raise DeviceError(f"{spec}: expected a GPU's index, as in nvml:0 or cuda:0")
    return int(match[1] or 0)


def open_nvml(spec: str, *, allow_mode_change: bool = False) -> MigBackend:
    """Open a real GPU for cutting by MIG.

    Args:
        spec: `nvml:0`.
        allow_mode_change: Whether MIG mode may be turned on and off.

    Raises:
        DeviceError: No driver, no such GPU, or a GPU without MIG.
    """
    index = index_of(spec)
    return MigBackend(bindings(), index, spec=spec, kind="nvml", allow_mode_change=allow_mode_change)
