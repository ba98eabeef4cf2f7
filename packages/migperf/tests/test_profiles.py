import doctest
import importlib
import subprocess
import sys

import pytest

from migperf.errors import DeviceError, GeometryError
from migperf.profiles import devices, layout, memory_in_name, recorded

SEVEN = {19: (7, 1), 20: (1, 1), 15: (4, 2), 14: (3, 2), 9: (2, 4), 5: (1, 4), 0: (1, 8)}  # id: maximum, size


@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("a100-40gb", "1g.5gb 1g.5gb+me 1g.10gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb"),
        ("a100-80gb", "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb"),
        ("h100", "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb"),
        ("h200", "1g.18gb 1g.18gb+me 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb"),
        ("b200", "1g.23gb 1g.23gb+me 1g.45gb 2g.45gb 3g.90gb 4g.90gb 7g.180gb"),
        ("a30", "1g.6gb 1g.6gb+me 2g.12gb 2g.12gb+me 4g.24gb"),
        ("rtx-pro-6000", "1g.24gb 2g.48gb 4g.96gb"),
    ],
)
def test_each_device_has_the_profiles_that_its_driver_lists(device: str, names: str) -> None:
    assert [profile.name for profile in layout(device).profiles] == names.split()


@pytest.mark.parametrize("device", [name for name in devices() if layout(name).slices == 7])
def test_seven_slice_devices_share_ids_sizes_and_maxima(device: str) -> None:
    table = layout(device)
    assert table.axis == 8
    assert {p.id: (p.maximum, p.size) for p in table.profiles} == SEVEN
    starts = {p.id: p.starts for p in table.profiles}
    assert starts == {
        19: (0, 1, 2, 3, 4, 5, 6),
        20: (0, 1, 2, 3, 4, 5, 6),
        15: (0, 2, 4, 6),
        14: (0, 2, 4),
        9: (0, 4),
        5: (0,),
        0: (0,),
    }


def test_hopper_tables_are_those_of_real_logs_not_of_the_mock_driver() -> None:
    table = layout("h100-80gb")
    assert {p.name: p.sms for p in table.profiles} == {
        "1g.10gb": 16,
        "1g.10gb+me": 16,
        "1g.20gb": 26,
        "2g.20gb": 32,
        "3g.40gb": 60,
        "4g.40gb": 64,
        "7g.80gb": 132,
    }
    assert [table.profile(name).size for name in ("3g", "7g", "1g.20gb")] == [4, 8, 2]


def test_every_name_follows_from_its_memory() -> None:
    for device in devices():
        table = layout(device)
        assert table.total_mib is not None
        for profile in table.profiles:
            memory = profile.memory_mib or table.total_mib * profile.size / table.axis
            gb = memory_in_name(memory, table.total_mib)
            assert profile.name.split("+")[0] == f"{profile.slices}g.{gb}gb", device


def test_halves_in_names_round_away_from_zero() -> None:
    assert memory_in_name(20.5 * 1024, 183359) == 23  # 22.5: round() would give 22
    assert memory_in_name(16 * 1024, 143771) == 18  # 17.625
    assert memory_in_name(69.5 * 1024, 143771) == 71  # 70.5
    assert memory_in_name(4864, 40536) == 5


def test_axis_is_not_always_eight() -> None:
    table = layout("rtx-pro-6000")
    assert (table.axis, [profile.size for profile in table.profiles]) == (12, [3, 6, 12])
    assert "starts" in table.unverified


def test_what_no_driver_confirmed_is_marked() -> None:
    assert not layout("a100-40gb").unverified
    assert not layout("h100-80gb").unverified
    for device in ("h100-96gb", "h200", "b200"):
        assert "starts" in layout(device).unverified
    assert "memory_mib" in layout("h100-pcie").unverified


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("3g.20gb", "3g.20gb"),
        ("3G.20GB", "3g.20gb"),
        ("3g", "3g.20gb"),
        (" 1g ", "1g.5gb"),  # not the one with doubled memory
        ("1g+me", "1g.5gb+me"),
        ("1g.10gb", "1g.10gb"),
        ("1c.3g", "1c.3g.20gb"),
        ("3c.3g.20gb", "3g.20gb"),  # a compute instance of full size is not named
    ],
)
def test_names_are_read_in_any_case_and_short(name: str, full: str) -> None:
    assert layout("A100 40GB").profile(name).name == full


def test_compute_part_keeps_the_gpu_instance_and_takes_fewer_slices() -> None:
    part = layout("a100").profile("2c.7g.40gb")
    assert (part.id, part.size, part.slices, part.sms, part.memory_mib) == (0, 8, 2, 28, 40192)
    with pytest.raises(GeometryError, match=r"in 3g.20gb can be 1c, 2c, 3c"):
        layout("a100").profile("4c.3g.20gb")


def test_unknown_profile_lists_what_exists_and_the_nearest() -> None:
    with pytest.raises(GeometryError, match=r"did you mean 3g.20gb\? It has 1g.5gb, .*7g.40gb") as error:
        layout("a100-40gb").profile("3g.40gb")
    assert error.value.exit_code == 4


def test_unknown_model_lists_the_models() -> None:
    with pytest.raises(DeviceError, match=r"no table for 'v100': there are A100-40GB"):
        layout("v100")


def test_recorded_preferences_are_found_by_id_and_starts() -> None:
    assert recorded(19, (0, 1, 2, 3, 4, 5, 6)) == (6, 4, 5, 0, 1, 2, 3)
    assert recorded(14, (0, 2, 4)) == (4, 0, 2)
    assert recorded(9, (0, 4)) == (4, 0)
    assert recorded(14, (0, 1, 2, 3)) == ()  # the id of A30's smallest profile means another size


@pytest.mark.parametrize("name", ["profiles", "geometry", "plans", "backends.cpu"])
def test_examples_in_the_documentation(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"migperf.{name}"))
    assert outcome.attempted
    assert not outcome.failed


def test_planning_loads_neither_numpy_nor_torch_nor_nvml() -> None:
    modules = "profiles, geometry, plans, journal, exports, errors, backends.opening, backends.mig"
    modules += ", backends.simulated, backends.cpu, backends.gpu, backends.nvml"
    imports = "\n".join(f"import migperf.{module.strip()}" for module in modules.split(","))
    code = f"{imports}\nimport sys; print(sorted({{'numpy', 'torch', 'pynvml', 'yaml'}} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
