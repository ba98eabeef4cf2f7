"""The targets of load generator, enumeration, recommender, sampler and controller; writes bench.json.

    python packages/migperf/benchmarks/bench.py --out runs/bench/migperf

`theirs` is the target, or what a user would do instead, which `peer` names; a ratio above 1 means that the
target is met, or that this package is faster. Work of one core, taken as processor time where other load on
the machine would count otherwise (lags are wall time and want a quiet core).
What foreign load was there is printed and recorded.
"""

import argparse
import gc
import itertools
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from migperf import contamination
from migperf.backends.opening import open as open_device
from migperf.geometry import _enumerate, enumerate_geometries
from migperf.jobs import InferenceJob, TrainingJob
from migperf.loads import Closed, Constant, Poisson, WallClock, arrivals, drive_closed, drive_open
from migperf.profiles import layout
from migperf.recommender import recommend
from migperf.rivals import compare, elsa
from migperf.samplers import Recorder
from migperf.samplers.procfs import CpuSampler, ProcessSampler
from migperf.samplers.psi import PressureSampler
from migperf.tables import official_a100
from migperf.workloads import parse
from shared_core.bench import finish, row

A100 = layout("a100-40gb")


def cpu_seconds(function, repeats):
    """The least processor time of several calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        function()
        best = min(best, time.process_time() - begin)
    return best


def load_rows(quick):
    seconds = 1.0 if quick else 5.0
    load = Constant(1000.0)
    schedule = arrivals(load, seconds)
    gc.collect()
    gc.freeze()  # as a worker does before its window
    lags = [
        drive_open(load, schedule, lambda requests: None, WallClock()).lag / 1e6
        for _ in range(1 if quick else 3)
    ]
    best = min(lags, key=lambda lag: float(np.percentile(lag, 99)))
    yield row("send lag p99 at 1000 requests/s, no-op target, best of 3 runs",
              float(np.percentile(best, 99)), 0.2, "target", "", "ms")  # fmt: skip
    yield row("send lag p50 of that run (no target)", float(np.median(best)), 0.2, "target of p99", "", "ms")
    middle = float(np.median([np.percentile(lag, 99) for lag in lags]))
    yield row("send lag p99, median of the runs", middle, 0.2, "target", "", "ms")

    count = 20_000
    schedule = np.zeros(count, dtype=np.int64)  # all due at once: nothing but the driver's own work

    def driven():
        drive_open(Poisson(1e9, seed=1, backlog_limit=count), schedule, lambda requests: None, WallClock())

    spent = cpu_seconds(driven, 3 if quick else 7) / count * 1e6
    yield row("driver's own work a request", spent, 20.0, "target", "", "us")
    yield harness_row(quick)


def harness_row(quick):
    """Throughput through the driver against a bare loop, in turns, at a service time of 10 ms."""
    calls = 20 if quick else 100
    task = parse("spin:10ms").build()

    def bare():
        begin = time.process_time()
        for _ in range(calls):
            task.step(1)
        return calls / (time.process_time() - begin)

    def through():
        done = []

        def step(requests):
            task.step(requests)
            done.append(1)
            if len(done) == calls:
                raise StopIteration

        begin = time.process_time()
        try:
            drive_closed(Closed(), step, time.perf_counter_ns() + 10**12, WallClock())
        except StopIteration:
            return calls / (time.process_time() - begin)
        raise AssertionError("the driver ended early")

    pairs = [(through(), bare()) for _ in range(3 if quick else 5)]
    ours, theirs = (float(np.median(values)) for values in zip(*pairs, strict=True))
    return row("items/s through the harness at 10 ms (target: 0.99 of a bare loop)", ours, theirs,
               "bare loop", "", "items/s", more_is_better=True)  # fmt: skip


def plain_states(profiles):
    """Placed states by a bitmask search as one writes it: masks and maxima only, no objects."""
    slots = [(p, ((1 << p.size) - 1) << start) for p in profiles for start in p.starts]
    found = []

    def grow(index, taken, counts, media):
        found.append(taken)
        for i in range(index, len(slots)):
            profile, mask = slots[i]
            if taken & mask or counts.get(profile.id, 0) >= profile.maximum or (profile.media and media):
                continue
            grow(
                i + 1,
                taken | mask,
                {**counts, profile.id: counts.get(profile.id, 0) + 1},
                media or profile.media,
            )

    grow(0, 0, {}, False)
    return len(found)


def enumeration_rows(quick):
    repeats = 3 if quick else 9
    base = [p for p in A100.profiles if p.name in ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb")]

    def fresh(profiles, maximal=False):
        def work():
            _enumerate.cache_clear()
            enumerate_geometries(A100, profiles, maximal=maximal)

        return work

    for what, profiles, chosen, target in (
        ("the 298 placed states", "base", base, 2.0), ("all 2319 placed states", "all", A100.profiles, 20.0)
    ):  # fmt: skip
        ours = cpu_seconds(fresh(profiles), repeats) * 1e3
        yield row(f"{what}, as geometries", ours, target, "target", "", "ms")
        plain = cpu_seconds(lambda c=chosen: plain_states(c), repeats) * 1e3
        yield row(f"{what}, as geometries", ours, plain,
                  "bitmask search as one writes it", "", "ms")  # fmt: skip
    ours = cpu_seconds(fresh("all", maximal=True), repeats) * 1e3
    yield row("the 239 maximal states of all profiles", ours, 50.0, "target", "", "ms")
    enumerate_geometries(A100, "all", maximal=True)
    again = cpu_seconds(lambda: enumerate_geometries(A100, "all", maximal=True), repeats) * 1e3
    yield row("the same, asked again", again, ours, "the first time", "", "ms")


def recommend_rows(quick):
    jobs = [
        InferenceJob("a", "bert-base-multilingual", 300, 120), InferenceJob("b", "minilm-l12", 400, 250),
        InferenceJob("c", "distiluse-v1", 200, 250), TrainingJob("d", "vit_base_patch16", 8),
        TrainingJob("e", "moco-v2-resnet50", 8),
    ]  # fmt: skip
    table = official_a100()
    spent = cpu_seconds(lambda: recommend(A100, jobs, table), 1 if quick else 3)
    yield row("recommend, 5 jobs on one GPU, exact", spent, 1.0, "target", "", "s")
    greedy = cpu_seconds(lambda: compare(A100, jobs, table), 1 if quick else 3)
    yield row(
        "recommend, 5 jobs on one GPU, exact", spent, greedy, "greedy, MISO and PARIS together", "", "s"
    )
    yield from dispatch_rows(quick)


def dispatch_rows(quick):
    """What a dispatcher that looks at the queues would gain over shares that are fixed beforehand."""
    service = {"2g": 10.0, "1g": 20.0}  # ms; 150 items/s in all at most
    rate, seconds = 100.0, 60 if quick else 600
    ours = []
    for number, milliseconds in enumerate(service.values()):
        share = rate / milliseconds / sum(1 / one for one in service.values())
        ours.append(elsa(arrivals(Poisson(share, seed=number), seconds), [milliseconds], 1e9))
    theirs = elsa(arrivals(Poisson(rate, seed=7), seconds), [service["1g"], service["2g"]], 60.0)
    fixed, looked = (float(np.percentile(found, 99)) for found in (np.concatenate(ours), theirs))
    yield row("p99 of a service in 2g and 1g at 2/3 load, shares fixed beforehand (simulated queues)", fixed,
              looked, "ELSA, which looks at the queues", "", "ms")  # fmt: skip


def sampler_row(quick):
    seconds = 1.0 if quick else 5.0
    samplers = [ProcessSampler("worker0", [os.getpid()]), CpuSampler(), PressureSampler()]
    with Recorder(samplers, 0.1) as recorder:
        time.sleep(seconds)
    yield row(
        "samplers at 10 Hz, share of a core", 100 * recorder.cpu_seconds / seconds, 1.0, "target", "", "%"
    )


def controller_row(quick):
    backend = open_device("sim:a100-40gb")
    device, api = backend.device, backend.api
    count = 200 if quick else 2000

    def calls():
        for _ in range(count):
            api.nvmlDeviceGetGpuInstanceRemainingCapacity(device, 19)

    yield row("a call of the simulated driver", cpu_seconds(calls, 5) / count * 1e6, 20.0, "target", "", "us")


def import_row(quick):
    code = "import time; b = time.process_time(); import migperf; print(time.process_time() - b)"
    spent = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(1 if quick else 5)
    )
    yield row("import migperf", spent * 1e3, 300.0, "target", "", "ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    foreign = contamination.baseline(1.0)
    print(f"others use {foreign:.2f} of {len(os.sched_getaffinity(0))} CPUs")
    parts = (import_row, controller_row, enumeration_rows, recommend_rows, sampler_row, load_rows)
    found = []
    for one in itertools.chain.from_iterable(part(arguments.quick) for part in parts):
        print(f"{one['what']:66} {one['ours']:10.4g} {one['theirs']:10.4g} {one['unit']:8} "
              f"x{one['ratio']:.2f}  {one['peer']}", flush=True)  # fmt: skip
        found.append(one)
    finish("migperf", found, arguments.out, foreign_cores=foreign, scipy=metadata.version("scipy"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
