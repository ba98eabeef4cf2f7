"""GPM: activity of a GPU or of one GPU instance, on Hopper and later, through NVML."""

from collections.abc import Mapping
from typing import Any

METRICS = {1: "gr_active", 2: "sm_active", 3: "sm_occupancy", 5: "tensor_active", 10: "dram_active"}
"""NVML's numbers of the metrics."""


class GpmSampler:
    """Activity between one sample and the next.

    Args:
        api: A module or object with the names of NVIDIA's Python bindings, initialised.
        device: Handle of the GPU.
        gpu_instance: Id of the GPU instance; None for the whole GPU.
    """

    def __init__(self, api: Any, device: Any, gpu_instance: int | None = None) -> None:
        self.api, self.device, self.gpu_instance = api, device, gpu_instance
        self.name = "gpm" if gpu_instance is None else f"gpm{gpu_instance}"
        self._before: Any = None

    @staticmethod
    def supported(api: Any, device: Any) -> bool:
        """Return whether the GPU has it."""
        try:
            return bool(api.nvmlGpmQueryDeviceSupport(device).isSupportedDevice)
        except (AttributeError, api.NVMLError):
            return False

    def sample(self) -> Mapping[str, float]:
        """Return activities in 0 to 1 since the last sample; nothing the first time."""
        after = self.api.nvmlGpmSampleAlloc()
        if self.gpu_instance is None:
            self.api.nvmlGpmSampleGet(self.device, after)
        else:
            self.api.nvmlGpmMigSampleGet(self.device, self.gpu_instance, after)
        before, self._before = self._before, after
        if before is None:
            return {}
        asked = self.api.c_nvmlGpmMetricsGet_t()
        asked.version = self.api.NVML_GPM_METRICS_GET_VERSION
        asked.sample1, asked.sample2, asked.numMetrics = before, after, len(METRICS)
        for index, number in enumerate(METRICS):
            asked.metrics[index].metricId = number
        try:
            answer = self.api.nvmlGpmMetricsGet(asked)
        finally:
            self.api.nvmlGpmSampleFree(before)
        found = {}
        for index, name in enumerate(METRICS.values()):
            if answer.metrics[index].nvmlReturn == 0:
                found[name] = answer.metrics[index].value / 100
        return found
