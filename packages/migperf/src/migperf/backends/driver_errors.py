"""What NVML's error numbers mean to a person, and what to do about each."""

from collections.abc import Sequence

from migperf.errors import DriverError

INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NOT_FOUND = 6
FUNCTION_NOT_FOUND = 13
RESET_REQUIRED = 16
IN_USE = 19
INSUFFICIENT_RESOURCES = 23
VERSION_MISMATCH = 25

CAPABILITY = "/proc/driver/nvidia/capabilities/mig/config"
"""Who may read it may cut GPUs; the device plugin and container runtimes hand it on."""

WITHOUT_GPU = "the devices cpu and sim:a100-40gb work without one"

_ADVICE = {
    1: "NVML was not initialised",
    INVALID_ARGUMENT: "the driver calls an argument invalid; it may be older than what was asked for",
    NOT_SUPPORTED: "this GPU or driver does not support it",
    4: f"no permission: run as root, or get read access to the capability {CAPABILITY}",
    NOT_FOUND: "the driver finds no such thing; somebody else may have removed it",
    7: "the driver has more to say than was asked for",
    9: f"the NVIDIA driver is not loaded: modprobe nvidia, or reboot; {WITHOUT_GPU}",
    12: f"there is no NVIDIA driver here (libnvidia-ml.so.1 not found): {WITHOUT_GPU}",
    FUNCTION_NOT_FOUND: "this driver lacks the call: a newer driver has it",
    15: "the GPU is lost: it fell off the bus, reboot",
    RESET_REQUIRED: "the GPU has to be reset first: nvidia-smi --gpu-reset, with no process on it, or reboot",
    18: "driver and its library are of different versions: reboot after the driver's update, or reload it",
    IN_USE: "it is in use by another client: end it first (monitoring such as DCGM counts)",
    INSUFFICIENT_RESOURCES: "Insufficient Resources: no room beside the instances that exist",
    VERSION_MISMATCH: "bindings and driver differ: update the driver, or pin an older nvidia-ml-py",
}


def driver_error(code: int, doing: str, processes: Sequence[int] = ()) -> DriverError:
    """Return the error that says what could not be done, why, and what to do.

    Args:
        code: NVML's number.
        doing: What was tried, as in "cannot ...".
        processes: Ids of those who hold it.
    """
    advice = _ADVICE.get(code, f"NVML error {code}")
    if code == IN_USE and processes:
        pids = ", ".join(map(str, processes))
        advice = f"it is in use by process{'es' if len(processes) > 1 else ''} {pids}: end them first"
    return DriverError(f"cannot {doing}: {advice}", code)
