import os
import subprocess
import sys
from pathlib import Path

import pytest

from migperf import plans
from migperf.backends import Backend
from migperf.backends.cpu import THREAD_VARIABLES, CpuBackend, parse_cpu_list, read_cores
from migperf.errors import DeviceError, GeometryError
from migperf.geometry import Geometry, enumerate_geometries


def machine(folder: Path, cores: dict[int, tuple[int, int, int]]) -> Path:
    """Write a /sys of CPUs: number -> NUMA node, socket, core."""
    nodes: dict[int, list[int]] = {}
    for cpu, (node, package, core) in cores.items():
        topology = folder / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
        nodes.setdefault(node, []).append(cpu)
    for node, cpus in nodes.items():
        (folder / f"node/node{node}").mkdir(parents=True)
        (folder / f"node/node{node}/cpulist").write_text(",".join(map(str, cpus)) + "\n")
    return folder


def two_sockets(folder: Path) -> Path:
    """Two sockets of two cores with two threads each, numbered as Linux does: siblings are 4 apart."""
    return machine(folder, {cpu: (cpu % 4 // 2, cpu % 4 // 2, cpu % 2) for cpu in range(8)})


def test_lists_of_the_kernel() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpu_list("\n") == ()


def test_hardware_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    cores = read_cores(set(range(8)), two_sockets(tmp_path))
    assert [(core.node, core.cpus) for core in cores] == [(0, (0, 4)), (0, (1, 5)), (1, (2, 6)), (1, (3, 7))]
    cpu = CpuBackend(set(range(8)), tmp_path)
    assert [profile.name for profile in cpu.profiles()] == ["1c", "2c", "3c", "4c"]
    made = plans.apply(cpu, plans.plan(cpu, Geometry.parse("2c,1c,1c", cpu)))
    sets = [set(cpu.launch(instance).cpus or ()) for instance in made]
    assert sorted(map(len, sets)) == [2, 2, 4]
    assert set.union(*sets) == set(range(8))
    for one in sets:
        assert {number + 4 if number < 4 else number - 4 for number in one} == one


def test_only_allowed_cpus_are_used(tmp_path: Path) -> None:
    cpu = CpuBackend({1, 5, 2}, two_sockets(tmp_path))
    made = plans.apply(cpu, plans.plan(cpu, Geometry.parse("1c,1c", cpu)))
    assert [cpu.launch(instance).cpus for instance in made] == [(1, 5), (2,)]
    assert "CPU (2 cores, 3 threads)" in cpu.layout.device


def test_partitions_stay_within_a_numa_node_where_they_can(tmp_path: Path) -> None:
    six = machine(tmp_path, {cpu: (cpu // 3, cpu // 3, cpu % 3) for cpu in range(6)})
    cpu = CpuBackend(set(range(6)), six)
    assert cpu.create(cpu.layout.profile("2c")).start == 0
    # From core 2 on it would reach into the other node.
    assert cpu.create(cpu.layout.profile("2c")).start == 3
    assert cpu.create(cpu.layout.profile("1c")).start == 2
    assert "memory of other NUMA nodes" in cpu.not_isolated


def test_one_core_with_two_threads_is_cut_and_said(tmp_path: Path) -> None:
    cpu = CpuBackend({0, 1}, machine(tmp_path, {0: (0, 0, 0), 1: (0, 0, 0)}))
    made = plans.apply(cpu, plans.plan(cpu, Geometry.parse("1c,1c", cpu)))
    assert [cpu.launch(instance).cpus for instance in made] == [(0,), (1,)]
    assert any("one physical core" in line for line in cpu.not_isolated)


def test_a_kernel_that_describes_no_topology_means_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert [core.cpus for core in read_cores({3, 5}, tmp_path)] == [(3,), (5,)]


def test_more_partitions_than_allowed_cpus(tmp_path: Path) -> None:
    cpu = CpuBackend({0, 1}, machine(tmp_path, {0: (0, 0, 0), 1: (0, 0, 1)}))
    with pytest.raises(GeometryError, match=r"3 of 1c wanted, at most 2 can exist"):
        Geometry.parse("1c,1c,1c", cpu).require()
    with pytest.raises(GeometryError, match=r"has no profile '4c': did you mean .* It has 1c, 2c"):
        Geometry.parse("4c", cpu)
    plans.apply(cpu, plans.plan(cpu, Geometry.parse("1c,1c", cpu)))
    with pytest.raises(
        GeometryError, match="no room for 1c: 0 of the 2 cores that this process may use are free"
    ):
        cpu.create(cpu.layout.profile("1c"))


def test_geometries_of_four_cores(tmp_path: Path) -> None:
    cpu = CpuBackend(set(range(4)), machine(tmp_path, {n: (0, 0, n) for n in range(4)}))
    # Compositions of the axis where a gap is one empty core: every second Fibonacci number.
    assert len(enumerate_geometries(cpu)) == 34
    assert len(enumerate_geometries(cpu, maximal=True)) == 8
    maximal = enumerate_geometries(cpu, maximal=True, multisets=True)
    assert {tuple(s.profile.slices for s in g.slots) for g in maximal} == {
        (4,),
        (3, 1),
        (2, 2),
        (2, 1, 1),
        (1, 1, 1, 1),
    }


def test_large_machines_are_planned_at_once(tmp_path: Path) -> None:
    cpu = CpuBackend(set(range(64)), machine(tmp_path, {n: (n // 32, n // 32, n % 32) for n in range(64)}))
    made = plans.apply(cpu, plans.plan(cpu, Geometry.parse("16c,8c*4,1c*16", cpu)))
    sets = [set(cpu.launch(instance).cpus or ()) for instance in made]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 64
    assert all(len({number // 32 for number in one}) == 1 for one in sets)


def test_worker_is_pinned_and_has_as_many_threads_as_cores(tmp_path: Path) -> None:
    cpu = CpuBackend(set(range(8)), two_sockets(tmp_path))
    launch = cpu.launch(cpu.create(cpu.layout.profile("2c"), 2))
    assert launch.cpus == (2, 3, 6, 7)
    assert launch.threads == 2
    assert launch.torch_device == "cpu"
    assert {launch.environment[name] for name in THREAD_VARIABLES} == {"2"}
    assert launch.expected_memory_mib is None


def test_what_is_not_isolated_is_said() -> None:
    text = ", ".join(CpuBackend().not_isolated)
    for shared in ("last-level cache", "memory bandwidth", "turbo"):
        assert shared in text


def test_instances_come_and_go() -> None:
    cpu = CpuBackend()
    assert isinstance(cpu, Backend)
    whole = cpu.create(cpu.profiles()[-1])
    assert cpu.instances() == (whole,)
    assert whole.uuid == f"cpu:{','.join(map(str, sorted(os.sched_getaffinity(0))))}"
    cpu.destroy(whole)
    assert cpu.instances() == ()
    with pytest.raises(DeviceError, match="there is no"):
        cpu.destroy(whole)
    with pytest.raises(DeviceError, match="no mode"):
        cpu.enable(True)


def test_affinity_decides_not_the_number_of_cpus() -> None:
    code = "\n".join(
        [
            "import os",
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
            "from migperf.backends.opening import open",
            "cpu = open('cpu')",
            "print([p.name for p in cpu.profiles()], cpu.launch(cpu.create(cpu.profiles()[0])).cpus)",
        ]
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == f"['1c'] ({min(os.sched_getaffinity(0))},)\n"


def test_facts_name_the_processor() -> None:
    facts = CpuBackend().facts()
    assert facts["cpus"] == len(os.sched_getaffinity(0))
    assert facts["simulated"] is False
    assert facts["device"]
    assert facts["governor"]
