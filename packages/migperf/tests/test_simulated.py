import ctypes
import inspect
import re
from ctypes import byref, c_uint
from pathlib import Path
from typing import Any

import pytest

import migperf
from migperf.backends import nvml_types
from migperf.backends.nvml_types import NVMLError
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import DeviceError
from migperf.profiles import devices, layout

pynvml = pytest.importorskip("pynvml")

SOURCE = Path(migperf.__file__).parent

# What drivers were seen to do: ids in order of creation, and where each went; None: Insufficient Resources.
RECORDED = [
    ("a100-40gb", [9, 9], [4, 0]),
    ("a100-40gb", [19, 19, 14, 9], [6, 4, 0, None]),
    ("a100-40gb", [9, 19, 14, 19], [4, 0, 2, 1]),
    ("a100-40gb", [14, 19, 19, 19, 19, 19], [4, 6, 0, 1, 2, 3]),
    ("h100-80gb", [19] * 7, [6, 4, 5, 0, 1, 2, 3]),
]


def started(device: str = "a100-40gb", **options: Any) -> tuple[SimulatedNvml, Any]:
    api = SimulatedNvml(layout(device), **options)
    api.nvmlInit()
    return api, api.nvmlDeviceGetHandleByIndex(0)


def create(api: SimulatedNvml, handle: Any, profile: int, start: int | None = None) -> Any:
    if start is None:
        return api.nvmlDeviceCreateGpuInstance(handle, profile)
    size = api.nvmlDeviceGetGpuInstanceProfileInfoById(handle, profile)
    places = (api.c_nvmlGpuInstancePlacement_t * 8)()
    count = c_uint(8)
    api.nvmlDeviceGetGpuInstancePossiblePlacements(handle, size.id, places, byref(count))
    place = api.c_nvmlGpuInstancePlacement_t(start, places[0].size)
    return api.nvmlDeviceCreateGpuInstanceWithPlacement(handle, profile, byref(place))


def error_of(function: Any, *arguments: Any) -> int:
    with pytest.raises(NVMLError) as error:
        function(*arguments)
    return error.value.value


@pytest.mark.parametrize(("device", "ids", "starts"), RECORDED)
def test_recorded_orders_of_creation(device: str, ids: list[int], starts: list[int | None]) -> None:
    api, handle = started(device)
    for profile, start in zip(ids, starts, strict=True):
        if start is None:
            refused = error_of(api.nvmlDeviceCreateGpuInstance, handle, profile)
            assert refused == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES
        else:
            made = api.nvmlDeviceCreateGpuInstance(handle, profile)
            assert api.nvmlGpuInstanceGetInfo(made).placement.start == start


# The bindings' shapes.


def functions_in(text: str) -> set[str]:
    return set(re.findall(r"\bnvml(?:Init|Shutdown|System|Device|GpuInstance|ComputeInstance)\w*", text))


def test_every_call_of_the_controllers_exists_in_the_bindings_and_in_the_simulator() -> None:
    for name in ("mig", "gpu", "nvml"):
        text = (SOURCE / "backends" / f"{name}.py").read_text()
        for function in functions_in(text):
            assert callable(getattr(pynvml, function)), function
            assert callable(getattr(SimulatedNvml, function)), function
        for constant in re.findall(r"api\.((?:NVML_|c_nvml)\w+)", text):
            assert hasattr(pynvml, constant), constant
            assert hasattr(SimulatedNvml, constant), constant


def test_every_call_of_the_simulator_has_the_signature_of_the_bindings() -> None:
    api = SimulatedNvml(layout("a100"))
    names = [name for name in dir(api) if name.startswith("nvml")]
    assert len(names) > 25
    for name in names:
        real = inspect.signature(inspect.unwrap(getattr(pynvml, name)))
        mine = inspect.signature(getattr(api, name))
        assert list(mine.parameters) == list(real.parameters), name
        defaults = [parameter.default for parameter in mine.parameters.values()]
        assert defaults == [parameter.default for parameter in real.parameters.values()], name


