"""Workers are processes of their own in their instances; what they measured is what a record says."""

import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_records import record as made

from migperf import measuring
from migperf.backends import Instance, Launch, opening
from migperf.backends.cpu import CpuBackend
from migperf.loads import Closed, Constant, Poisson
from migperf.measuring import run
from migperf.parts import Part, assign
from migperf.processes import environment_of
from migperf.profiles import Profile
from migperf.records import raw_latencies, read
from migperf.samplers import Window
from migperf.whereabouts import misplaced, wrong_threads
from migperf.workloads import custom, parse, sleep, spin
from shared_core import InputError


@pytest.fixture
def cpu():
    backend = CpuBackend()
    for _ in range(len(backend.cores)):
        backend.create(backend.profiles()[0])
    return backend


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of workloads that workers can import."""

    def write(text):
        (tmp_path / "made_here.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def run_enough(workload, instances, backend, **options):
    """Run for a moment; for longer where a busy machine leaves that window too few requests."""
    for duration in (0.15, 0.6, 2.4, 10.0):
        result = run(workload, instances, backend, duration=duration, repeats=1, **options)
        if all(record.status != "insufficient" for record in result.records):
            break
    return result


def test_workers_are_processes_of_their_own_pinned_in_every_thread(cpu, module):
    module("""
        import os, threading, time
        def make(workload, device):
            seen = sorted(os.sched_getaffinity(0))
            threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
            class Task:
                facts = {"cpus": seen, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
                def step(self, requests): time.sleep(0.005)
                def synchronize(self): pass
            return Task()
    """)
    result = run_enough(custom("made_here:make"), cpu.instances(), cpu)
    facts = [record.extra["facts"] for record in result.records]
    assert [record.status for record in result.records] == ["ok"] * len(facts)
    assert len({fact["pid"] for fact in facts} | {os.getpid()}) == len(facts) + 1
    assert [tuple(fact["cpus"]) for fact in facts] == [i.handle["cpus"] for i in cpu.instances()]
    assert {fact["threads"] for fact in facts} == {"1"}
    assert all(record.metrics["threads"] >= 2 for record in result.records)


def test_a_thread_that_leaves_its_cpus_is_found_while_the_worker_runs(cpu, module):
    if len(cpu.cores) < 2:
        pytest.skip("needs two cores")
    module("""
        import os, threading, time
        def make(workload, device):
            def wander():
                time.sleep(0.2)
                os.sched_setaffinity(0, range(os.cpu_count()))
                time.sleep(9)
            class Task:
                facts, calls = {}, 0
                def step(self, requests):
                    self.calls += 1
                    if self.calls == 1: threading.Thread(target=wander, daemon=True).start()
                    time.sleep(0.005)
                def synchronize(self): pass
            return Task()
    """)
    (record,) = run(custom("made_here:make"), cpu.instances()[:1], cpu, duration=1.0, repeats=1).records
    assert record.status == "failed"
    assert (
        "left its partition during the run: 1 of" in record.message
        or "runs in the wrong place" in record.message
    )


def test_latency_covers_the_device_not_just_the_asking(cpu, module):
    """A fake asynchronous device: `step` returns at once, the work is done when it was waited for."""
    module("""
        import time
        class Task:
            facts, busy = {}, 0.0
            def step(self, requests): self.busy = time.perf_counter() + 0.02
            def synchronize(self): time.sleep(max(0.0, self.busy - time.perf_counter()))
        def make(workload, device): return Task()
    """)
    (record,) = run_enough(custom("made_here:make"), cpu.instances()[:1], cpu).records
    assert record.latency_ms["p50"] >= 20
    assert record.items_per_second <= 50


def test_slow_first_iterations_and_loading_stay_out_of_the_window(cpu, module):
    module("""
        import time
        class Task:
            facts, calls = {}, 0
            def __init__(self): time.sleep(0.3)
            def step(self, requests):
                self.calls += 1
                time.sleep(0.05 if self.calls <= 12 else 0.01)
            def synchronize(self): pass
        def make(workload, device): return Task()
    """)
    result = run(custom("made_here:make"), cpu.instances()[:1], cpu, duration=0.5, repeats=1)
    (record,) = result.records
    raw = result.raws[record.raw]
    assert np.median(raw[:10]) < 2 * np.median(raw[-10:])  # slow ones take five times as long
    assert 0.8 < record.items_per_second / (len(raw) / (raw.sum() / 1e9)) <= 1  # one after another
    assert record.metrics["first_ms"] >= 50
    assert record.metrics["warmup_iterations"] >= 20
    assert record.latency_ms["p50"] < 45
    assert record.window_seconds == pytest.approx(0.5)


def test_all_workers_measure_the_same_window_and_raw_latencies_give_the_percentiles(cpu, tmp_path):
    result = run(sleep("5ms"), cpu.instances(), cpu, Poisson(90, seed=3), duration=0.4, repeats=2)
    assert [(r.repeat, r.worker) for r in result.records] == [
        (repeat, worker) for repeat in range(2) for worker in range(len(cpu.cores))
    ]
    assert len({record.load["seed"] for record in result.records}) == len(result.records)
    for record in result.records:
        assert record.latency_ms["p50"] == pytest.approx(np.percentile(result.raws[record.raw], 50) / 1e6)
        assert record.latency_ms["p50"] >= 5
        assert record.metrics["send_lag_ms_p50"] >= 0
        assert "p99" not in record.latency_ms or record.samples >= 100
    path = result.save(tmp_path)
    assert read(path) == result.records
    assert len(raw_latencies(read(tmp_path), tmp_path)) == sum(r.samples for r in result.records)


def test_a_rate_above_capacity_is_saturated_with_no_percentile(cpu):
    load = Constant(400, backlog_limit=50)
    (record,) = run(sleep("10ms"), cpu.instances()[:1], cpu, load, duration=1.0, repeats=1).records
    assert record.status == "saturated"
    assert record.latency_ms == {}
    assert 20 < record.items_per_second < 101
    assert "items/s were achieved" in record.message


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise MemoryError('no memory for 9 GiB')", "oom", "no memory for 9 GiB"),
        (
            "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')",
            "oom",
            "can't allocate memory",
        ),
        (
            "import os; os.write(2, b'the driver went away'); os._exit(7)",
            "failed",
            "exit code 7.*driver went away",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "killed by signal 11"),
        ("raise ValueError('bad shape')", "failed", "ValueError: bad shape"),
        ("import time; time.sleep(60)", "failed", "gave no answer in start or warm-up for 0.5 s"),
    ],
)
def test_a_worker_that_never_gets_ready_neither_hangs_the_parent_nor_counts_as_0(
    cpu, module, body, status, message
):
    module(f"def make(workload, device):\n    {body}\n")
    timeout = 0.5 if "sleep" in body else 60  # a loaded machine takes its time to import
    begin = time.monotonic()
    (record,) = run(
        custom("made_here:make"), cpu.instances()[:1], cpu, duration=0.2, repeats=1, timeout=timeout
    ).records
    assert time.monotonic() - begin < 30
    assert record.status == status
    assert record.items_per_second is None
    assert re.search(message, record.message)


def test_affinity_that_is_refused_is_said_with_what_is_allowed(cpu):
    instance = replace(cpu.instances()[0], handle={"cpus": (4095,)})
    (record,) = run(sleep("5ms"), [instance], cpu, duration=0.2, repeats=1).records
    assert record.status == "failed"
    allowed = re.escape(str(sorted(os.sched_getaffinity(0))))
    assert re.search(rf"may not run on CPUs \[4095\] .*is allowed {allowed}", record.message)


def test_out_of_memory_in_one_instance_leaves_the_others_measured(cpu, module):
    if len(cpu.cores) < 2:
        pytest.skip("needs two cores")
    module("def make(workload, device):\n    raise MemoryError('too large')\n")
    result = run_enough([custom("made_here:make"), sleep("5ms")], cpu.instances()[:2], cpu)
    assert [record.status for record in result.records] == ["oom", "ok"]
    assert result.records[1].extra["neighbours_missing"] == 1
    summary = result.summary()
    assert summary["items_per_second"] is None  # no sum in which an OOM counts as 0
    assert summary["statuses"] == {"oom": 1, "ok": 1}


def test_a_rival_on_the_partition_contaminates_the_run(cpu):
    instance = cpu.instances()[0]
    code = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass" % instance.handle["cpus"][0]  # noqa: UP031
    rival = subprocess.Popen([sys.executable, "-c", code])
    try:
        (record,) = run(spin("2ms"), [instance], cpu, duration=0.6, repeats=1).records
    finally:
        rival.kill()
        rival.wait()
    assert record.metrics["core_share"] < 0.8
    assert record.items_per_second < 450  # 2 ms of a core each, of which the rival takes its share
    assert "core-time" in record.contaminated
    assert "other processes used" in record.contaminated


def test_children_end_when_their_parent_is_killed(cpu):
    code = """
        from migperf.backends.cpu import CpuBackend
        from migperf.measuring import run
        from migperf.workloads import sleep
        backend = CpuBackend()
        run(sleep("5ms"), [backend.create(backend.profiles()[0])], backend, duration=60, repeats=1)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    children = []
    for _ in range(300):
        text = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        children = [int(child) for child in text.split()]
        if children:
            break
        time.sleep(0.05)
    assert children
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(_alive(child) for child in children):
            return
        time.sleep(0.05)
    pytest.fail(f"{children} outlived their parent")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GPU = Profile("1g.5gb", 19, 1, 1, (0,), 1, memory_mib=4864, sms=14)
INSTANCE = Instance(GPU, 0, "MIG-1")
LAUNCH = Launch({"CUDA_VISIBLE_DEVICES": "MIG-1"}, None, None, "cuda:0", 4864.0, 14)
READY = {"pid": 5, "threads": {"5": "0-3"}, "visible": "MIG-1", "memory_mib": 4800.0, "sms": 14}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"visible": "0"}, "it sees 0, expected MIG-1"),
        ({"memory_mib": 40192.0}, "its device has 40192.0 MiB, expected about 4864"),
        ({"sms": 98}, "its device has 98 SMs, expected 14"),
        ({"pid": 6}, "process 6 answered, 5 was started"),
    ],
)
def test_a_worker_on_another_device_is_refused(change, message):
    part = Part(INSTANCE, sleep("1ms"), Closed(), LAUNCH)
    problem = misplaced(part, {**READY, **change}, 5)
    assert message in problem
    assert bool(problem) is bool(message)


