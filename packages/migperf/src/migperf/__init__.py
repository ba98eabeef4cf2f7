"""MIGPerf: measures deep-learning work on partitions of an accelerator, and recommends a partition.

    device = migperf.open("sim:a100-40gb")
    with migperf.partitioned(device, migperf.Geometry.parse("3g,2g,1g,1g", device)) as instances:
        result = migperf.run(migperf.workloads.torchvision("resnet50", batch=8), instances)

After Zhang et al., "MIGPerf: A Comprehensive Benchmark for Deep Learning Training and Inference Workloads on
Multi-Instance GPUs", 2023 (arXiv 2301.00407).
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from migperf import exports, rivals, workloads
    from migperf.backends.opening import open
    from migperf.benching import bench
    from migperf.compatibility import compat
    from migperf.confirming import confirm_run
    from migperf.errors import DataError, DeviceError, DriverError, GeometryError
    from migperf.fleet import Gpu, recommend_fleet
    from migperf.geometry import Geometry, enumerate_geometries
    from migperf.jobs import InferenceJob, TrainingJob, read_jobs
    from migperf.journal import partitioned, restore
    from migperf.loads import Closed, Constant, Gamma, Poisson
    from migperf.measuring import Result, run
    from migperf.official import import_official
    from migperf.page import report
    from migperf.plans import apply, place, plan
    from migperf.presets import paper
    from migperf.recommender import recommend
    from migperf.records import Record, read
    from migperf.sharing import share
    from migperf.sweeps import Cell, sweep
    from migperf.tables import official_a100, table_from_records


__all__ = [
    # devices and geometries
    "open",
    "Geometry",
    "enumerate_geometries",
    "place",
    "plan",
    "apply",
    "partitioned",
    "restore",
    # measurement
    "workloads",
    "Closed",
    "Constant",
    "Poisson",
    "Gamma",
    "run",
    "Result",
    "Cell",
    "sweep",
    "share",
    "bench",
    "paper",
    "compat",
    # what was measured
    "Record",
    "read",
    "report",
    "import_official",
    "exports",
    # recommendation
    "InferenceJob",
    "TrainingJob",
    "read_jobs",
    "table_from_records",
    "official_a100",
    "recommend",
    "confirm_run",
    "Gpu",
    "recommend_fleet",
    "rivals",
    # errors
    "GeometryError",
    "DeviceError",
    "DriverError",
    "DataError",
]

_HOME = {
    "open": "backends.opening",
    "Geometry": "geometry",
    "enumerate_geometries": "geometry",
    "place": "plans",
    "plan": "plans",
    "apply": "plans",
    "partitioned": "journal",
    "restore": "journal",
    "Closed": "loads",
    "Constant": "loads",
    "Poisson": "loads",
    "Gamma": "loads",
    "run": "measuring",
    "Result": "measuring",
    "Cell": "sweeps",
    "sweep": "sweeps",
    "share": "sharing",
    "bench": "benching",
    "paper": "presets",
    "compat": "compatibility",
    "Record": "records",
    "read": "records",
    "report": "page",
    "import_official": "official",
    "InferenceJob": "jobs",
    "TrainingJob": "jobs",
    "read_jobs": "jobs",
    "table_from_records": "tables",
    "official_a100": "tables",
    "recommend": "recommender",
    "confirm_run": "confirming",
    "Gpu": "fleet",
    "recommend_fleet": "fleet",
    "GeometryError": "errors",
    "DeviceError": "errors",
    "DriverError": "errors",
    "DataError": "errors",
}

# Each name is imported at first use: planning needs neither NumPy nor torch, and `--help` is there at once.
__getattr__, __dir__ = lazy_names(__name__, _HOME, ("workloads", "exports", "rivals"))
