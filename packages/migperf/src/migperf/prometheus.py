"""Records as Prometheus reads them: one text page of gauges, for a node exporter's textfile collector."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from migperf.records import Record
from migperf.tables import batch_of, workload_key
from shared_core import files
from shared_core.errors import needs_extra

LABELS = ("run", "cell", "repeat", "worker", "device", "geometry", "instance", "profile", "mode", "workload",
          "batch", "load", "simulated", "contaminated")  # fmt: skip


def prometheus_text(records: Sequence[Record]) -> str:
    """Return the records as gauges: throughput, latency by quantile, memory, energy, samples, status.

    Raises:
        InputError: prometheus-client is not installed.
    """
    with needs_extra("dcgm", "migperf"):
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import GaugeMetricFamily

    names = {
        "items_per_second": "Items per second of one worker",
        "peak_memory_bytes": "Largest memory of one worker",
        "board_energy_joules": "Energy of the whole board in the window",
        "samples": "Requests or steps measured",
    }
    families: dict[str, Any] = {
        name: GaugeMetricFamily(f"migperf_{name}", help_text, labels=LABELS)
        for name, help_text in names.items()
    }
    latency: Any = GaugeMetricFamily(
        "migperf_latency_seconds",
        "Closed loop: service time; open loop: from the scheduled arrival",
        labels=(*LABELS, "quantile"),
    )
    status: Any = GaugeMetricFamily("migperf_status", "1 for what it came to", labels=(*LABELS, "status"))
    for record in records:
        labels = _labels(record)
        for name, value in _values(record).items():
            if value is not None:
                families[name].add_metric(labels, value)
        for name, value in record.latency_ms.items():
            if name[:1] == "p":
                latency.add_metric([*labels, f"{int(name[1:]) / 100:g}"], value / 1000)
        status.add_metric([*labels, record.status], 1.0)

    class Page:
        def collect(self) -> Iterable[Any]:
            return [*families.values(), latency, status]

    registry = CollectorRegistry()
    registry.register(Page())  # pyright: ignore[reportArgumentType]
    return generate_latest(registry).decode()


def _labels(record: Record) -> list[str]:
    load = f"{record.load.get('kind')} {record.load.get('rate', record.load.get('concurrency', 1)):g}"
    found = (record.run_id, record.cell, record.repeat, record.worker, record.device, record.geometry,
             record.instance, record.profile, record.mode, workload_key(record.workload), batch_of(record),
             load, str(record.simulated).lower(), str(bool(record.contaminated)).lower())  # fmt: skip
    return [str(value) for value in found]


def _values(record: Record) -> dict[str, float | None]:
    memory = record.peak_memory_mib
    return {
        "items_per_second": record.items_per_second,
        "peak_memory_bytes": None if memory is None else memory * 2**20,
        "board_energy_joules": record.energy_joules,
        "samples": float(record.samples),
    }


def write_prometheus(records: Sequence[Record], path: str | os.PathLike[str]) -> Path:
    """Write the page; of simulated records it is named `....simulated.prom`."""
    from migperf.page import marked

    target = Path(path)
    if any(record.simulated for record in records):
        target = marked(target)
    files.write_text(target, prometheus_text(records))
    return target
