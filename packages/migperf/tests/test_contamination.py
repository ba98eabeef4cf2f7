"""The guard refuses runs on a busy machine, and real foreign load sets it off."""

import os
import subprocess
import sys
import time

import pytest

from migperf.contamination import Evidence, baseline, core_share, strangers, verdict
from migperf.samplers.procfs import CpuSampler, ProcessSampler

SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


@pytest.mark.parametrize(("share", "clean"), [(0.17, False), (0.94, False), (0.95, True), (1.0, True)])
def test_a_pinned_worker_with_less_than_95_percent_of_its_core_is_contaminated(share, clean):
    assert (verdict(Evidence(pinned=True, core_share=share)) == "") is clean
    assert verdict(Evidence(pinned=False, core_share=share)) == ""  # without partitions they share by design


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (Evidence(foreign_cores=0.3, cores=2), "other processes used 0.30 of 2 cores"),
        (Evidence(foreign_before=1.2, cores=2), "1.20 of 2 cores before the start"),
        (Evidence(stolen_cores=0.2, cores=2), "the hypervisor took 0.20"),
        (Evidence(gpu_processes=(77, 78)), "other processes on the GPU: 77, 78"),
        (Evidence(slowdowns=("hardware slowdown",)), "clocks were low: hardware slowdown"),
        (Evidence(pinned=True, core_share=0.17), "got 17% of the core-time"),
    ],
)
def test_each_reason_is_named(evidence, reason):
    assert reason in verdict(evidence)


def test_a_quiet_machine_is_clean_and_several_reasons_are_all_given():
    assert verdict(Evidence(True, 0.99, 0.05, 0.1, 0.0, 2, pressure=0.9)) == ""
    both = verdict(Evidence(True, 0.5, 1.0, cores=2))
    assert "50%" in both
    assert "1.00 of 2 cores" in both


def test_a_sleeper_that_wants_no_core_is_not_called_starved():
    assert core_share(0.0, 0.0) is None
    assert core_share(1.0, 1.0) == 0.5
    assert core_share(None, 1.0) is None


def test_a_rival_on_the_same_core_takes_half_of_it_and_the_guard_sees_it():
    cpu = min(os.sched_getaffinity(0))
    pair = [subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", SPIN]) for _ in range(2)]
    try:
        time.sleep(0.15)
        worker, cpus = ProcessSampler("worker0", [pair[0].pid]), CpuSampler([cpu])
        first, busy = worker.sample(), cpus.sample()
        begin = time.perf_counter()
        time.sleep(0.5)
        last, seconds = worker.sample(), time.perf_counter() - begin
        ran = last["cpu_seconds_total"] - first["cpu_seconds_total"]
        share = core_share(ran, last["wait_seconds_total"] - first["wait_seconds_total"])
        foreign = (cpus.sample()["busy_seconds_total"] - busy["busy_seconds_total"] - ran) / seconds
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert share < 0.7
    reason = verdict(Evidence(pinned=True, core_share=share, foreign_cores=foreign))
    assert "core-time" in reason
    assert "other processes used" in reason


def test_the_baseline_sees_a_process_that_is_not_ours():
    rival = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.2)
        assert baseline(0.4) > 0.3
    finally:
        rival.kill()
        rival.wait()


def test_other_processes_on_the_gpu_are_those_that_are_not_ours():
    class Api:
        class NVMLError(Exception):
            pass

        class Process:
            def __init__(self, pid):
                self.pid = pid

        def nvmlDeviceGetComputeRunningProcesses(self, device):
            return [self.Process(5), self.Process(9)]

    assert strangers(Api(), None, own=[5]) == (9,)
