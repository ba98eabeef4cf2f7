import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from migperf import journal, plans
from migperf.backends.mig import MigBackend
from migperf.backends.opening import open as open_device
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import DeviceError, DriverError, GeometryError
from migperf.geometry import Geometry
from migperf.profiles import layout


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGPERF_STATE", str(tmp_path / "state"))


@pytest.fixture
def gpu(tmp_path: Path) -> MigBackend:
    return opened(tmp_path)


def opened(folder: Path) -> MigBackend:
    device = open_device(f"sim:a100-40gb@{folder / 'gpu.json'}")
    assert isinstance(device, MigBackend)
    return device


def cut(device: MigBackend, text: str) -> None:
    plans.apply(device, plans.plan(device, Geometry.parse(text, device)))


def test_device_is_as_before_after_the_block(gpu: MigBackend) -> None:
    cut(gpu, "3g@4,2g@0")
    with journal.partitioned(gpu, Geometry.parse("3g,1g,1g", gpu)) as instances:
        assert [str(plans.slot_of(instance)) for instance in instances] == [
            "3g.20gb@4",
            "1g.5gb@0",
            "1g.5gb@1",
        ]
        assert journal.journal_file(gpu).exists()
    assert str(plans.current(gpu)) == "3g.20gb@4,2g.10gb@0"
    assert not journal.journal_file(gpu).exists()


def test_instance_that_stays_put_is_never_destroyed(gpu: MigBackend) -> None:
    cut(gpu, "3g@4,2g@0")
    uuid = gpu.instances()[1].uuid
    gpu.api.attach(4711, uuid)  # somebody works in it all the time
    with journal.partitioned(gpu, Geometry.parse("3g,1g,1g", gpu)) as instances:
        assert instances[0].uuid == uuid
    assert gpu.instances()[1].uuid == uuid


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_device_is_as_before_when_the_block_fails(gpu: MigBackend, error: type[BaseException]) -> None:
    cut(gpu, "2g@2")
    with pytest.raises(error), journal.partitioned(gpu, Geometry.parse("7g", gpu), keep=True):
        raise error
    assert str(plans.current(gpu)) == "2g.10gb@2"
    assert journal.pending(gpu) is None


def test_kept_geometry_stays(gpu: MigBackend) -> None:
    with journal.partitioned(gpu, Geometry.parse("3g,3g", gpu), keep=True):
        pass
    assert str(plans.current(gpu)) == "3g.20gb@0,3g.20gb@4"
    assert journal.pending(gpu) is None


@pytest.mark.parametrize("after", range(4))
def test_driver_that_refuses_midway_leaves_the_device_as_it_was(gpu: MigBackend, after: int) -> None:
    cut(gpu, "7g")
    gpu.api.fail("nvmlDeviceCreateGpuInstanceWithPlacement", 23, after=after)
    wanted = Geometry.parse("3g,2g,1g,1g", gpu)
    with pytest.raises(DriverError, match="Insufficient Resources"), journal.partitioned(gpu, wanted):
        pytest.fail("the block must not run")
    assert str(plans.current(gpu)) == "7g.40gb@0"
    assert journal.pending(gpu) is None


def test_compute_instances_that_somebody_made_come_back(gpu: MigBackend) -> None:
    gpu.create(gpu.layout.profile("3g"), 4, compute=(1, 2))
    gpu.create(gpu.layout.profile("2g"), 0, compute=())
    gpu.create(gpu.layout.profile("1c.2g"), 2)
    before = plans.current(gpu)
    with journal.partitioned(gpu, Geometry.parse("7g", gpu)):
        pass
    assert plans.current(gpu) == before
    assert sorted(slot.compute or () for slot in before.slots) == [(), (), (1, 2)]


