import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from shared_core.workers import end_with_parent

def work(folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(100)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(2, context, end_with_parent) as pool:
        list(pool.map(work, [sys.argv[2]] * 2))
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_when_their_parent_is_killed(tmp_path, method):
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen([sys.executable, tmp_path / "killed.py", method, tmp_path / "pids"])
    assert until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert until(lambda: all(map(ended, workers)))
