from __future__ import annotations

import importlib
import os

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