def test_invalid_geometry_changes_nothing(gpu: MigBackend) -> None:
    cut(gpu, "3g@4")
    with (
        pytest.raises(GeometryError, match="at most 1 can exist"),
        journal.partitioned(gpu, Geometry.parse("4g,4g", gpu)),
    ):
        pytest.fail("the block must not run")
    assert str(plans.current(gpu)) == "3g.20gb@4"
    assert not journal.journal_file(gpu).exists()


def test_instance_in_use_that_has_to_go_is_refused_before_any_change(gpu: MigBackend) -> None:
    cut(gpu, "3g@4,2g@0,1g@2")
    gpu.api.attach(4711, gpu.instances()[2].uuid)
    destroyed = gpu.api.calls["nvmlGpuInstanceDestroy"]
    why = r"3g\.20gb@4 has to go, but is in use by process 4711"
    with pytest.raises(DeviceError, match=why), journal.partitioned(gpu, Geometry.parse("7g", gpu)):
        pytest.fail("the block must not run")
    assert gpu.api.calls["nvmlGpuInstanceDestroy"] == destroyed
    assert not journal.journal_file(gpu).exists()


def test_planning_alone_changes_nothing_and_writes_nothing(gpu: MigBackend) -> None:
    cut(gpu, "2g@0")
    changes = ("nvmlGpuInstanceDestroy", "nvmlDeviceCreateGpuInstanceWithPlacement")
    before = [gpu.api.calls[name] for name in changes]
    assert str(plans.plan(gpu, Geometry.parse("7g", gpu))).endswith("create 7g.40gb@0")
    assert [gpu.api.calls[name] for name in changes] == before
    assert not journal.folder().exists()


def test_mode_is_turned_on_for_the_block_and_off_after_it() -> None:
    api = SimulatedNvml(layout("a100-40gb"), mig=False)
    off = MigBackend(api, spec="sim:a100-40gb", kind="simulated", allow_mode_change=True)
    with journal.partitioned(off, Geometry.parse("3g,3g", off)) as instances:
        assert len(instances) == 2
        assert off.enabled()
    assert not off.enabled()


def test_mode_stays_off_without_consent() -> None:
    api = SimulatedNvml(layout("a100-40gb"), mig=False)
    off = MigBackend(api, spec="sim:a100-40gb", kind="simulated")
    with (
        pytest.raises(DeviceError, match="needs your consent"),
        journal.partitioned(off, Geometry.parse("3g", off)),
    ):
        pytest.fail("the block must not run")
    assert api.nvmlDeviceGetMigMode(off.device) == [0, 0]
    assert journal.pending(off) is None


# A process that is killed.

