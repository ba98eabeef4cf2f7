"""Whereabouts: whether a worker runs where it was sent, by what it reports and by what the kernel says."""

from collections.abc import Sequence
from typing import Any

from migperf.backends.cpu import parse_cpu_list
from migperf.parts import Part


def misplaced(part: Part, ready: dict[str, Any], pid: int) -> str:
    """Return in what a worker's report differs from what its instance promised; "" where it agrees.

    Args:
        part: What was asked for.
        ready: What the worker found: threads and their CPUs, memory, SMs, the GPU that it sees.
        pid: Its process.
    """
    launch, found = part.launch, []
    if ready["pid"] != pid:
        found.append(f"process {ready['pid']} answered, {pid} was started")
    if launch.cpus is not None and (wrong := wrong_threads(ready["threads"], launch.cpus)):
        found.append(wrong)
    if launch.threads is not None and ready.get("torch_threads") not in (None, launch.threads):
        found.append(f"torch has {ready['torch_threads']} threads, expected {launch.threads}")
    if launch.torch_device.startswith("cuda"):
        visible = launch.environment.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and ready.get("visible") != visible:
            found.append(f"it sees {ready.get('visible')}, expected {visible}")
        uuid = str(ready.get("uuid") or "").removeprefix("GPU-")
        if uuid and part.instance.uuid.startswith("GPU-") and uuid not in part.instance.uuid:
            found.append(f"it runs on GPU-{uuid}, expected {part.instance.uuid}")
        memory, sms = ready.get("memory_mib"), ready.get("sms")
        if launch.expected_memory_mib and not (memory and abs(memory / launch.expected_memory_mib - 1) < 0.1):
            found.append(f"its device has {memory} MiB, expected about {launch.expected_memory_mib:.0f}")
        if launch.expected_sms and sms != launch.expected_sms:
            found.append(f"its device has {sms} SMs, expected {launch.expected_sms}")
    return f"runs in the wrong place: {'; '.join(found)}" if found else ""


def wrong_threads(threads: dict[Any, str], cpus: Sequence[int]) -> str:
    """Return which threads may run on other CPUs than these, "" if none."""
    wrong = {thread: text for thread, text in threads.items() if set(parse_cpu_list(text)) != set(cpus)}
    if not wrong:
        return ""
    thread, text = next(iter(wrong.items()))
    of = f"{len(wrong)} of {len(threads)} threads"
    return f"{of} are not pinned to CPUs {sorted(cpus)} (thread {thread}: {text})"
