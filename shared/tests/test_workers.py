import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from worker_tasks import deaf, tidy

from shared_core.workers import WorkerPool

SCRIPT = """
import os, signal, sys, time
from shared_core.workers import WorkerPool

def nothing():
    pass

def work(folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    Finalized()

class Finalized:  # no exception leaves it, and Python would complain of one on stderr
    def __del__(self):
        time.sleep(100)

if __name__ == "__main__":
    try:
        with WorkerPool(2, sys.argv[1], nothing) as pool:
            list(pool.map(work, [sys.argv[2]] * 9))
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


@pytest.fixture
def working(tmp_path):
    """Start processes that have two workers in their work; they lead process groups of their own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    made = []

    def start(method):
        folder = tmp_path / method
        folder.mkdir()
        command = [sys.executable, tmp_path / "script.py", method, folder]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        made.append(process)
        assert until(lambda: len(list(folder.iterdir())) == 2)
        return process, [int(path.name) for path in folder.iterdir()]

    yield start
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def ended(pid):
    # Nobody waits for an orphan in some containers: it stays as a zombie.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
methods = pytest.mark.parametrize("method", ["fork", "spawn"])


@linux
@methods
def test_workers_end_when_their_parent_is_killed(working, method):
    process, workers = working(method)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: all(map(ended, workers)))


@linux
@methods
def test_ctrl_c_ends_all_and_workers_say_nothing(working, method):
    process, workers = working(method)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == (None, "interrupted\n")
    assert process.returncode == 1
    assert until(lambda: all(map(ended, workers)))


@linux
@methods
def test_a_worker_is_started_with_interrupts_blocked_and_its_parent_goes_on_without(method):
    with WorkerPool(1, method) as pool:
        assert pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result() == {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_during_a_submission_comes_after_it(monkeypatch):
    done = []

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,))
        thread.start()  # with the mask of this one
        thread.join()
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)

    with WorkerPool(1) as pool:
        monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(abs, -1)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@linux
@pytest.mark.parametrize("task", [time.sleep, tidy, deaf], ids=lambda task: task.__name__)
def test_an_error_in_the_block_ends_workers_and_drops_what_waits(tmp_path, task):
    class Own(Exception):
        pass

    futures, workers = [], []
    others = multiprocessing.active_children()

    def block():
        with WorkerPool(2, start=os.chdir, arguments=(tmp_path,)) as pool:
            futures.extend(pool.submit(task, 100) for _ in range(9))
            assert until(lambda: sum(future.running() for future in futures) >= 2)
            if task is not time.sleep:
                assert until(lambda: len(list(tmp_path.iterdir())) == 2)
            workers.extend(one.pid for one in multiprocessing.active_children() if one not in others)
            futures[-1].cancel()
            raise Own

    with pytest.raises(Own):
        block()
    assert len(workers) == 2
    assert all(map(ended, workers))
    assert all(future.cancelled() or future.exception() for future in futures)
    assert len(list(tmp_path.iterdir())) == (2 if task is deaf else 0), "what a task leaves behind"


def test_workers_start_with_one_thread_and_a_block_that_ends_well_has_all_done():
    with WorkerPool(2) as pool:
        futures = [pool.submit(torch.get_num_threads) for _ in range(5)]
    assert [future.result() for future in futures] == [1] * 5


def test_an_error_after_a_shutdown_is_the_blocks():
    with pytest.raises(LookupError), WorkerPool(1) as pool:  # noqa: PT012
        pool.shutdown()
        raise LookupError


def test_an_error_of_a_task_is_the_callers():
    with WorkerPool(1) as pool, pytest.raises(ValueError, match="invalid literal"):
        pool.submit(int, "many").result()
