"""Installs packages by name from dist/ in fresh environments and checks what a user then has; see dist.sh."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import workspace
from tools.constraints import normalized
from tools.workspace import Member

DIST = workspace.ROOT / "dist"
# Run by the fresh environment's own Python, away from the repository.
_LOOK = """
import importlib, importlib.metadata, pathlib, sys
module = importlib.import_module(sys.argv[1])
file = pathlib.Path(module.__file__)
assert file.is_relative_to(sys.prefix), f"{file} does not come from the wheel"
assert file.with_name("py.typed").is_file(), "py.typed is missing"
print("\\n".join(found.metadata["Name"] for found in importlib.metadata.distributions()))
"""


class DistError(Exception):
    """What is wrong with a wheel, in one line."""


def install(member: Member, environment: Path, wheels: Path) -> None:
    """Makes a fresh environment and installs the member by name, under the constraints of the repository."""
    python = environment / "bin" / "python"
    asked = ["--find-links", str(wheels), "-c", str(workspace.ROOT / "constraints.txt"), member.distribution]
    if os.environ.get("UV", "1") == "0":
        _run([sys.executable, "-m", "venv", str(environment)])
        _run([str(python), "-m", "pip", "install", "--quiet", *asked])
    else:
        _run([sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(environment)])
        _run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), *asked])


def look(member: Member, environment: Path, own: set[str]) -> None:
    """Checks import, py.typed, command and that nothing else of this repository came along."""
    python = environment / "bin" / "python"
    names = _run([str(python), "-I", "-c", _LOOK, member.import_name], cwd=environment).split()
    ours = {normalized(name) for name in names} & own
    expected = {normalized(member.distribution), "shared-core"} & own
    if ours != expected:
        raise DistError(
            f"{member.distribution} installed {sorted(ours)} of ours, expected {sorted(expected)}"
        )
    if member.command is not None:
        _run([str(environment / "bin" / member.command), "--help"], cwd=environment)


def check(member: Member, wheels: Path = DIST, root: Path = workspace.ROOT) -> None:
    """One package from wheels to a working command."""
    own = {normalized(other.distribution) for other in workspace.discover(root)}
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch) / "fresh"
        install(member, environment, wheels)
        look(member, environment, own)


def _run(command: list[str], cwd: Path | None = None) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DistError(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip()
        )
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.dist``."""
    parser = argparse.ArgumentParser(prog="python -m tools.dist", description=__doc__)
    parser.add_argument("package", help="a package, first or all")
    arguments = parser.parse_args(argv)
    try:
        several = arguments.package in ("first", "all")
        chosen = workspace.packages(only=None if several else arguments.package)
        for member in chosen[:1] if arguments.package == "first" else chosen:
            check(member)
            print(
                f"dist: {member.distribution} installs by name in a fresh environment and works", flush=True
            )
    except (workspace.WorkspaceError, DistError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