@pytest.mark.parametrize("name", [name for name in dir(nvml_types) if re.match(r"c_nvml\w+", name)])
def test_structures_are_those_of_the_bindings(name: str) -> None:
    mine = getattr(nvml_types, name)
    if not hasattr(mine, "_fields_"):
        assert issubclass(mine, ctypes._Pointer)
        return
    # Of processes the bindings give an object with the attributes of the third version.
    real = getattr(pynvml, name.replace("ProcessInfo_t", "ProcessInfo_v3_t"))
    assert [field for field, *_ in mine._fields_] == [field for field, *_ in real._fields_]
    assert ctypes.sizeof(mine) == ctypes.sizeof(real)
    for field, *_ in mine._fields_:
        assert getattr(mine, field).offset == getattr(real, field).offset, field


@pytest.mark.parametrize("name", [name for name in dir(nvml_types) if name.startswith("NVML_")])
def test_numbers_are_those_of_the_bindings(name: str) -> None:
    assert getattr(nvml_types, name) == getattr(pynvml, name)


# What a driver enforces.


def test_ids_are_not_enums() -> None:
    api, handle = started()
    info = api.nvmlDeviceGetGpuInstanceProfileInfo(handle, pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE)
    assert (info.id, info.name) == (19, b"MIG 1g.5gb")
    # The enum of 1g is 0, and 0 is the id of 7g: passing it makes the largest instance.
    made = api.nvmlDeviceCreateGpuInstance(handle, pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE)
    assert api.nvmlGpuInstanceGetInfo(made).placement.size == 8
    wrong = pynvml.NVML_GPU_INSTANCE_PROFILE_2_SLICE
    assert error_of(api.nvmlDeviceCreateGpuInstance, handle, wrong) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_profiles_that_a_device_lacks_are_not_supported() -> None:
    api, handle = started()
    lacking = pynvml.NVML_GPU_INSTANCE_PROFILE_6_SLICE
    refused = error_of(api.nvmlDeviceGetGpuInstanceProfileInfo, handle, lacking)
    assert refused == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_old_drivers_call_newer_enums_invalid_and_know_no_names() -> None:
    api, handle = started(driver="450.80")
    newer = pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV2
    ask = api.nvmlDeviceGetGpuInstanceProfileInfo
    assert error_of(ask, handle, 0) == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    assert error_of(ask, handle, newer, 1) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert not hasattr(ask(handle, 0, 1), "name")
    place = byref(api.c_nvmlGpuInstancePlacement_t(0, 4))
    refused = error_of(api.nvmlDeviceCreateGpuInstanceWithPlacement, handle, 9, place)
    assert refused == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND


def test_old_drivers_refuse_4g_beside_3g_and_new_ones_do_not() -> None:
    for driver, fits in (("470.57", False), ("580.95", True)):
        api, handle = started(driver=driver)
        api.nvmlDeviceCreateGpuInstance(handle, 5)
        if fits:
            api.nvmlDeviceCreateGpuInstance(handle, 9)
        else:
            refused = error_of(api.nvmlDeviceCreateGpuInstance, handle, 9)
            assert refused == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES


def test_3g_on_hopper_leaves_no_slice_3() -> None:
    api, handle = started("h100")
    create(api, handle, 9, 0)
    place = byref(api.c_nvmlGpuInstancePlacement_t(3, 1))
    refused = error_of(api.nvmlDeviceCreateGpuInstanceWithPlacement, handle, 19, place)
    assert refused == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES


def test_placement_must_be_one_of_the_possible() -> None:
    api, handle = started()
    for start, size in ((2, 4), (0, 3)):
        place = byref(api.c_nvmlGpuInstancePlacement_t(start, size))
        refused = error_of(api.nvmlDeviceCreateGpuInstanceWithPlacement, handle, 9, place)
        assert refused == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_second_media_instance_is_refused() -> None:
    api, handle = started("a30")
    api.nvmlDeviceCreateGpuInstance(handle, 21)
    refused = error_of(api.nvmlDeviceCreateGpuInstance, handle, 6)
    assert refused == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES


