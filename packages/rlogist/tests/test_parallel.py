from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import pytest

from rlogist.parallel import run_all
from shared_core import InputError


def _work(task: int) -> int:
    if task == 2:
        raise InputError("a broken slide")
    if task == 3:
        raise RuntimeError("a fault of ours")
    if task == 4:
        os._exit(11)  # as when the kernel ends a process that took all memory
    return task * 10


def test_one_that_fails_stops_no_other():
    seen = []
    done = run_all(_work, [0, 1, 2, 3, 5], progress=lambda at, of: seen.append((at, of)))
    assert [one.result for one in done] == [0, 10, None, None, 50]
    assert [one.error for one in done] == [
        None,
        None,
        "a broken slide",
        "RuntimeError: a fault of ours",
        None,
    ]
    assert done[2].fault is None
    assert "Traceback" in done[3].fault
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.fixture
def work_module(tmp_path, monkeypatch):
    """Spawned processes import the work by name, which a test module in importlib mode does not have."""
    (tmp_path / "slide_work.py").write_text(
        "import os\n"
        "def work(task):\n"
        "    if task == 4:\n"
        "        os._exit(11)\n"
        "    if task == 2:\n"
        "        raise ValueError('bad')\n"
        "    return task * 10, os.getpid()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return importlib.import_module("slide_work").work


def test_processes_give_results_in_order_and_outlive_a_process_that_dies(work_module):
    done = run_all(work_module, [0, 1, 2, 3, 4, 5, 6], jobs=2)
    assert [one.index for one in done] == list(range(7))
    assert [one.result[0] if one.result else None for one in done] == [0, 10, None, 30, None, 50, 60]
    assert done[2].error == "ValueError: bad"
    assert "process that worked on it died" in done[4].error
    assert os.getpid() not in {one.result[1] for one in done if one.result}


def test_jobs_below_one_are_refused():
    with pytest.raises(InputError, match=r"jobs: expected at least 1 \(got 0\)"):
        run_all(_work, [1], jobs=0)


def test_ray_is_started_where_no_cluster_runs_and_outlives_a_worker_that_dies(monkeypatch):
    """A stand-in of Ray's interface; the test below runs Ray itself."""
    started, asked = [], {}

    class WorkerCrashedError(Exception):
        pass

    class Remote:
        def __init__(self, work):
            self.remote = lambda *arguments: (work, arguments)

    def init(address=None, **options):
        if address:
            raise ConnectionError("no cluster")
        started.append(options)

    def get(reference):
        work, arguments = reference
        if arguments[2] == 4:
            raise WorkerCrashedError("it crashed\nand more")
        return work(*arguments)

    ray = ModuleType("ray")
    exceptions = ModuleType("ray.exceptions")
    exceptions.RayError = WorkerCrashedError
    ray.is_initialized, ray.init, ray.get = (lambda: bool(started)), init, get
    ray.remote = lambda **options: asked.update(options) or Remote
    ray.wait = lambda references, num_returns: (references[-num_returns:], references[:-num_returns])
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    for _ in range(2):
        done = run_all(_work, [0, 2, 4, 5], jobs=3, backend="ray", gpus=1)
        assert [one.result for one in done] == [0, None, None, 50]
        assert [one.error for one in done] == [None, "a broken slide", "the worker died: it crashed", None]
    assert (len(started), started[0]["num_cpus"], asked["num_gpus"]) == (1, 3, 1)


# Ray leaves its processes' output files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_ray_does_the_same(work_module):
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    assert ray.__version__
    # Ray takes long to start on shared machines.
    if not os.environ.get("RLOGIST_TEST_RAY"):
        pytest.skip("set RLOGIST_TEST_RAY=1: starting Ray takes long on shared machines")
    done = run_all(work_module, [0, 2, 3, 4], jobs=2, backend="ray")
    assert [one.result[0] if one.result else None for one in done] == [0, None, 30, None]
