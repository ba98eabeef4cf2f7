"""Compatibility: small probes of frameworks in an instance, each in a process of its own. Nothing is assumed.

A framework that is not there is "not installed", never "compatible"; one that runs, but not on the instance's
device, is "wrong device".
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migperf.backends import Backend, Instance, Launch
from migperf.processes import environment_of
from shared_core import InputError

Status = Literal["ran", "wrong device", "failed", "not installed"]

PREAMBLE = """
import json, os, sys
from migperf.worker import pin
pin(json.loads(sys.argv[1]))
WANTED = sys.argv[2]
def found(device, **more):
    print("\\n" + json.dumps({"device": device, **more}), flush=True)
"""
"""Every probe begins so, pinned before it imports anything, and ends by saying where it ran: `cpu`, `gpu`."""

PROBES: dict[str, tuple[str, str]] = {
    "torch": (
        "torch",
        """
import torch
gpu = WANTED == "gpu" and torch.cuda.is_available()
x = torch.rand(64, 64, device="cuda" if gpu else "cpu", requires_grad=True)
(x @ x).sum().backward()
assert torch.isfinite(x.grad).all()
more = {}
if gpu:
    more = {"memory_mib": torch.cuda.get_device_properties(0).total_memory / 2**20}
found(x.device.type.replace("cuda", "gpu"), version=torch.__version__, **more)
""",
    ),
    "tensorflow": (
        "tensorflow",
        """
import tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
with tf.device("/GPU:0" if gpus and WANTED == "gpu" else "/CPU:0"):
    x = tf.random.uniform((64, 64))
    y = tf.matmul(x, x)
found("gpu" if "GPU" in y.device else "cpu", version=tf.__version__)
""",
    ),
    "mxnet": (
        "mxnet",
        """
import mxnet as mx
gpu = WANTED == "gpu" and mx.context.num_gpus() > 0
x = mx.nd.ones((64, 64), ctx=mx.gpu(0) if gpu else mx.cpu())
mx.nd.dot(x, x).wait_to_read()
found("gpu" if gpu else "cpu", version=mx.__version__)
""",
    ),
    "paddle": (
        "paddle",
        """
import paddle
gpu = WANTED == "gpu" and paddle.device.is_compiled_with_cuda()
paddle.set_device("gpu:0" if gpu else "cpu")
x = paddle.ones([64, 64])
assert float((x @ x)[0, 0]) == 64
found("gpu" if "gpu" in str(x.place).lower() else "cpu", version=paddle.__version__)
""",
    ),
    "jax": (
        "jax",
        """
import jax, jax.numpy as jnp
x = jnp.ones((64, 64))
y = (x @ x).block_until_ready()
assert float(y[0, 0]) == 64
platform = jax.devices()[0].platform
found("gpu" if platform in ("gpu", "cuda") else platform, version=jax.__version__)
""",
    ),
    "onnxruntime": (
        "onnxruntime",
        """
import numpy, onnxruntime
def field(number, payload):
    data = payload if isinstance(payload, bytes) else payload.encode()
    return bytes([number << 3 | 2, len(data)]) + data
value = field(2, field(1, bytes([8, 1]) + field(2, field(1, bytes([8, 4])))))
node = field(1, "x") + field(2, "y") + field(4, "Identity")
graph = field(1, node) + field(2, "g") + field(11, field(1, "x") + value) + field(12, field(1, "y") + value)
model = bytes([8, 8]) + field(7, graph) + field(8, bytes([16, 13]))
gpu = WANTED == "gpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
provider = "CUDAExecutionProvider" if gpu else "CPUExecutionProvider"
session = onnxruntime.InferenceSession(model, providers=[provider])
assert session.run(None, {"x": numpy.ones(4, numpy.float32)})[0].sum() == 4
found("gpu" if "CUDAExecutionProvider" in session.get_providers() else "cpu", version=onnxruntime.__version__)
""",
    ),
    "ray serve": (
        "ray",
        """
import ray
from ray import serve
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
gpus = ray.cluster_resources().get("GPU", 0)
ray.shutdown()
found("gpu" if gpus and WANTED == "gpu" else "cpu", version=ray.__version__)
""",
    ),
}
"""Framework -> module that has to be installed, what is run."""

DDP = """
import os, torch, torch.distributed as dist
gpu = WANTED == "gpu" and torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo", init_method="file://" + os.environ["MIGPERF_STORE"],
                        rank=int(os.environ["MIGPERF_RANK"]), world_size=2)
layer = torch.nn.Linear(8, 1).to("cuda" if gpu else "cpu")
model = torch.nn.parallel.DistributedDataParallel(layer)
model(torch.full((4, 8), float(dist.get_rank() + 1), device="cuda" if gpu else "cpu")).sum().backward()
assert layer.weight.grad.flatten().tolist() == [6.0] * 8, layer.weight.grad
dist.barrier()
found("gpu" if gpu else "cpu", version=torch.__version__)
os._exit(0)  # gloo's threads abort an orderly end now and then; what is asked was shown by then
"""
"""The gradient is the mean of both ranks' (4 and 8 for each weight): it tells whether they really talked."""

