"""Prints what is installed here as constraints.txt: ``python -m tools.constraints >constraints.txt``.

Exact pins of everything but the members. Left out are local version suffixes (``+cpu``), so that any build of
torch satisfies a pin, and the libraries of CUDA, which torch's own metadata pins where its build needs them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions

from tools import workspace

_HEADER = """\
# Versions known to work together, for make setup, make dist and ci/test-package.sh.
# Made by: python -m tools.constraints >constraints.txt
"""
_LEFT_OUT = re.compile(r"(nvidia|cuda|triton|pytorch-triton)(-|$)|pip$|setuptools$|wheel$")


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(installed: Iterable[tuple[str, str]], members: Iterable[str]) -> list[str]:
    """One ``name==version`` a line, sorted, of the installed that are neither members nor left out."""
    own = {normalized(name) for name in members}
    versions = {normalized(name): version.partition("+")[0] for name, version in installed}
    return [f"{n}=={v}" for n, v in sorted(versions.items()) if n not in own and not _LEFT_OUT.match(n)]


def main() -> int:
    """Entry point of ``python -m tools.constraints``."""
    installed = [(found.metadata["Name"], found.version) for found in distributions()]
    own = [member.distribution for member in workspace.discover()]
    sys.stdout.write(_HEADER + "".join(f"{pin}\n" for pin in pins(installed, own)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
