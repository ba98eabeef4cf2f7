"""Each framework's answer is what its probe did in the instance, and absence is never compatibility."""

import os

import pytest

from migperf import compatibility as module
from migperf.backends import Instance, Launch
from migperf.backends.cpu import CpuBackend
from migperf.compatibility import Answer, compat
from shared_core import InputError


class Device:
    """A device whose way in the test decides."""

    def __init__(self, launch):
        self.way = launch
        backend = CpuBackend()
        self.kind, self.spec, self.simulated = "cpu", "cpu", False
        self.identity, self.durable, self.not_isolated = "test", False, ()
        self.layout = backend.layout
        names = "profiles placements create destroy instances processes enabled enable samplers facts"
        for name in names.split():
            setattr(self, name, getattr(backend, name))
        self.instance = backend.create(backend.profiles()[0])

    def launch(self, instance: Instance) -> Launch:
        return self.way


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a made-up framework where probes find it, whatever is installed."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


def asked(launch, *frameworks, **options) -> list[Answer]:
    device = Device(launch)
    return compat(device, [device.instance], frameworks, **options)


CPU = Launch(cpus=(min(os.sched_getaffinity(0)),), threads=1)
GPU = Launch({"CUDA_VISIBLE_DEVICES": "MIG-1"}, torch_device="cuda:0")

JAX = """
import os
__version__ = "9.9"
class Devices:
    platform = {platform!r}
def devices(): return [Devices()]
class Array:
    def __matmul__(self, other): return self
    def block_until_ready(self): return self
    def __getitem__(self, key): return 64.0
    def __init__(self, *shape): pass
import sys, types
sys.modules["jax.numpy"] = numpy = types.ModuleType("jax.numpy")
numpy.ones = Array
__path__ = []
"""


def test_a_framework_that_is_absent_is_not_installed():
    names = ["mxnet", "paddle", "triton server", "tensorflow serving"]
    for answer in asked(CPU, *names):
        assert answer.status == "not installed"
        assert "no module" in answer.message or "not on PATH" in answer.message


def test_one_that_runs_beside_the_instance_is_on_the_wrong_device(fake):
    fake("jax", JAX.format(platform="cpu"))
    assert asked(CPU, "jax") == [Answer("jax", "ran", "9.9", "cpu")]
    (answer,) = asked(GPU, "jax")
    assert (answer.status, answer.message) == ("wrong device", "9.9: ran on cpu, expected gpu")


def test_one_that_runs_on_the_instance_ran(fake):
    fake("jax", JAX.format(platform="cuda"))
    assert asked(GPU, "jax") == [Answer("jax", "ran", "9.9", "gpu")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "raise RuntimeError('no kernel image for this device')",
            "exit code 1: RuntimeError: no kernel image",
        ),
        ("import os; os.abort()", "killed by signal 6"),
        ("import os; os._exit(0)", "ended without saying where it ran"),
    ],
)
def test_one_that_fails_gives_its_message(fake, text, message):
    fake("mxnet", text)
    (answer,) = asked(CPU, "mxnet")
    assert answer.status == "failed"
    assert message in answer.message


def test_one_that_hangs_is_ended(fake):
    fake("mxnet", "import time; time.sleep(60)")
    (answer,) = asked(CPU, "mxnet", timeout=0.3)
    assert (answer.status, answer.message) == ("failed", "gave no answer in time")


def test_the_environment_of_the_instance_is_there_before_the_import(fake):
    fake("mxnet", "import os\nraise RuntimeError(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert "MIG-1" in asked(GPU, "mxnet")[0].message
    fake("mxnet", "import os\nraise RuntimeError(str(sorted(os.sched_getaffinity(0))))")
    assert str([min(os.sched_getaffinity(0))]) in asked(CPU, "mxnet")[0].message


def test_two_ddp_processes_on_cpu_partitions_really_average_their_gradients():
    backend = CpuBackend()
    for _ in range(min(2, len(backend.cores))):
        backend.create(backend.profiles()[0])
    (answer,) = compat(backend, backend.instances(), ["torch ddp"])
    assert (answer.status, answer.device) == ("ran", "cpu"), answer


def test_the_probe_of_torch_says_where_it_computed():
    said = []
    exec(module.PROBES["torch"][1], {"WANTED": "cpu", "found": lambda device, **more: said.append(device)})
    assert said == ["cpu"]


def test_torch_that_sees_another_devices_memory_is_on_the_wrong_device():
    launch = Launch(torch_device="cuda:0", expected_memory_mib=4864.0)
    said = '{"device": "gpu", "version": "2", "memory_mib": 40192}'
    assert module._judge("torch", (0, said, ""), launch).status == "wrong device"
    assert module._judge("torch", (0, said.replace("40192", "4800"), ""), launch).status == "ran"


def test_a_server_that_is_there_is_asked_for_its_help_only(tmp_path, monkeypatch):
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\necho Usage of Triton\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (answer,) = asked(CPU, "triton server")
    assert (answer.status, answer.message) == ("ran", "--help only, no model served: Usage of Triton")


def test_unknown_frameworks_and_no_instance_are_refused():
    with pytest.raises(InputError, match="expected some of torch, tensorflow"):
        asked(CPU, "caffe")
    with pytest.raises(InputError, match="no instance"):
        compat(Device(CPU), [])