def test_possible_placements_fill_the_array_and_the_count() -> None:
    api, handle = started()
    count = c_uint(0)
    ask = api.nvmlDeviceGetGpuInstancePossiblePlacements
    ask(handle, 14, None, byref(count))
    assert count.value == 3
    places = (api.c_nvmlGpuInstancePlacement_t * 3)()
    ask(handle, 14, places, byref(count))
    assert [(place.start, place.size) for place in places] == [(0, 2), (2, 2), (4, 2)]
    assert error_of(ask, handle, 14, places, byref(c_uint(1))) == pynvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_remaining_capacity_comes_from_the_live_state() -> None:
    api, handle = started()
    ask = api.nvmlDeviceGetGpuInstanceRemainingCapacity
    assert [ask(handle, profile) for profile in (19, 14, 9, 0, 20)] == [7, 3, 2, 1, 1]
    holes = [create(api, handle, 19, start) for start in range(7)]
    for index in (1, 3, 5):
        api.nvmlGpuInstanceDestroy(holes[index])
    # Three slices are free, and no two side by side.
    assert [ask(handle, profile) for profile in (19, 14, 9)] == [3, 0, 0]


def test_compute_instances_share_the_slices_of_their_gpu_instance() -> None:
    api, handle = started()
    made = create(api, handle, 9, 0)
    ask = api.nvmlGpuInstanceGetComputeInstanceProfileInfo
    sizes = [(ask(made, enum, 0).sliceCount, ask(made, enum, 0).instanceCount) for enum in (0, 1, 2)]
    assert sizes == [(1, 3), (2, 1), (3, 1)]
    assert error_of(ask, made, 3, 0) == pynvml.NVML_ERROR_NOT_SUPPORTED
    api.nvmlGpuInstanceCreateComputeInstance(made, 1)
    refused = error_of(api.nvmlGpuInstanceCreateComputeInstance, made, 1)
    assert refused == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    api.nvmlGpuInstanceCreateComputeInstance(made, 0)


def test_compute_instances_go_before_their_gpu_instance() -> None:
    api, handle = started()
    made = create(api, handle, 9, 0)
    part = api.nvmlGpuInstanceCreateComputeInstance(made, 2)
    assert error_of(api.nvmlGpuInstanceDestroy, made) == pynvml.NVML_ERROR_IN_USE
    api.nvmlComputeInstanceDestroy(part)
    api.nvmlGpuInstanceDestroy(made)
    assert error_of(api.nvmlGpuInstanceGetInfo, made) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_instance_with_a_process_stays() -> None:
    api, handle = started()
    made = create(api, handle, 9, 0)
    part = api.nvmlGpuInstanceCreateComputeInstance(made, 2)
    device = api.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
    api.attach(4711, api.nvmlDeviceGetUUID(device))
    assert [process.pid for process in api.nvmlDeviceGetComputeRunningProcesses(device)] == [4711]
    assert error_of(api.nvmlComputeInstanceDestroy, part) == pynvml.NVML_ERROR_IN_USE
    api.detach(4711)
    api.nvmlComputeInstanceDestroy(part)


def test_indices_of_mig_devices_have_holes() -> None:
    api, handle = started()
    parts = [
        api.nvmlGpuInstanceCreateComputeInstance(create(api, handle, 19, start), 0) for start in (0, 1, 2)
    ]
    api.nvmlComputeInstanceDestroy(parts[1])
    uuids = [
        api.nvmlDeviceGetUUID(api.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)) for index in (0, 2)
    ]
    assert all(re.fullmatch(r"MIG-[0-9a-f-]{36}", uuid) for uuid in uuids)
    assert uuids[0] != uuids[1]
    assert error_of(api.nvmlDeviceGetMigDeviceHandleByIndex, handle, 1) == pynvml.NVML_ERROR_NOT_FOUND


def test_nothing_can_be_made_while_the_mode_is_off() -> None:
    api, handle = started(mig=False)
    assert error_of(api.nvmlDeviceCreateGpuInstance, handle, 9) == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert api.nvmlDeviceSetMigMode(handle, 1) == 0
    assert api.nvmlDeviceGetMigMode(handle) == [1, 1]
    api.nvmlDeviceCreateGpuInstance(handle, 9)


def test_mode_cannot_change_while_somebody_uses_the_gpu() -> None:
    api, handle = started(mig=False)
    api.attach(99)
    assert api.nvmlDeviceSetMigMode(handle, 1) == pynvml.NVML_ERROR_IN_USE  # a status, not an exception
    assert api.nvmlDeviceGetMigMode(handle) == [0, 1]


