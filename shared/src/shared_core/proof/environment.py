"""What a run took and what it ran on: memory and versions."""

import contextlib
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def peak_memory_bytes() -> int:
    """Greatest resident memory so far of this process or of its largest finished child (Linux and macOS)."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    own = _linux_peak_kib() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * unit


def _linux_peak_kib() -> int | None:
    """The process's own peak: Linux's ru_maxrss begins at the size of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) if peak else None


def versions(package: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """Versions of Python, the platform and distributions that matter to a result.

    Args:
        package: Distribution whose declared dependencies are looked at, beside shared-core's.
        names: Distributions instead of those; each that is installed is recorded.
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _imported_dependencies(package) if names is None else names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _imported_dependencies(package: str) -> list[str]:
    declared = {package, "shared-core"}
    for name in (package, "shared-core"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            declared |= {re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in metadata.requires(name) or []}
    imported = {
        _normal(distribution)
        for module, distributions in metadata.packages_distributions().items()
        if module in sys.modules
        for distribution in distributions
    }
    own = {_normal(package), "shared-core"}
    return sorted(name for name in {_normal(name) for name in declared} if name in imported | own)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
