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

    return max(own_peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _unit())


def own_peak_bytes() -> int:
    """Greatest resident memory of this process alone, so far or since `reset_own_peak`."""
    import resource

    # Linux's ru_maxrss begins at the size of the process that started this one.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if peak := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()


def reset_own_peak() -> None:
    """Set the peak of this process back to what is resident now; Linux alone has a way to."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _unit() -> int:
    return 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB


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
