"""The board's power, energy, memory and clocks through NVML: the whole board's, also in MIG mode."""

from collections.abc import Mapping
from typing import Any

SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Reasons that take clocks away from a run; a power cap (0x04) is how the board works, and only recorded."""


class NvmlSampler:
    """Reads one GPU; what it does not support is left out.

    Args:
        api: A module or object with the names of NVIDIA's Python bindings, initialised.
        device: Handle of the GPU.
        mig: Whether it is in MIG mode, where its utilisation means nothing.
    """

    name = "board"

    def __init__(self, api: Any, device: Any, mig: bool = False) -> None:
        self.api, self.device, self.mig = api, device, mig
        self._absent: set[str] = set()

    def _ask(self, function: str, *arguments: object) -> Any:
        if function in self._absent:
            return None
        try:
            return getattr(self.api, function)(self.device, *arguments)
        except (AttributeError, self.api.NVMLError):
            self._absent.add(function)  # asked once, not ten times a second
            return None

    def sample(self) -> Mapping[str, float]:
        """Return energy, power, memory, clock, `slowdown` and the like, what there is of them."""
        found: dict[str, float] = {}
        if (energy := self._ask("nvmlDeviceGetTotalEnergyConsumption")) is not None:
            found["energy_joules_total"] = energy / 1000
        if (power := self._ask("nvmlDeviceGetPowerUsage")) is not None:
            found["power_watts"] = power / 1000
        if (memory := self._ask("nvmlDeviceGetMemoryInfo")) is not None:
            found["memory_used_mib"] = memory.used / 2**20
        if (clock := self._ask("nvmlDeviceGetClockInfo", 1)) is not None:
            found["sm_clock_mhz"] = clock
        if (reasons := self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")) is not None:
            found |= {"slowdown": float(bool(reasons & 0xE8)), "power_cap": float(bool(reasons & 0x04))}
        if not self.mig and (rates := self._ask("nvmlDeviceGetUtilizationRates")) is not None:
            found["busy"] = rates.gpu / 100
        return found


def slowdowns(api: Any, device: Any) -> tuple[str, ...]:
    """Return in words why the GPU's clocks are low now, () if they are not or it cannot be told."""
    try:
        reasons = api.nvmlDeviceGetCurrentClocksThrottleReasons(device)
    except (AttributeError, api.NVMLError):
        return ()
    return tuple(name for bit, name in SLOWDOWNS.items() if reasons & bit)