def test_threads_outside_the_partition_are_named():
    assert wrong_threads({1: "0-1", 2: "0,1"}, (0, 1)) == ""
    assert "1 of 2 threads are not pinned to CPUs [0] (thread 2: 0-3)" in wrong_threads(
        {1: "0", 2: "0-3"}, (0,)
    )
    part = Part(INSTANCE, sleep("1ms"), Closed(), Launch(cpus=(0,), threads=1))
    assert "torch has 8 threads" in misplaced(part, {**READY, "threads": {5: "0"}, "torch_threads": 8}, 5)


def test_the_environment_is_complete_before_the_worker_starts(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pinned = environment_of(Launch({"CUDA_VISIBLE_DEVICES": "MIG-1"}, (0, 1), 2))
    assert (pinned["OMP_NUM_THREADS"], pinned["MKL_NUM_THREADS"]) == ("2", "2")
    assert pinned["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    # "default threads" are the libraries' own, not what our parent happened to have set
    assert "OMP_NUM_THREADS" not in environment_of(Launch({"OMP_NUM_THREADS": "2"}))


def test_both_unpinned_rivals_lose_affinity_and_only_one_keeps_the_threads(cpu):
    instances = cpu.instances()
    pinned, default, matched = (
        assign(sleep("1ms"), instances, cpu, Closed(), mode)[0].launch
        for mode in ("partition", "unpinned", "unpinned-matched")
    )
    assert (pinned.cpus, pinned.threads) == (instances[0].handle["cpus"], 1)
    assert (default.cpus, default.threads) == (None, None)
    assert (matched.cpus, matched.threads) == (None, 1)


def test_an_unpinned_worker_may_use_all_cpus_and_belongs_to_no_instance(cpu, module):
    module("""
        import os, time
        class Task:
            facts = {"cpus": sorted(os.sched_getaffinity(0)), "omp": os.environ.get("OMP_NUM_THREADS")}
            def step(self, requests): time.sleep(0.005)
            def synchronize(self): pass
        def make(workload, device): return Task()
    """)
    (record,) = run_enough(custom("made_here:make"), cpu.instances()[:1], cpu, mode="unpinned").records
    assert record.extra["facts"] == {"cpus": sorted(os.sched_getaffinity(0)), "omp": None}
    assert (record.mode, record.instance, record.profile) == ("unpinned", "", "")


def test_the_mode_that_was_seen_is_the_one_recorded(cpu):
    (record,) = run_enough(
        sleep("5ms"), cpu.instances()[:1], cpu, mode="mps", observed_mode=lambda: "timeslice"
    ).records
    assert record.mode == "timeslice"


def test_torch_runs_with_the_threads_of_its_partition(cpu, module):
    module("""
        import torch
        def make(workload, device):
            layer = torch.nn.Linear(64, 64)
            return lambda: [layer(torch.ones(256, 64)) for _ in range(20)]
    """)
    (record,) = run_enough(custom("made_here:make"), cpu.instances()[:1], cpu).records
    assert record.status == "ok", record.message
    assert record.peak_memory_mib > 50
    assert record.host["torch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": 0}, "duration: expected seconds above 0"),
        ({"duration": float("nan")}, "duration: expected seconds above 0"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"mode": "shared"}, "mode: expected one of partition"),
        ({"instances": []}, "there is no instance"),
        ({"workloads": [sleep("1ms")] * 99}, "workloads: expected 1 or"),
        (
            {"load": Constant(5, collect=2), "workloads": parse("torchvision/resnet18", batch=4)},
            "only single items",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_anything_starts(cpu, change, message):
    values = {"workloads": sleep("1ms"), "instances": cpu.instances(), "backend": cpu, **change}
    with pytest.raises(InputError, match=message):
        run(**values)


def test_simulated_numbers_follow_the_stated_law_and_are_marked_everywhere(tmp_path):
    backend = opening.open("sim:a100-40gb", allow_mode_change=True)
    if not backend.enabled():
        backend.enable(True)
    by_name = {profile.name: profile for profile in backend.profiles()}
    instances = [backend.create(by_name["3g.20gb"], 4), backend.create(by_name["1g.5gb"], 0)]
    workload = parse("transformers/bert", batch=64)
    result = run(workload, instances, backend, duration=5, repeats=1)
    for record, (sm, memory) in zip(result.records, ((3, 4), (1, 1)), strict=True):
        assert record.items_per_second == pytest.approx(1000 / (0.678 / sm + 0.880 / memory), rel=0.01)
        assert record.simulated
        assert "simulated" in record.raw
    assert result.save(tmp_path).name == "records.simulated.jsonl"
    assert all("simulated" in path.name for path in tmp_path.rglob("*") if path.is_file())
    large = run(replace(workload, mode="train", batch=32), instances, backend, duration=1, repeats=1)
    assert [record.status for record in large.records] == ["ok", "oom"]
    assert large.records[1].items_per_second is None


def test_a_summary_pools_requests_and_leaves_contaminated_repeats_out():
    raws = {f"{r}{w}": np.full(100 + 50 * w, (1 + r + w) * 1_000_000) for r in range(3) for w in range(2)}
    records = [
        made(
            repeat=r,
            worker=w,
            raw=f"{r}{w}",
            items_per_second=10.0 + r,
            contaminated="busy" if r == 0 else "",
        )
        for r in range(3)
        for w in range(2)
    ]
    summary = measuring.Result(records, raws).summary()
    assert summary["items_per_second"] == 23.0  # both workers: median of 22 and 24
    assert summary["range"] == (22.0, 24.0)
    pooled = np.concatenate([raws[f"{r}{w}"] for r in (1, 2) for w in range(2)]) / 1e6
    assert summary["samples"] == len(pooled)
    assert summary["latency_ms"]["p99"] == np.percentile(pooled, 99)
    assert summary["clean_repeats"] == 2
    assert summary["contaminated"] == ["busy"]


def test_the_energy_of_an_instance_is_an_estimate_and_the_boards_a_measurement(cpu):
    """A board that reads 100 J more each second, and instances that are active in another measure."""
    profiles = [replace(GPU, name="3g.20gb", slices=3), GPU]
    parts = [
        Part(Instance(profile, index, f"MIG-{index}", {"gi": index}), sleep("1ms"), Closed(), LAUNCH)
        for index, profile in enumerate(profiles)
    ]
    seen = Window({"gpm0.sm_active": 0.5, "gpm1.sm_active": 0.5}, {"board.energy_joules_total": 100.0})
    split = measuring._split(parts, seen)["energy_split"]
    assert split["3g.20gb@0"]["joules"] == pytest.approx(75)
    assert all(part["estimated"] for part in split.values())
    assert measuring._split(parts, Window({"gpm0.sm_active": 0.5}, seen.differences)) == {}
    assert measuring._split(parts, Window(seen.means, {"board.energy_joules_total": None})) == {}
