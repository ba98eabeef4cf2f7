"""The partition beside its rivals, the honest ones included; measures of fairness and interference."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from migperf.backends import Instance, Launch
from migperf.backends.cpu import CpuBackend
from migperf.backends.opening import open as open_device
from migperf.errors import DeviceError
from migperf.profiles import Layout, Profile
from migperf.sharing import Arrangement, arrangements, gain, interference, jain, scaling_efficiency, share
from migperf.workloads import parse, sleep
from shared_core import InputError


def test_on_a_cpu_the_partition_meets_both_unpinned_rivals():
    backend = CpuBackend()
    if len(backend.cores) < 2:
        pytest.skip("needs two cores")
    ways = {way.name: way for way in arrangements(backend, 2)}
    assert list(ways) == ["whole", "partition", "unpinned", "unpinned-matched"]
    assert [way.workers for way in ways.values()] == [1, 2, 2, 2]
    with ways["whole"].enter() as (instances, _):
        assert instances[0].profile.slices == len(backend.cores)
    with ways["partition"].enter() as (instances, _):
        assert {len(instance.handle["cpus"]) for instance in instances} != {0}
        assert not set(instances[0].handle["cpus"]) & set(instances[1].handle["cpus"])


@dataclass
class Gpu:
    """A GPU whose MPS is not installed."""

    kind: str = "gpu"
    spec: str = "cuda:0"
    simulated: bool = False

    @contextmanager
    def share(self, mode, processes, thread_percentage=None):
        if mode == "mps":
            raise DeviceError("nvidia-cuda-mps-control is not on PATH")
        whole = Profile("whole", 0, 1, 1, (0,), 1)
        seen = [Instance(whole, 0, "GPU-1")] * processes

        @dataclass
        class Sharing:
            instances: tuple = tuple(seen)
            mode: str = "timeslice"

        yield Sharing()

    def launch(self, instance):
        return Launch(threads=1)

    def samplers(self, instance=None):
        return ()

    def facts(self):
        return {}

    layout = Layout("GPU", 1, 1, (Profile("whole", 0, 1, 1, (0,), 1),))


def test_an_arrangement_that_the_device_does_not_have_is_named_and_the_others_measured():
    ways = _gpu_ways()
    backend = CpuBackend()
    instance = backend.create(backend.profiles()[0])

    @contextmanager
    def works():
        yield [instance], None

    @contextmanager
    def refused():
        raise DeviceError("nvidia-cuda-mps-control is not on PATH")
        yield

    chosen = [Arrangement("whole", "whole", 1, works), Arrangement("mps", "mps", 2, refused)]
    results = share(backend, sleep("5ms"), 2, duration=0.1, repeats=2, ways=chosen)
    assert results["mps"].records == []
    assert "not on PATH" in results["mps"].problem
    assert len(results["whole"].records) == 2
    assert [way.name for way in ways] == ["whole", "timeslice", "mps", "mps-capped"]


def _gpu_ways():
    from migperf.sharing import _on_gpu

    ways = _on_gpu(Gpu(), 4)
    with ways[1].enter() as (instances, seen):
        assert len(instances) == 4
        assert seen() == "timeslice"
    with pytest.raises(DeviceError), ways[3].enter():
        pass
    return ways


def test_mps_that_has_no_server_is_recorded_as_time_slices():
    backend = CpuBackend()
    instance = backend.create(backend.profiles()[0])

    @contextmanager
    def silent():
        yield [instance], lambda: "timeslice"

    results = share(
        backend, sleep("5ms"), 2, duration=0.1, repeats=1, ways=[Arrangement("mps", "mps", 1, silent)]
    )
    assert [record.mode for record in results["mps"].records] == ["timeslice"]


def test_a_simulated_mig_device_compares_the_whole_with_equal_parts():
    backend = open_device("sim:a100-40gb", allow_mode_change=True)
    if not backend.enabled():
        backend.enable(True)
    results = share(backend, parse("transformers/bert"), 7, duration=3, repeats=1)
    rates = {name: result.summary()["items_per_second"] for name, result in results.items()}
    assert rates["partition"] / rates["whole"] == pytest.approx(7, rel=0.01)
    assert results["partition"].summary()["simulated"]
    with pytest.raises(DeviceError, match="cannot be cut into 8 equal parts"):
        arrangements(backend, 8)


def test_measures_of_sharing():
    assert jain([3, 1]) == pytest.approx(0.8)
    assert gain([30, 30], 40) == 1.5
    assert scaling_efficiency(300, 3, 100) == 1
    alone = {"latency_ms": {"p99": 10.0}, "items_per_second": 100.0}
    together = {"latency_ms": {"p99": 25.0}, "items_per_second": 80.0}
    assert interference(alone, together) == {"p99_ratio": 2.5, "throughput_loss": pytest.approx(0.2)}
    assert interference({"latency_ms": {}, "items_per_second": None}, together) == {}


@pytest.mark.parametrize(
    "make",
    [lambda: jain([]), lambda: jain([0, 0]), lambda: gain([1], 0), lambda: arrangements(CpuBackend(), 1)],
)
def test_measures_of_nothing_are_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()
