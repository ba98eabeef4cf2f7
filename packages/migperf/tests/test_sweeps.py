"""Sweeps interleave, go on where they stopped, and keep what was finished."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import pytest

from migperf import measuring
from migperf.backends.cpu import CpuBackend
from migperf.backends.opening import open as open_device
from migperf.errors import GeometryError
from migperf.loads import CLOSED, Closed, Poisson
from migperf.records import read
from migperf.sweeps import Cell, cells, interleaved, sweep
from migperf.workloads import parse, sleep
from shared_core import InputError


@pytest.fixture
def sim():
    backend = open_device("sim:a100-40gb", allow_mode_change=True)
    if not backend.enabled():
        backend.enable(True)
    return backend


def test_every_repeat_has_all_cells_in_an_order_of_its_own_named_by_the_seed():
    order = interleaved(6, 4, seed=1)
    rounds = [[index for index, repeat in order if repeat == r] for r in range(4)]
    assert [repeat for _, repeat in order] == sorted(repeat for _, repeat in order)
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert order == interleaved(6, 4, seed=1) != interleaved(6, 4, seed=2)


def test_names_differ_for_all_that_differs():
    bert = parse("transformers/bert", batch=8)
    different = [
        Cell("1g", (bert,)),
        Cell("2g", (bert,)),
        Cell("1g", (parse("transformers/bert", batch=8, sequence_length=32),)),
        Cell("1g", (bert,), (Closed(4),)),
        Cell("1g", (bert,), (Poisson(5, seed=1),)),
        Cell("1g", (bert,), (Poisson(5, seed=2),)),
        Cell("1g", (bert,), mode="unpinned"),
    ]
    assert len({cell.name(10) for cell in different}) == len(different)
    assert different[0].name(10) != different[0].name(20)


def test_a_simulated_sweep_covers_every_geometry_workload_and_repeat(sim, tmp_path):
    wanted = cells(["7g.40gb", "1g.5gb*7"], [parse("transformers/bert", batch=b) for b in (1, 256)])
    seen = []
    records = sweep(sim, wanted, tmp_path, duration=5, repeats=2, progress=lambda *step: seen.append(step))
    assert len(records) == 2 * 2 * (1 + 7)
    assert all(record.simulated for record in records)
    assert (tmp_path / "records.simulated.jsonl").exists()
    assert not (tmp_path / "records.jsonl").exists()
    assert seen[0][:2] == (0, 8)
    assert seen[-1][:2] == (8, 8)
    assert sim.instances() == () or not list(sim.instances())

    def rate(geometry, batch):
        chosen = [r for r in records if r.cell.startswith(geometry) and r.workload["batch"] == batch]
        return sum(r.items_per_second for r in chosen) / 2

    # the crossing of the official figures: sevenfold for small batches, slightly less for large ones
    assert rate("1g.5gb*7", 1) / rate("7g.40gb", 1) == pytest.approx(7, rel=0.01)
    assert rate("1g.5gb*7", 256) / rate("7g.40gb", 256) == pytest.approx(0.93, abs=0.02)


def test_one_cell_out_of_memory_is_recorded_and_the_sweep_goes_on(sim, tmp_path):
    train = [parse("timm/vit_base_patch16_224", mode="train", batch=b) for b in (8, 32, 128)]
    records = sweep(sim, cells(["1g.5gb", "2g.10gb"], train), tmp_path, duration=5, repeats=1)
    status = {(r.profile, r.workload["batch"]): r.status for r in records}
    assert status == {
        ("1g.5gb", 8): "ok", ("1g.5gb", 32): "oom", ("1g.5gb", 128): "oom",
        ("2g.10gb", 8): "ok", ("2g.10gb", 32): "ok", ("2g.10gb", 128): "oom",
    }  # fmt: skip
    assert all(r.items_per_second is None for r in records if r.status == "oom")


def test_an_interrupted_sweep_keeps_finished_cells_restores_and_goes_on(sim, tmp_path, monkeypatch):
    wanted = cells(["7g.40gb", "3g.20gb*2", "1g.5gb*7"], [parse("transformers/bert")])
    real, calls = measuring.run, []

    def interrupted(*args, **options):
        calls.append(options["cell"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(measuring, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(sim, wanted, tmp_path, duration=1, repeats=2)
    assert list(sim.instances()) == []
    kept = read(tmp_path)
    assert {record.cell for record in kept} == set(calls[:2])
    records = sweep(sim, wanted, tmp_path, duration=1, repeats=2)
    assert len(calls) == 3 + 4  # two of the six were not measured again
    assert len(records) == 2 * (1 + 2 + 7)
    assert len({record.run_id for record in records}) == 1
    whole = sweep(sim, wanted, tmp_path / "whole", duration=1, repeats=2)

    def numbers(some):
        return sorted((r.cell, r.repeat, r.worker, r.items_per_second) for r in some)

    assert numbers(records) == numbers(whole)


def test_geometries_are_checked_before_anything_is_measured(sim, tmp_path):
    wanted = cells(["7g.40gb", "1g.10gb*4,1g.5gb*3"], [parse("transformers/bert")])
    with pytest.raises(GeometryError):
        sweep(sim, wanted, tmp_path, duration=1, repeats=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_device_is_refused(sim, tmp_path):
    sweep(sim, cells(["7g.40gb"], [parse("transformers/bert")]), tmp_path, duration=1, repeats=1)
    other = open_device("sim:a30-24gb", allow_mode_change=True)
    with pytest.raises(InputError, match="holds records of"):
        sweep(other, cells(["4g.24gb"], [parse("transformers/bert")]), tmp_path, duration=1, repeats=1)


def test_a_cell_twice_and_no_cell_are_refused(sim, tmp_path):
    cell = Cell("7g.40gb", (parse("transformers/bert"),))
    with pytest.raises(InputError, match="stands there twice"):
        sweep(sim, [cell, cell], tmp_path)
    with pytest.raises(InputError, match="nothing to measure"):
        sweep(sim, [], tmp_path)


def test_a_sweep_on_cpu_partitions_measures_real_processes(tmp_path):
    backend = CpuBackend()
    geometry = f"1c*{len(backend.cores)}"
    wanted = [Cell(geometry, (sleep("5ms"),)), Cell(geometry, (sleep("5ms"),), mode="unpinned")]
    records = sweep(backend, wanted, tmp_path, duration=0.2, repeats=1)
    assert {(r.mode, r.instance == "") for r in records} == {("partition", False), ("unpinned", True)}
    assert all(r.status == "ok" and not r.simulated for r in records)


def test_a_killed_sweep_leaves_its_finished_cells(tmp_path):
    code = f"""
        from migperf.backends.cpu import CpuBackend
        from migperf.sweeps import cells, sweep
        from migperf.workloads import sleep
        sweep(CpuBackend(), cells(["1c"], [sleep("2ms"), sleep("3ms"), sleep("4ms")]), {str(tmp_path)!r},
              duration=0.1, repeats=20)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    path = tmp_path / "records.jsonl"
    limit = time.monotonic() + 120  # the machine that runs the tests may be busy
    while time.monotonic() < limit and not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    records = read(tmp_path)
    assert records
    for record in records:
        assert os.path.exists(tmp_path / record.raw)


def test_the_partition_given_is_the_one_used(sim, tmp_path):
    entered = []

    @contextmanager
    def partition(backend, geometry):
        entered.append(geometry)
        profile = backend.layout.profile("1g.5gb")
        made = backend.create(profile, 0)
        try:
            yield [made]
        finally:
            backend.destroy(made)

    sweep(sim, [Cell("mine", (parse("transformers/bert"),), (CLOSED,))], tmp_path, duration=1, repeats=2,
          partition=partition)  # fmt: skip
    assert entered == ["mine", "mine"]
