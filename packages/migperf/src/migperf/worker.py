"""The process inside an instance: pins itself, builds the workload, warms up, waits, is measured, reports.

`python -m migperf.worker` reads one JSON line of what to do, answers `ready`, and for each line of when to
begin and end answers `done`; raw times go into a file. Standard output belongs to the protocol: whatever
libraries print goes to standard error.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
WARMUP_LEAST, WARMUP_MOST, WARMUP_LAST = 20, 100, 10
WARMUP_SPREAD = 0.05
"""Coefficient of variation of the last ten iterations below which the workload counts as steady."""


def ask_the_kernel(parent: int) -> None:
    """Have this process end when the one that started it ends, however that ends, and wake up on time."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    libc.prctl(29, 1)  # PR_SET_TIMERSLACK: sleeps before arrivals end within a microsecond, not 50
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def pin(cpus: list[int] | None) -> None:
    """Restrict all threads of this process to the CPUs; those to come inherit it."""
    if cpus is None:
        return
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus)
        except ProcessLookupError:  # it ended meanwhile
            pass
        except OSError as error:  # a container that has other CPUs, or forbids the call
            allowed = sorted(os.sched_getaffinity(0))
            raise RuntimeError(
                f"may not run on CPUs {list(cpus)} ({error.strerror}): this process is allowed {allowed}"
            ) from error


def threads_of(pid: int) -> dict[int, str]:
    """Return the CPUs that each thread of a process may use, as the kernel lists them: thread -> `0-1,3`."""
    allowed: dict[int, str] = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{pid}/task/{thread}/status", encoding="ascii", errors="replace") as status,
        ):
            for line in status:
                if line.startswith("Cpus_allowed_list:"):
                    allowed[int(thread)] = line.partition(":")[2].strip()
    return allowed


def peak_memory_mib() -> float:
    """Return the largest resident memory that this process had, in MiB."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return "memory" in f"{type(error).__name__} {error}".lower()
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def main() -> int:
    """Do what the parent says."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    ask_the_kernel(asked["parent"])
    stage = "start"
    try:
        pin(asked["cpus"])
        stage = "build"
        run = _Run(asked)
        stage = "warm-up"
        run.warm_up()
        _answer(answers, {"ready": True, **run.identity()})
        stage = "measurement"
        while (
            moments := json.loads(sys.stdin.readline() or "null")
        ) is not None:  # until the parent goes away
            _answer(answers, {"done": True, **run.measure(moments)})
    except Exception as error:
        kind = "oom" if is_out_of_memory(error) else "failed"
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if not hasattr(error, "exit_code"):  # bad input needs no traceback
            import traceback

            traceback.print_exc()
        _answer(answers, {"failed": kind, "stage": stage, "message": message, "at": time.perf_counter_ns()})
        return 3
    return 0


def _answer(answers: IO[str], message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class _Run:
    """One worker's life."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        from migperf import loads, workloads

        self.asked = asked
        self.device = str(asked["device"])
        self.load = loads.from_spec(asked["load"])
        workload = workloads.from_spec(asked["workload"])
        self.torch_was_needed = workload.source in ("torchvision", "timm", "transformers")
        if self.torch_was_needed or self.device.startswith("cuda"):
            self.limit_threads()
        collect = self.load.collect if isinstance(self.load, loads.Open) else 1
        self.task = workload.build(self.device, collect)
        if asked["cpus"] is not None:
            pin(asked["cpus"])  # threads that a library began before it could inherit
        self.first_ms = self.interval = self.spread = 0.0
        self.iterations = 0

    def limit_threads(self) -> None:
        """Give torch as many threads as the instance has cores."""
        if self.asked["threads"] is None:
            return
        import torch

        torch.set_num_threads(self.asked["threads"])
        torch.set_num_interop_threads(1)

    def call(self, requests: int) -> Mapping[str, float] | None:
        """One timed call: it ends when the device is done, not when it was asked."""
        phases = self.task.step(requests)
        self.task.synchronize()
        return phases

    def warm_up(self) -> None:
        """Repeat until the last ten iterations vary by less than 5 %: 20 iterations at least, 100 at most."""
        import statistics

        times: list[int] = []
        limit = time.perf_counter_ns() + round(self.asked["warmup_seconds"] * 1e9)
        self.task.synchronize()
        while len(times) < WARMUP_MOST:
            begin = time.perf_counter_ns()
            self.call(1)
            times.append(time.perf_counter_ns() - begin)
            last = times[-WARMUP_LAST:]
            if len(times) >= WARMUP_LEAST:
                self.spread = statistics.stdev(last) / statistics.fmean(last)
                if self.spread < WARMUP_SPREAD or begin > limit:
                    break
        self.first_ms, self.iterations = times[0] / 1e6, len(times)
        self.interval = statistics.fmean(times[-WARMUP_LAST:])

    def identity(self) -> dict[str, Any]:
        """Say where this runs: what the parent holds against what it asked for."""
        found: dict[str, Any] = {
            "pid": os.getpid(),
            "threads": threads_of(os.getpid()),
            "interval": self.interval,
            "first_ms": self.first_ms,
            "warmup_iterations": self.iterations,
            "warmup_spread": self.spread,
            "facts": dict(self.task.facts),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        torch = sys.modules.get("torch")
        if torch is not None:
            found |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
        if torch is not None and self.device.startswith("cuda"):
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "device_name": properties.name,
                "uuid": str(getattr(properties, "uuid", "")),
                "memory_mib": properties.total_memory / 2**20,
                "sms": properties.multi_processor_count,
            }
        return found

    def measure(self, moments: Mapping[str, Any]) -> dict[str, Any]:
        """Serve the load between two times of the machine's clock, and write what it took."""
        import numpy as np

        from migperf import loads

        start, stop = int(moments["start"]), int(moments["stop"])
        if "load" in moments:  # a window of its own schedule
            self.load = loads.from_spec(moments["load"])
        clock = loads.WallClock()
        gc.collect()
        gc.freeze()  # what model and libraries left is not gone through again in the window
        self.task.synchronize()
        if isinstance(self.load, loads.Open):
            schedule = loads.arrivals(self.load, (stop - start) / 1e9)
            late = max(0, clock.now() - start)
            clock.wait_until(start)
            timings = loads.drive_open(self.load, schedule, self.call, clock, start)
        else:
            late = max(0, clock.now() - start)
            timings = loads.drive_closed(self.load, self.call, stop, clock, start)
        phases = {f"phase_{name}": np.asarray(values, float) for name, values in timings.phases.items()}
        times = {name: getattr(timings, name) for name in ("scheduled", "started", "completed", "calls")}
        np.savez(self.asked["raw"], allow_pickle=False, **times, **phases)
        return {
            "late_ns": late,
            "end": timings.end,
            "saturated": timings.saturated,
            "backlog": timings.backlog,
            "threads": threads_of(os.getpid()),
            "peak_memory_mib": self.peak(),
        }

    def peak(self) -> float:
        """Return the largest memory of the device, or of the process where the device is the CPU, in MiB."""
        torch = sys.modules.get("torch")
        if torch is not None and self.device.startswith("cuda"):
            return torch.cuda.max_memory_reserved(self.device) / 2**20
        return peak_memory_mib()


if __name__ == "__main__":
    sys.exit(main())
