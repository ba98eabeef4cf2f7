"""Pressure stall information: how long some process of the machine waited for a CPU."""

from collections.abc import Mapping
from pathlib import Path


class PressureSampler:
    """Reads /proc/pressure/cpu; a kernel without it gives nothing.

    Args:
        file: The kernel's page.
    """

    name = "psi"

    def __init__(self, file: Path = Path("/proc/pressure/cpu")) -> None:
        self.file = file

    def sample(self) -> Mapping[str, float]:
        """Return `cpu_some_seconds_total`: time in which at least one process waited for a CPU."""
        try:
            text = self.file.read_text()
        except OSError:
            return {}
        for line in text.splitlines():
            kind, *fields = line.split()
            if kind == "some":
                values = dict(field.split("=") for field in fields)
                return {"cpu_some_seconds_total": int(values["total"]) / 1e6}
        return {}