SERVERS: dict[str, str] = {"triton server": "tritonserver", "tensorflow serving": "tensorflow_model_server"}
"""Servers that are programs: they are asked for their help, no model is served."""


@dataclass(frozen=True)
class Answer:
    """What a probe came to.

    Attributes:
        framework: Which.
        status: What it came to.
        message: Version, or what went wrong, in one line.
        device: Where it ran, `cpu` or `gpu`.
    """

    framework: str
    status: Status
    message: str = ""
    device: str = ""


def compat(
    backend: Backend,
    instances: Sequence[Instance],
    frameworks: Sequence[str] | None = None,
    *,
    timeout: float = 120.0,
    progress: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Probe frameworks in an instance.

    Args:
        backend: The device.
        instances: The first is probed; DDP takes the first two, or the first twice.
        frameworks: Which; all unless given.
        timeout: Seconds that a probe has.
        progress: Told which is probed next.

    Raises:
        InputError: There is no instance, or no such framework.
    """
    if not instances:
        raise InputError("there is no instance to probe", field="instances")
    known = [*PROBES, "torch ddp", *SERVERS]
    chosen = list(known if frameworks is None else frameworks)
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"expected some of {', '.join(known)}", field="frameworks", value=unknown[0])
    launches = [
        backend.launch(instance) for instance in (instances[0], instances[min(1, len(instances) - 1)])
    ]
    answers = []
    for name in chosen:
        if progress is not None:
            progress(name)
        if name in SERVERS:
            answers.append(_server(name, SERVERS[name], launches[0], timeout))
        elif name == "torch ddp":
            answers.append(_ddp(launches, timeout))
        else:
            module, code = PROBES[name]
            answers.append(_probe(name, module, code, launches[0], timeout))
    return answers


def _wanted(launch: Launch) -> str:
    return "gpu" if launch.torch_device.startswith("cuda") else "cpu"


def _start(code: str, launch: Launch, **variables: str) -> subprocess.Popen[str]:
    cpus = None if launch.cpus is None else list(launch.cpus)
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, json.dumps(cpus), _wanted(launch)],
        env={**environment_of(launch), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _probe(name: str, module: str, code: str, launch: Launch, timeout: float) -> Answer:
    if importlib.util.find_spec(module) is None:
        return Answer(name, "not installed", f"there is no module {module}")
    return _judge(name, _finish(_start(code, launch), timeout), launch)


def _ddp(launches: Sequence[Launch], timeout: float) -> Answer:
    name = "torch ddp"
    if importlib.util.find_spec("torch") is None:
        return Answer(name, "not installed", "there is no module torch")
    with tempfile.TemporaryDirectory(prefix="migperf-ddp-") as folder:
        store = str(Path(folder, "store"))
        ranks = [
            _start(DDP, launch, MIGPERF_STORE=store, MIGPERF_RANK=str(rank))
            for rank, launch in enumerate(launches)
        ]
        ended = [_finish(process, timeout) for process in ranks]
    judged = [_judge(name, end, launch) for end, launch in zip(ended, launches, strict=True)]
    return next((answer for answer in judged if answer.status != "ran"), judged[0])


def _finish(process: subprocess.Popen[str], timeout: float) -> tuple[int | None, str, str]:
    """Return exit code (None: it ran out of time), output and errors."""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # a session of its own: its children too
        out, errors = process.communicate()
        return None, out, errors
    return process.returncode, out, errors


def _judge(name: str, ended: tuple[int | None, str, str], launch: Launch) -> Answer:
    code, out, errors = ended
    if code is None:
        return Answer(name, "failed", "gave no answer in time")
    if code:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return Answer(name, "failed", f"{how}: {lines[-1][:300]}" if lines else how)
    try:
        said = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return Answer(name, "failed", "ended without saying where it ran")
    device, version = str(said["device"]), str(said.get("version", ""))
    if device != _wanted(launch):
        return Answer(name, "wrong device", f"{version}: ran on {device}, expected {_wanted(launch)}", device)
    memory, expected = said.get("memory_mib"), launch.expected_memory_mib
    if memory and expected and abs(memory / expected - 1) > 0.1:
        text = f"{version}: its device has {memory:.0f} MiB, expected {expected:.0f}"
        return Answer(name, "wrong device", text, device)
    return Answer(name, "ran", version, device)


def _server(name: str, program: str, launch: Launch, timeout: float) -> Answer:
    path = shutil.which(program)
    if path is None:
        return Answer(name, "not installed", f"{program} is not on PATH")
    try:
        ended = subprocess.run(
            [path, "--help"],
            env=environment_of(launch),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(name, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300])
    said = (ended.stdout + ended.stderr).strip().splitlines()
    if ended.returncode < 0 or not said:
        return Answer(name, "failed", f"{program} --help ended with {ended.returncode} and said nothing")
    return Answer(
        name, "failed" if ended.returncode > 1 else "ran", f"--help only, no model served: {said[0][:200]}"
    )
