import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import migperf.backends.nvml as real
from migperf import plans
from migperf.backends import Backend
from migperf.backends.driver_errors import driver_error
from migperf.backends.mig import MigBackend
from migperf.backends.opening import open as open_device
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import DeviceError, DriverError, GeometryError
from migperf.geometry import Geometry, enumerate_geometries
from migperf.profiles import devices, layout

pynvml = pytest.importorskip("pynvml")


@pytest.fixture
def through_bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedNvml]:
    """NVIDIA's own bindings on a C library whose driver is simulated."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    library = importlib.import_module("fake_nvml_library")
    driver = SimulatedNvml(layout("h100"))
    monkeypatch.setattr(pynvml, "nvmlLib", library.FakeLibrary(driver))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    yield driver
    sys.modules.pop("fake_nvml_library", None)


def backend(device: str = "a100-40gb", *, allow_mode_change: bool = False, **options: Any) -> MigBackend:
    api = SimulatedNvml(layout(device), **options)
    return MigBackend(api, spec=f"sim:{device}", kind="simulated", allow_mode_change=allow_mode_change)


def cut(device: Backend, text: str) -> None:
    plans.apply(device, plans.plan(device, Geometry.parse(text, device)))


def test_controller_is_a_backend() -> None:
    assert isinstance(backend(), Backend)


@pytest.mark.parametrize("device", devices())
def test_layout_comes_from_the_driver_and_is_that_of_the_table(device: str) -> None:
    table, read = layout(device), backend(device).layout
    assert read.device == f"{device} (simulated)"
    assert (read.axis, read.slices) == (table.axis, table.slices)
    asked = {p.name: (p.id, p.slices, p.size, p.starts, p.maximum, p.sms) for p in read.profiles}
    assert asked == {p.name: (p.id, p.slices, p.size, p.starts, p.maximum, p.sms) for p in table.profiles}
    known = {p.id: p.preference for p in table.profiles}
    assert all(p.preference == known[p.id] for p in read.profiles)
    assert len(enumerate_geometries(backend(device))) == len(enumerate_geometries(table))


def test_profiles_that_an_old_driver_does_not_name_are_named_from_their_memory() -> None:
    names = [profile.name for profile in backend(driver="470.57").layout.profiles]
    assert names == ["1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb", "1g.5gb+me"]


@pytest.mark.parametrize(
    ("device", "names", "starts"),
    [
        ("a100-40gb", "3g 3g", [4, 0]),
        ("a100-40gb", "1g 1g 2g 3g", [6, 4, 0, None]),
        ("a100-40gb", "3g 1g 2g 1g", [4, 0, 2, 1]),
        ("a100-40gb", "2g 1g 1g 1g 1g 1g", [4, 6, 0, 1, 2, 3]),
        ("h100-80gb", "1g 1g 1g 1g 1g 1g 1g", [6, 4, 5, 0, 1, 2, 3]),
    ],
)
def test_recorded_orders_through_the_controller(device: str, names: str, starts: list[int | None]) -> None:
    gpu = backend(device)
    for name, start in zip(names.split(), starts, strict=True):
        profile = gpu.layout.profile(name)
        if start is None:
            with pytest.raises(DriverError, match="Insufficient Resources"):
                gpu.create(profile)
        else:
            assert gpu.create(profile).start == start


def test_planner_places_what_the_drivers_order_could_not() -> None:
    gpu = backend()
    cut(gpu, "1g,1g,2g,3g")
    assert str(plans.current(gpu)) == "3g.20gb@4,2g.10gb@0,1g.5gb@2,1g.5gb@3"


@pytest.mark.parametrize("device", ["a100-40gb", "a30", "rtx-pro-6000"])
def test_every_maximal_geometry_can_be_made_one_after_the_other(device: str) -> None:
    gpu = backend(device)
    for geometry in enumerate_geometries(gpu, maximal=True):
        made = plans.apply(gpu, plans.plan(gpu, geometry))
        assert plans.current(gpu) == geometry
        assert len({instance.uuid for instance in made}) == len(made)
        assert not any(gpu.placements(gpu.layout.profile(f"{slices}g")) for slices in (1, 2, 4))


def test_free_starts_come_from_the_live_state() -> None:
    gpu = backend()
    cut(gpu, "1g@0,1g@2,1g@4")
    by_name = {profile.name: tuple(gpu.placements(profile)) for profile in gpu.profiles()}
    assert by_name == {
        "1g.5gb": (1, 3, 5, 6),
        "1g.5gb+me": (1, 3, 5, 6),
        "1g.10gb": (6,),
        "2g.10gb": (),
        "3g.20gb": (),
        "4g.20gb": (),
        "7g.40gb": (),
    }


def test_full_profile_has_no_start_though_slices_are_free() -> None:
    gpu = backend()
    cut(gpu, "1g+me@0")
    assert gpu.placements(gpu.layout.profile("1g+me")) == ()


def test_taken_place_names_who_has_it() -> None:
    gpu = backend()
    three = gpu.create(gpu.layout.profile("3g"), 4)
    why = rf"no room for 1g.5gb@5: 3g.20gb@4 \(GPU instance {three.handle['gi']}\) has memory slice 5"
    with pytest.raises(GeometryError, match=why):
        gpu.create(gpu.layout.profile("1g"), 5)
    with pytest.raises(GeometryError, match=r"3g\.20gb cannot start at 2: it starts at 0, 4"):
        gpu.create(gpu.layout.profile("3g"), 2)


def test_holes_among_mig_devices_hide_no_instance() -> None:
    gpu = backend()
    cut(gpu, "1g@0,1g@1,1g@2")
    gpu.destroy(gpu.instances()[1])
    assert [instance.start for instance in gpu.instances()] == [0, 2]
    assert all(instance.uuid for instance in gpu.instances())


def test_worker_gets_the_uuid_and_what_it_must_find() -> None:
    gpu = backend()
    cut(gpu, "3g@4,1c.3g@0")
    part, whole = gpu.instances()
    launch = gpu.launch(whole)
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": whole.uuid}
    assert whole.uuid.startswith("MIG-")
    assert (launch.torch_device, launch.expected_memory_mib, launch.expected_sms) == ("cuda:0", 19968, 42)
    assert (part.profile.name, part.profile.slices) == ("1c.3g.20gb", 1)
    assert (gpu.launch(part).expected_memory_mib, gpu.launch(part).expected_sms) == (19968, 14)


def test_nobody_can_work_without_a_compute_instance() -> None:
    gpu = backend()
    made = gpu.create(gpu.layout.profile("3g"), 0, compute=())
    assert made.compute == ()
    with pytest.raises(DeviceError, match=r"nobody can work in 3g\.20gb@0: it has no compute instance"):
        gpu.launch(made)


def test_compute_instances_that_do_not_fit_leave_nothing_behind() -> None:
    gpu = backend()
    with pytest.raises(DriverError, match="Insufficient Resources"):
        gpu.create(gpu.layout.profile("3g"), 0, compute=(2, 2))
    with pytest.raises(GeometryError, match="cannot hold a compute instance of 4 slices"):
        gpu.create(gpu.layout.profile("3g"), 0, compute=(4,))
    gpu.api.fail("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(DriverError, match=r"cannot create 3g\.20gb@0: NVML error 999"):
        gpu.create(gpu.layout.profile("3g"), 0)
    assert not gpu.instances()


def test_instance_in_use_stays_and_its_users_are_named() -> None:
    gpu = backend()
    cut(gpu, "3g@4,2g@0")
    two, three = gpu.instances()
    gpu.api.attach(4711, three.uuid)
    gpu.api.attach(4712, three.uuid)
    assert gpu.processes(three) == (4711, 4712)
    assert gpu.processes(two) == ()
    assert gpu.processes() == (4711, 4712)
    with pytest.raises(DriverError, match=r"destroy 3g.20gb@4: it is in use by processes 4711, 4712"):
        gpu.destroy(three)
    gpu.destroy(two)
    assert [instance.start for instance in gpu.instances()] == [4]


def test_driver_that_cannot_list_processes_still_refuses() -> None:
    gpu = backend()
    three = gpu.create(gpu.layout.profile("3g"), 4)
    gpu.api.attach(4711, three.uuid)
    gpu.api.fail("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    with pytest.raises(DriverError, match="in use by another client"):
        gpu.destroy(three)
    assert gpu.instances() == (three,)


def test_handle_of_an_instance_that_somebody_replaced_destroys_nothing() -> None:
    gpu = backend()
    old = gpu.create(gpu.layout.profile("1g"), 0)
    gpu.destroy(old)
    new = gpu.create(gpu.layout.profile("1g"), 3)
    assert new.handle["gi"] == old.handle["gi"]  # ids are used again
    with pytest.raises(DriverError, match="no such thing"):
        gpu.destroy(old)
    assert gpu.instances() == (new,)


# MIG mode.


def test_mode_that_is_off_is_said_and_not_changed() -> None:
    gpu = backend(mig=False, allow_mode_change=True)
    assert not gpu.enabled()
    assert gpu.instances() == ()
    with pytest.raises(DeviceError, match=r"MIG mode is off on A100-40GB .*--allow-mode-change") as error:
        gpu.create(gpu.layout.profile("3g"))
    assert error.value.exit_code == 3
    assert gpu.api.calls["nvmlDeviceSetMigMode"] == 0


def test_mode_is_not_changed_without_consent() -> None:
    gpu = backend(mig=False)
    with pytest.raises(DeviceError, match=r"needs your consent: --allow-mode-change"):
        gpu.enable(True)
    assert gpu.api.calls["nvmlDeviceSetMigMode"] == 0


def test_mode_changes_with_consent() -> None:
    gpu = backend(mig=False, allow_mode_change=True)
    gpu.enable(True)
    cut(gpu, "3g,3g")
    with pytest.raises(DriverError, match="in use"):
        gpu.enable(False)
    cut(gpu, "empty")
    gpu.enable(False)
    assert not gpu.enabled()


def test_mode_change_on_a_used_gpu_names_the_processes() -> None:
    gpu = backend(mig=False, allow_mode_change=True)
    gpu.api.attach(815)
    with pytest.raises(DriverError, match=r"turn MIG mode on .*in use by process 815"):
        gpu.enable(True)


def test_pending_mode_asks_for_a_reset() -> None:
    gpu = backend(mig=False, allow_mode_change=True, resets=False)
    with pytest.raises(DriverError, match="has to be reset first: nvidia-smi --gpu-reset"):
        gpu.enable(True)
    with pytest.raises(DriverError, match=r"MIG mode is pending: the GPU has to be reset first"):
        gpu.create(gpu.layout.profile("3g"))


# What a person is told.


def test_missing_permission_names_the_capability() -> None:
    gpu = backend(permitted=False)
    with pytest.raises(DriverError, match=r"/proc/driver/nvidia/capabilities/mig/config"):
        gpu.create(gpu.layout.profile("3g"), 0)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (9, "driver is not loaded.*cpu and sim:a100-40gb work without one"),
        (12, r"no NVIDIA driver here .*cpu and sim:a100-40gb work without one"),
        (13, "lacks the call: a newer driver has it"),
        (16, "reset"),
        (18, "reboot after the driver's update"),
        (19, "in use by another client"),
        (25, "pin an older nvidia-ml-py"),
        (77, "NVML error 77"),
    ],
)
def test_each_error_of_the_driver_says_what_to_do(code: int, advice: str) -> None:
    gpu = backend()
    gpu.api.fail("nvmlDeviceGetMaxMigDeviceCount", code)
    with pytest.raises(DriverError, match=f"cannot list MIG devices: .*{advice}") as error:
        gpu.instances()
    assert error.value.code == code
    assert "\n" not in str(error.value)


def test_gpu_that_is_not_there() -> None:
    api = SimulatedNvml(layout("a100"))
    with pytest.raises(DeviceError, match="nvml:3: the driver has GPUs 0 to 0"):
        MigBackend(api, 3, spec="nvml:3", kind="nvml")


def test_device_without_mig_says_how_to_open_it() -> None:
    api = SimulatedNvml(layout("a100"))
    api._enums = {}
    with pytest.raises(DeviceError, match="has no MIG: open it as cuda:N"):
        MigBackend(api, spec="nvml:0", kind="nvml")


# Opening.


def test_devices_open_by_name(tmp_path: Path) -> None:
    simulated = open_device("sim:a100-40gb")
    assert (simulated.kind, simulated.simulated, simulated.facts()["simulated"]) == ("simulated", True, True)
    assert open_device("cpu").kind == "cpu"
    kept = open_device(f"sim:a30@{tmp_path / 'gpu.json'}")
    cut(kept, "2g,1g")
    again = open_device(f"sim:a30@{tmp_path / 'gpu.json'}")
    assert again.instances() == kept.instances()
    assert len(again.instances()) == 2


@pytest.mark.parametrize("spec", ["gpu", "nvml:x", "cuda:-1", "cpu:2", ""])
def test_names_of_no_device_are_refused(spec: str) -> None:
    with pytest.raises(DeviceError, match=r"no device|expected a GPU's index"):
        open_device(spec)


def test_without_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DeviceError, match=r"pip install 'migperf\[nvidia\]'; the devices cpu and sim"):
        open_device("nvml:0")


def test_without_a_driver_it_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    for spec in ("nvml:0", "cuda:0"):
        with pytest.raises(DriverError, match=r"no NVIDIA driver here .*cpu and sim:a100-40gb work"):
            open_device(spec)


def test_controller_runs_through_the_real_bindings(through_bindings: SimulatedNvml) -> None:
    gpu = real.open_nvml("nvml:0")
    assert gpu.kind == "nvml"
    assert not gpu.simulated
    table = layout("h100")
    assert {p.name: (p.id, p.size, p.starts, p.sms) for p in gpu.profiles()} == {
        p.name: (p.id, p.size, p.starts, p.sms) for p in table.profiles
    }
    cut(gpu, "3g,2g,1g,1g")
    assert str(plans.current(gpu)) == "3g.40gb@4,2g.20gb@0,1g.10gb@2,1g.10gb@3"
    assert gpu.launch(gpu.instances()[3]).expected_sms == 60
    with pytest.raises(DriverError, match="Insufficient Resources"):
        gpu.create(gpu.layout.profile("3g"))
    cut(gpu, "7g")
    assert [part.start for part in through_bindings.gpu.instances.values()] == [0]
    assert through_bindings.gpu.instances[0].profile == 0


def test_errors_of_the_real_bindings_are_read(through_bindings: SimulatedNvml) -> None:
    gpu = real.open_nvml("nvml:0")
    through_bindings.permitted = False
    with pytest.raises(DriverError, match="no permission") as error:
        gpu.create(gpu.layout.profile("3g"), 0)
    assert error.value.code == pynvml.NVML_ERROR_NO_PERMISSION
    assert driver_error(4, "create 3g.40gb@0").code == 4
