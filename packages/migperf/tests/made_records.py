"""Records as a sweep would leave them, made by hand for tests of what reads them."""

from typing import Any

from migperf.records import Record

SLICES = {"1g.5gb": (1, 1), "2g.10gb": (2, 2), "3g.20gb": (3, 4), "4g.20gb": (4, 4), "7g.40gb": (7, 8)}


def record(profile: str = "1g.5gb", **changes: Any) -> Record:
    """Return a clean closed-loop record of 100 items/s at 10 ms, changed as told."""
    slices, size = SLICES.get(profile, (1, 1))
    load = changes.pop("load", {"kind": "closed", "concurrency": 1})
    workload = {"source": "torchvision", "model": "resnet18", "mode": "infer", "batch": 1, "seed": 0}
    workload |= changes.pop("workload", {})
    values: dict[str, Any] = {
        "run_id": "run",
        "cell": "cell",
        "repeat": 0,
        "worker": 0,
        "started": "2026-01-01T00:00:00Z",
        "backend": "nvml",
        "device": "A100-40GB",
        "simulated": False,
        "contaminated": "",
        "mode": "partition",
        "geometry": f"{profile}@0",
        "instance": f"{profile}@0",
        "profile": profile,
        "slices": slices,
        "memory_slices": size,
        "status": "ok",
        "items_per_second": 100.0,
        "latency_ms": {"mean": 10.0, "p50": 10.0, "p99": 10.0},
        "samples": 2000,
        "window_seconds": 10.0,
    }
    return Record(**{**values, "workload": workload, "load": load, **changes})


def poisson(rate: float, **more: Any) -> dict[str, Any]:
    return {"kind": "poisson", "rate": rate, "seed": 666, **more}
