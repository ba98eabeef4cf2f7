import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from migperf.backends import Backend
from migperf.backends.gpu import GpuBackend
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import DeviceError, GeometryError
from migperf.profiles import layout
from shared_core import InputError

CONTROL = """#!/bin/sh
# A control daemon of MPS, as far as its commands go. It keeps what it was asked in $MPS_TEST_LOG.
echo "$CUDA_MPS_PIPE_DIRECTORY $CUDA_VISIBLE_DEVICES $*" >> "$MPS_TEST_LOG"
if [ "$1" = "-d" ]; then touch "$CUDA_MPS_PIPE_DIRECTORY/control"; exit 0; fi
read command
echo "$command" >> "$MPS_TEST_LOG"
if [ ! -e "$CUDA_MPS_PIPE_DIRECTORY/control" ]; then echo "Cannot find MPS control daemon process"; exit 1; fi
case "$command" in
  start_server*)
    [ -n "$MPS_TEST_NO_SERVER" ] && exit 0
    sleep 300 > /dev/null 2>&1 &
    echo $! > "$CUDA_MPS_PIPE_DIRECTORY/server" ;;
  get_server_list) cat "$CUDA_MPS_PIPE_DIRECTORY/server" 2> /dev/null || true ;;
  quit)
    [ -e "$CUDA_MPS_PIPE_DIRECTORY/server" ] && kill $(cat "$CUDA_MPS_PIPE_DIRECTORY/server")
    rm "$CUDA_MPS_PIPE_DIRECTORY/control" ;;
esac
exit 0
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "nvidia-cuda-mps-control"
    script.parent.mkdir()
    script.write_text(CONTROL)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MPS_TEST_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def gpu() -> GpuBackend:
    return GpuBackend(SimulatedNvml(layout("h100"), mig=False), spec="cuda:0")


def test_whole_gpu_is_one_instance() -> None:
    device = gpu()
    assert isinstance(device, Backend)
    (whole,) = device.profiles()
    assert (whole.name, whole.memory_mib) == ("whole", 81559)
    instance = device.create(whole)
    assert device.instances() == (instance,)
    launch = device.launch(instance)
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": device.identity}
    assert device.identity.startswith("GPU-")
    assert (launch.torch_device, launch.expected_memory_mib) == ("cuda:0", 81559)
    assert device.placements(whole) == ()
    with pytest.raises(GeometryError, match="has one instance, whole@0; use share for several processes"):
        device.create(whole)
    device.destroy(instance)
    assert device.placements(whole) == (0,)


def test_mig_mode_is_never_touched() -> None:
    api = SimulatedNvml(layout("h100"), mig=False)
    device = GpuBackend(api, spec="cuda:0")
    with pytest.raises(DeviceError, match="never touches MIG mode"):
        device.enable(True)
    with device.share("timeslice", 2):
        pass
    assert api.calls["nvmlDeviceSetMigMode"] == 0


def test_gpu_in_mig_mode_is_refused() -> None:
    with pytest.raises(
        DeviceError, match="is in MIG mode, in which nobody can use it whole: open it as nvml:0"
    ):
        GpuBackend(SimulatedNvml(layout("h100")), spec="cuda:0")


def test_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="cuda:1: the driver has GPUs 0 to 0"):
        GpuBackend(SimulatedNvml(layout("h100"), mig=False), 1, spec="cuda:1")


def test_time_slices_are_processes_on_the_whole_gpu(log: Path) -> None:
    device = gpu()
    with device.share("timeslice", 4) as sharing:
        assert len(sharing.instances) == 4
        assert sharing.mode == "timeslice"
        for instance in sharing.instances:
            assert device.launch(instance).environment == {"CUDA_VISIBLE_DEVICES": device.identity}
    assert not log.exists()  # no daemon was talked to


def test_mps_has_a_daemon_of_its_own_that_ends_with_the_block(log: Path) -> None:
    device = gpu()
    with device.share("mps", 3, thread_percentage=33.3) as sharing:
        assert sharing.mode == "mps"
        environments = [device.launch(instance).environment for instance in sharing.instances]
        assert len(environments) == 3
        assert environments[0]["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "33.3"
        assert environments[0]["CUDA_VISIBLE_DEVICES"] == device.identity
        pipe = Path(environments[0]["CUDA_MPS_PIPE_DIRECTORY"])
        assert "migperf-mps-" in str(pipe)
        server = int((pipe / "server").read_text())
        os.kill(server, 0)
    assert not pipe.exists()
    assert sharing.mode == "timeslice"  # it has ended
    first, *others = log.read_text().splitlines()
    assert first == f"{pipe} {device.identity} -d"
    assert "quit" in others


def test_mps_without_cap_sets_none(log: Path) -> None:
    device = gpu()
    with device.share("mps", 2) as sharing:
        environment = device.launch(sharing.instances[0]).environment
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in environment


def test_mps_that_has_no_server_is_recorded_as_time_slicing(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPS_TEST_NO_SERVER", "1")
    with gpu().share("mps", 2) as sharing:
        assert (sharing.wanted, sharing.mode) == ("mps", "timeslice")


def test_server_that_dies_during_the_run_is_noticed(log: Path) -> None:
    device = gpu()
    with device.share("mps", 2) as sharing:
        pipe = Path(device.launch(sharing.instances[0]).environment["CUDA_MPS_PIPE_DIRECTORY"])
        os.kill(int((pipe / "server").read_text()), signal.SIGKILL)
        for _ in range(100):
            if sharing.mode == "timeslice":
                break
            time.sleep(0.01)
        assert sharing.mode == "timeslice"


def test_server_that_nobody_has_buried_does_not_count(log: Path) -> None:
    device = gpu()
    with device.share("mps", 2) as sharing:
        pipe = Path(device.launch(sharing.instances[0]).environment["CUDA_MPS_PIPE_DIRECTORY"])
        os.kill(int((pipe / "server").read_text()), signal.SIGKILL)
        with subprocess.Popen(["true"]) as dead:
            os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
            (pipe / "server").write_text(f"{dead.pid}\n")
            assert Path(f"/proc/{dead.pid}").exists()
            assert sharing.mode == "timeslice"


def test_daemon_is_stopped_also_when_the_block_fails(log: Path) -> None:
    with pytest.raises(RuntimeError, match="in the block"), gpu().share("mps", 2):
        raise RuntimeError("in the block")
    assert log.read_text().splitlines()[-1] == "quit"


def test_missing_mps_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="nvidia-cuda-mps-control is not on PATH"), gpu().share("mps", 2):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("mode", "processes", "cap", "field"),
    [
        ("timeslice", 0, None, "processes"),
        ("mps", 49, None, "processes"),
        ("mps", 2, 0, "thread_percentage"),
        ("mps", 2, 101, "thread_percentage"),
        ("mps", 2, float("nan"), "thread_percentage"),
        ("timeslice", 2, 50, "thread_percentage"),
    ],
)
def test_numbers_out_of_range_are_refused(mode: str, processes: int, cap: float | None, field: str) -> None:
    share = gpu().share(mode, processes, cap)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=f"{field}: expected"), share:
        pytest.fail("the block must not run")


def test_processes_on_the_gpu_are_seen() -> None:
    api = SimulatedNvml(layout("h100"), mig=False)
    device = GpuBackend(api, spec="cuda:0")
    assert device.processes() == ()
    api.attach(4711)
    assert device.processes() == (4711,)