@pytest.mark.parametrize(("device", "status"), [("a100", 16), ("a30", 16), ("h100", 0)])
def test_ampere_needs_a_reset_that_some_machines_cannot_do(device: str, status: int) -> None:
    api, handle = started(device, mig=False, resets=False)
    assert api.nvmlDeviceSetMigMode(handle, 1) == status
    assert api.nvmlDeviceGetMigMode(handle) == [int(not status), 1]
    api.reset()
    assert api.nvmlDeviceGetMigMode(handle) == [1, 1]


def test_reset_takes_all_instances_away() -> None:
    api, handle = started()
    made = create(api, handle, 9, 0)
    api.reset()
    assert error_of(api.nvmlGpuInstanceGetInfo, made) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_changes_need_permission_and_questions_do_not() -> None:
    api, handle = started(permitted=False)
    for function, argument in ((api.nvmlDeviceCreateGpuInstance, 9), (api.nvmlDeviceSetMigMode, 0)):
        assert error_of(function, handle, argument) == pynvml.NVML_ERROR_NO_PERMISSION
    assert api.nvmlDeviceGetGpuInstanceRemainingCapacity(handle, 9) == 2


def test_library_must_be_started() -> None:
    api = SimulatedNvml(layout("a100"))
    assert error_of(api.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED
    api.nvmlInit()
    api.nvmlShutdown()
    assert error_of(api.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED
    assert error_of(api.nvmlShutdown) == pynvml.NVML_ERROR_UNINITIALIZED


def test_injected_fault_comes_once_and_when_it_should() -> None:
    api, handle = started()
    api.fail("nvmlDeviceGetMigMode", 15, after=1)
    assert api.nvmlDeviceGetMigMode(handle) == [1, 1]
    assert error_of(api.nvmlDeviceGetMigMode, handle) == 15
    assert api.nvmlDeviceGetMigMode(handle) == [1, 1]


def test_gpu_in_a_file_outlives_its_driver(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    api, handle = started(state=file)
    create(api, handle, 9, 0)
    other, its_handle = started(state=file)
    assert other.nvmlDeviceGetUUID(its_handle) == api.nvmlDeviceGetUUID(handle)
    assert other.nvmlDeviceGetGpuInstanceRemainingCapacity(its_handle, 9) == 1
    create(other, its_handle, 9, 4)
    assert api.nvmlDeviceGetGpuInstanceRemainingCapacity(handle, 9) == 0  # both see one GPU
    api.reset()
    assert other.nvmlDeviceGetGpuInstanceRemainingCapacity(its_handle, 9) == 2
    elsewhere, third = started(state=tmp_path / "other.json")
    assert elsewhere.nvmlDeviceGetUUID(third) != api.nvmlDeviceGetUUID(handle)


@pytest.mark.parametrize("device", devices())
def test_device_says_that_it_is_simulated(device: str) -> None:
    api, handle = started(device)
    assert api.nvmlDeviceGetName(handle) == f"{device} (simulated)"


def test_file_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text("notes")
    with pytest.raises(DeviceError, match="does not hold a simulated GPU: name a new file"):
        started(state=file)
    assert file.read_text() == "notes"
    file.unlink()
    started(state=file)
    with pytest.raises(DeviceError, match="holds a simulated A100-40GB, not A30-24GB"):
        started("a30", state=file)


# The only allocator.


def test_nothing_but_the_simulator_answers_in_a_drivers_place() -> None:
    users = {
        file.name
        for file in SOURCE.rglob("*.py")
        if re.search(r"import .*SimulatedNvml|nvmlDeviceCreateGpuInstance\(", file.read_text())
    }
    assert users <= {"simulated.py", "opening.py", "proof.py"}


def test_controller_does_not_ask_whether_it_runs_on_the_simulator() -> None:
    text = (SOURCE / "backends" / "mig.py").read_text()
    branches = re.findall(r"^\s*(?:el)?if .*|.* if .* else .*", text, flags=re.MULTILINE)
    assert branches
    assert not [line for line in branches if "simulated" in line or "kind" in line]
