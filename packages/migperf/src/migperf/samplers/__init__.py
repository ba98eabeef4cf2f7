"""Samplers: what is read beside the workers, each sample with its time, trimmed to the measured window."""

import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

from migperf.backends import Sampler

PERIOD = 0.1
LEAST = 3
"""Fewer samples in the window than this say nothing of its mean."""


@dataclass(frozen=True)
class Window:
    """What the samplers saw between two times.

    Attributes:
        means: Metric -> mean of the samples inside the window.
        differences: Counter -> what it grew by from edge to edge, None where it cannot be told.
        insufficient: Metrics with fewer than three samples, not among the means.
        problems: Sampler -> the last error it gave.
    """

    means: dict[str, float] = field(default_factory=dict)
    differences: dict[str, float | None] = field(default_factory=dict)
    insufficient: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)


class Recorder:
    """Reads samplers at 10 Hz in a thread, and at the edges of windows that are known beforehand.

    Args:
        samplers: What to read. Metrics are named `sampler.metric`, counters end in `_total`.
        period: Seconds between samples.
        edges: Times in ns of the monotonic clock at which counters have to be read.
    """

    def __init__(
        self, samplers: Sequence[Sampler], period: float = PERIOD, edges: Sequence[int] = ()
    ) -> None:
        self.samplers = samplers
        self.period = period
        self.edges = sorted(edges)
        self.times: dict[str, list[int]] = defaultdict(list)
        self.values: dict[str, list[float]] = defaultdict(list)
        self.problems: dict[str, str] = {}
        self.cpu_seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="migperf-samplers", daemon=True)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        period = round(self.period * 1e9)
        due, edges = time.perf_counter_ns(), list(self.edges)
        while not self._stop.is_set():
            self.read()
            now = time.perf_counter_ns()
            while due <= now:
                due += period
            while edges and edges[0] <= now:
                edges.pop(0)
            self._stop.wait((min([due, *edges[:1]]) - now) / 1e9)
        self.read()
        self.cpu_seconds = time.thread_time()

    def read(self) -> None:
        """Read all samplers once."""
        for sampler in self.samplers:
            try:
                found = sampler.sample()
            except Exception as error:  # a sampler that fails must not end the measurement
                self.problems[sampler.name] = " ".join(f"{type(error).__name__}: {error}".split())
                continue
            now = time.perf_counter_ns()
            for metric, value in found.items():
                if math.isfinite(value):
                    self.times[f"{sampler.name}.{metric}"].append(now)
                    self.values[f"{sampler.name}.{metric}"].append(float(value))

    def window(self, start: int, end: int) -> Window:
        """Return means and differences between two times in ns; nothing outside them counts."""
        means: dict[str, float] = {}
        differences: dict[str, float | None] = {}
        insufficient: list[str] = []
        for metric, times in sorted(self.times.items()):
            if metric.endswith("_total"):
                differences[metric] = self._difference(metric, start, end)
                continue
            inside = self.values[metric][bisect_left(times, start) : bisect_right(times, end)]
            if len(inside) < LEAST:
                insufficient.append(metric)
            else:
                means[metric] = sum(inside) / len(inside)
        return Window(means, differences, tuple(insufficient), dict(self.problems))

    def _difference(self, metric: str, start: int, end: int) -> float | None:
        """Return what a counter grew by, per the samples closest to the edges; None if it ever went back."""
        times, values = self.times[metric], self.values[metric]
        first, last = _closest(times, start), _closest(times, end)
        reach = 1.5e9 * self.period
        if first == last or abs(times[first] - start) > reach or abs(times[last] - end) > reach:
            return None
        between = values[first : last + 1]
        if any(later < earlier for earlier, later in pairwise(between)):
            return None  # a reload of the driver, or a thread that ended
        seconds = (times[last] - times[first]) / 1e9
        return (between[-1] - between[0]) * ((end - start) / 1e9) / seconds


def _closest(times: Sequence[int], moment: int) -> int:
    index = bisect_left(times, moment)
    near = [i for i in (index - 1, index) if 0 <= i < len(times)]
    return min(near, key=lambda i: abs(times[i] - moment))


def device_activity(parts: Sequence[tuple[float, int]], slices: int = 7) -> float:
    """Return the activity of a whole device from that of its instances: each weighs as much as it is large.

    Args:
        parts: Activity in 0 to 1 and compute slices of each instance, those that idle included or left out.
        slices: Compute slices of the device.

    >>> device_activity([(0.6, 2), (0.9, 1), (0.4, 1), (0.2, 1), (0.7, 1), (0.1, 1)])
    0.5
    """
    return round(sum(activity * size for activity, size in parts) / slices, 12)


def of_device(backend: object, gpu_instances: Sequence[int] = ()) -> list[Sampler]:
    """Return the NVML samplers of a real GPU behind a backend; none for other devices.

    Args:
        backend: With `kind`, and NVML's calls as `api` and the GPU as `device`.
        gpu_instances: Ids of the GPU instances to read one by one, where the GPU can.
    """
    kind, api = getattr(backend, "kind", ""), getattr(backend, "api", None)
    if kind not in ("nvml", "gpu") or api is None:
        return []
    from migperf.samplers.gpm import GpmSampler
    from migperf.samplers.nvml import NvmlSampler

    device = getattr(backend, "device", None)
    found: list[Sampler] = [NvmlSampler(api, device, mig=kind == "nvml")]
    if GpmSampler.supported(api, device):
        found += [GpmSampler(api, device, instance) for instance in gpu_instances or (None,)]
    return found
