"""Runs every static check to its end, then says which failed; ``make lint`` calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools import workspace
from tools.workspace import Member


def deptry(member: Member) -> list[str]:
    """The check that a member declares what its source imports, and nothing else.

    Only src is checked, and it may import nothing that only the extra ``test`` brings. The extra ``all``
    refers to the others. A member maps distributions to import names, and excuses those that it needs without
    an import, in its own [tool.deptry].
    """
    command = [sys.executable, "-m", "deptry", "src", "--known-first-party", member.import_name]
    other = [extra for extra in ("test", "all") if extra in member.extras]
    return [*command, "--optional-dependencies-dev-groups", ",".join(other)] if other else command


def checks(root: Path = workspace.ROOT) -> list[tuple[str, list[str], Path]]:
    """Name, command and working folder of each check."""
    python = sys.executable
    return [
        ("ruff format", [python, "-m", "ruff", "format", "--check", "."], root),
        ("ruff check", [python, "-m", "ruff", "check", "."], root),
        ("basedpyright", [python, "-m", "basedpyright", "--pythonpath", python], root),
        *((f"deptry {member.name}", deptry(member), member.folder) for member in workspace.discover(root)),
    ]


def main() -> int:
    """Entry point of ``python -m tools.lint``."""
    failed = []
    for name, command, folder in checks():
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=folder, check=False).returncode != 0:
            failed.append(name)
    print(f"lint: failed: {', '.join(failed)}" if failed else "lint: all clean", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
