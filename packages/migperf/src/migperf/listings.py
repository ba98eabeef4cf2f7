"""Listings: devices, profiles, placements and probes as tables for a terminal."""

import importlib.util
from collections.abc import Sequence

from rich.table import Table

from migperf.backends import Backend
from migperf.compatibility import Answer
from migperf.errors import DeviceError
from migperf.profiles import Layout
from migperf.profiles import devices as models


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def devices() -> Table:
    """Return what can be opened here, what cannot and why, and the models that can be simulated."""
    from migperf.backends.cpu import CpuBackend

    table = _table("device", "what it is", "state")
    for spec, what, state in _gpus():
        table.add_row(spec, what, state)
    cpu = CpuBackend()
    table.add_row("cpu", cpu.layout.device, f"partitions share: {', '.join(cpu.not_isolated)}")
    for model in models():
        table.add_row(f"sim:{model.lower()}", model, "simulated: a table, no hardware")
    return table


def _gpus() -> list[tuple[str, str, str]]:
    from migperf.backends.nvml import bindings

    if importlib.util.find_spec("pynvml") is None:
        return [("nvml, cuda", "NVIDIA GPUs", "unknown: pip install 'migperf[nvidia]'")]
    try:
        api = bindings()
    except DeviceError as error:
        return [("nvml, cuda", "NVIDIA GPUs", str(error))]
    count = api.nvmlDeviceGetCount()
    return [_gpu(api, index) for index in range(count)]


def _gpu(api: object, index: int) -> tuple[str, str, str]:
    from migperf.backends.gpu import GpuBackend
    from migperf.backends.mig import MigBackend
    from migperf.plans import current

    try:
        backend = MigBackend(api, index, spec=f"nvml:{index}", kind="nvml")
    except DeviceError:
        try:
            plain = GpuBackend(api, index, spec=f"cuda:{index}")
        except DeviceError as error:
            return f"cuda:{index}", "?", str(error)
        return f"cuda:{index}", plain.layout.device, "no MIG"
    spec = f"nvml:{index}" if backend.enabled() else f"nvml:{index}, cuda:{index}"
    state = f"MIG on: {current(backend)}" if backend.enabled() else "MIG off"
    return spec, backend.layout.device, state


def profiles(layout: Layout) -> Table:
    """Return the sizes that a device can be cut into."""
    table = _table("profile", "id", "slices", "memory slices", "MiB", "SMs", "at most", "starts")
    for profile in layout.profiles:
        memory = "" if profile.memory_mib is None else f"{profile.memory_mib:.0f}"
        table.add_row(
            profile.name, str(profile.id), str(profile.slices), str(profile.size), memory,
            str(profile.sms or ""), str(profile.maximum), _starts(profile.starts),
        )  # fmt: skip
    table.caption = f"{layout.device}: {layout.axis} memory slices, {layout.slices} compute slices"
    if layout.unverified:
        table.caption += f"; no driver's output has confirmed: {', '.join(layout.unverified)}"
    return table


def placements(backend: Backend, name: str | None = None) -> Table:
    """Return where profiles may begin at all, and where there is room now."""
    chosen = backend.profiles() if name is None else [backend.layout.profile(name)]
    table = _table("profile", "length", "may begin at", "room now at")
    for profile in chosen:
        free = backend.placements(profile) if backend.enabled() else ()
        now = _starts(free) if backend.enabled() else "MIG mode is off"
        table.add_row(profile.name, str(profile.size), _starts(profile.starts), now or "nowhere")
    return table


def _starts(starts: Sequence[int]) -> str:
    return ", ".join(map(str, starts))


def answers(found: Sequence[Answer]) -> Table:
    """Return what probes came to."""
    table = _table("framework", "status", "message")
    for answer in found:
        table.add_row(answer.framework, answer.status, answer.message)
    return table