KILLED = """
import os, signal, sys
from migperf import journal
from migperf.backends.opening import open as open_device
from migperf.geometry import Geometry
gpu = open_device(sys.argv[1])
if sys.argv[2]:
    gpu.api.fail(sys.argv[2], lambda: os.kill(os.getpid(), signal.SIGKILL), after=int(sys.argv[3]))
with journal.partitioned(gpu, Geometry.parse("3g,2g,1g,1g", gpu)):
    print("inside", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(gpu: MigBackend, function: str = "", after: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), gpu.spec, function, str(after)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


KILLS = [
    ("nvmlGpuInstanceDestroy", 0),  # its compute instance has gone
    ("nvmlDeviceCreateGpuInstanceWithPlacement", 0),
    ("nvmlDeviceCreateGpuInstanceWithPlacement", 2),
    ("nvmlGpuInstanceCreateComputeInstance", 1),  # a GPU instance without compute instance
    ("", 0),  # in the block
]


@pytest.mark.parametrize(("function", "after"), KILLS)
def test_after_a_kill_the_next_start_finds_the_journal_and_goes_back(
    gpu: MigBackend, tmp_path: Path, function: str, after: int
) -> None:
    cut(gpu, "3g@0,1g@6")
    before = plans.current(gpu)
    process = start(gpu, function, after)
    process.communicate("")
    assert process.returncode == -signal.SIGKILL
    again = opened(tmp_path)
    assert plans.current(again) != before
    left = journal.pending(again)
    assert left is not None
    assert left.process == process.pid
    assert str(left).startswith(
        f"process {process.pid} changed {gpu.spec} from 3g.20gb@0,1g.5gb@6 to 3g.20gb,"
    )
    with (
        pytest.raises(DeviceError, match="did not change it back: restore it first"),
        journal.partitioned(again, Geometry.parse("7g", again)),
    ):
        pytest.fail("the block must not run")
    assert journal.restore(again) is not None
    assert plans.current(again) == before
    assert journal.pending(again) is None
    assert journal.restore(again) is None


def test_worker_that_outlives_its_parent_keeps_the_journal(gpu: MigBackend, tmp_path: Path) -> None:
    process = start(gpu)
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    gpu.api.attach(4711, gpu.instances()[0].uuid)
    process.communicate("")
    again = opened(tmp_path)
    with pytest.raises(DeviceError, match="in use by process 4711"):
        journal.restore(again)
    assert journal.pending(again) is not None
    again.api.detach(4711)
    journal.restore(again)
    assert again.instances() == ()


def test_two_processes_do_not_change_one_device_at_once(gpu: MigBackend, tmp_path: Path) -> None:
    process = start(gpu)
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    again = opened(tmp_path)
    why = rf"process {process.pid} is changing sim:a100-40gb@.*: wait for it"
    with (
        pytest.raises(journal.Busy, match=why),
        journal.partitioned(again, Geometry.parse("7g", again)),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(journal.Busy, match=why):
        journal.restore(again)
    assert journal.pending(again) is None  # its process lives
    process.communicate("")
    assert journal.pending(again) is not None


def test_reset_in_between_is_no_obstacle(gpu: MigBackend, tmp_path: Path) -> None:
    cut(gpu, "2g@0")
    start(gpu).communicate("")
    gpu.api.reset()
    journal.restore(opened(tmp_path))
    assert str(plans.current(gpu)) == "2g.10gb@0"


def test_journal_that_cannot_be_read_is_not_guessed_at(gpu: MigBackend) -> None:
    file = journal.journal_file(gpu)
    file.parent.mkdir(parents=True)
    for text in ("{", "[]", json.dumps({"schema": 99}), json.dumps({"schema": 1, "before": []})):
        file.write_text(text)
        with pytest.raises(DeviceError, match="is not a journal of this version"):
            journal.pending(gpu)
    assert file.exists()


def test_folder_that_cannot_be_written_is_said_before_any_change(
    gpu: MigBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIGPERF_STATE", str(tmp_path / "file" / "state"))
    with (
        pytest.raises(DeviceError, match=r"journals cannot be kept in .*: set MIGPERF_STATE"),
        journal.partitioned(gpu, Geometry.parse("7g", gpu)),
    ):
        pytest.fail("the block must not run")
    assert gpu.instances() == ()


def test_gpu_that_ends_with_its_process_needs_no_journal() -> None:
    first, second = open_device("sim:a100-40gb"), open_device("sim:a100-40gb")
    wanted = Geometry.parse("3g,3g", first)
    with journal.partitioned(first, wanted), journal.partitioned(second, wanted):  # two GPUs, not one
        assert len(first.instances()) == 2
    assert first.instances() == ()
    assert not journal.folder().exists()


def test_cores_of_a_cpu_need_no_journal() -> None:
    cpu = open_device("cpu")
    with journal.partitioned(cpu, Geometry.parse("1c", cpu)) as instances:
        assert len(instances) == 1
    assert cpu.instances() == ()
    assert journal.pending(cpu) is None
    assert not journal.folder().exists()


def test_identity_of_a_device_makes_a_file_name(gpu: MigBackend) -> None:
    assert journal.journal_file(gpu).name == f"{gpu.identity}.json"
    assert gpu.identity.startswith("GPU-")
