"""Worker processes as their parent sees them: started anew, spoken to in JSON, never waited for forever."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from migperf.backends import Launch
from migperf.worker import THREAD_VARIABLES

TAIL = 600
"""Characters of a dead worker's standard error that a message shows."""


@dataclass(frozen=True)
class Failure:
    """What became of a worker that gives no numbers.

    Attributes:
        status: `oom` or `failed`.
        message: One line.
        at: When it ended, in ns of the monotonic clock; 0 if it never began.
    """

    status: Literal["oom", "failed"]
    message: str
    at: int = 0


def environment_of(launch: Launch, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the whole environment of a worker, complete before it imports anything.

    The parent's own limits on threads are taken out: what the launch does not set is the library's default.
    """
    environment = dict(os.environ if base is None else base)
    for name in (*THREAD_VARIABLES, "VECLIB_MAXIMUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"):
        environment.pop(name, None)
    if launch.threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(launch.threads))
        environment |= launch.environment
    else:
        environment |= {k: v for k, v in launch.environment.items() if k not in THREAD_VARIABLES}
    return environment


class Worker:
    """A process in an instance.

    Args:
        index: Of the worker.
        launch: How it gets into the instance.
        task: What it is to do: workload, load, file of raw times.
        answers: Where its answers go, with its index; None when it has closed its output.
    """

    def __init__(
        self, index: int, launch: Launch, task: Mapping[str, Any], answers: "queue.Queue[tuple[int, Any]]"
    ) -> None:
        self.index = index
        self.failure: Failure | None = None
        self.ready: dict[str, Any] = {}
        self.done: dict[str, Any] = {}
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "migperf.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment_of(launch),
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()
        self.tell(
            {
                **task,
                "parent": os.getpid(),
                "cpus": None if launch.cpus is None else list(launch.cpus),
                "threads": launch.threads,
                "device": launch.torch_device,
            }
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def _read(self, answers: "queue.Queue[tuple[int, Any]]") -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:
                try:
                    answers.put((self.index, json.loads(line)))
                except ValueError:
                    answers.put((self.index, {"failed": "failed", "message": f"said {line.strip()[:200]!r}"}))
        answers.put((self.index, None))

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send it a line; one that is dead is found out when its answer is awaited."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def fail(self, message: str, status: Literal["oom", "failed"] = "failed", at: int | None = None) -> None:
        """Give it up."""
        if self.failure is None:
            self.failure = Failure(status, message, time.perf_counter_ns() if at is None else at)
        self.kill()

    def died(self, stage: str) -> None:
        """Say why it gave no answer."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.fail(f"closed its output in {stage} but did not end")
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.fail(f"{how} in {stage}{self.tail()}")

    def tail(self) -> str:
        """Return the end of what it wrote to standard error, as part of a message."""
        with contextlib.suppress(OSError, ValueError):
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, size - 4 * TAIL))
            lines = self._errors.read().decode("utf-8", "replace").split()
            text = " ".join(lines)[-TAIL:]
            return f": {text}" if text else ""
        return ""

    def kill(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def end(self) -> None:
        """End it and free what it held."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._reader.join(5)
        self._errors.close()


def gather(
    workers: Sequence[Worker], answers: "queue.Queue[tuple[int, Any]]", stage: str, seconds: float
) -> None:
    """Wait until each worker that lives has answered, failed, died, or run out of time.

    Answers go to `worker.ready` or `worker.done`; a worker without one gets its `failure`.
    """
    by_index = {worker.index: worker for worker in workers}
    missing = {worker.index for worker in workers if worker.failure is None}
    limit = time.monotonic() + seconds
    while missing:
        try:
            index, message = answers.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            for index in missing:
                by_index[index].fail(f"gave no answer in {stage} for {seconds:g} s{by_index[index].tail()}")
            return
        worker = by_index[index]
        if index not in missing:
            continue
        missing.discard(index)
        if message is None:
            worker.died(stage)
        elif "failed" in message:
            where = message.get("stage", stage)
            worker.fail(f"{message['message']} ({where})", message["failed"], message.get("at"))
        elif message.get("ready"):
            worker.ready = message
        else:
            worker.done = message


def living(workers: Iterable[Worker]) -> list[Worker]:
    """Return those that have not failed."""
    return [worker for worker in workers if worker.failure is None]
