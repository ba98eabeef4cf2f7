"""Writes the list of public names into each package's README: ``python -m tools.api``, or ``--check``.

A name's line is the first sentence of its docstring, so that it is written once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import workspace
from tools.record import replace_text
from tools.workspace import Member

HEADING = "## Public names"
_NAMES = """
import importlib, inspect, re, sys
package = importlib.import_module(sys.argv[1])
for name in package.__all__:
    thing = getattr(package, name)
    if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
        first = " ".join((inspect.getdoc(thing) or "").split("\\n\\n")[0].split())
        first = re.split(r"(?<=[.:]) (?=[A-Z`])", first)[0].removesuffix(":")
    elif isinstance(thing, dict):
        first = "A dict: " + ", ".join(f"`{key}`" for key in thing)
    else:
        first = f"`{thing!r}`"
    print(f"{name}\\t{first.removesuffix('.')}.")
"""


def section(member: Member) -> str:
    """The section of a package's README that lists its public names."""
    done = subprocess.run(
        [sys.executable, "-c", _NAMES, member.import_name], capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    lines = [f"- `{name}`: {text}" for name, text in rows]
    return f"{HEADING}\n\nOf `import {member.import_name}`:\n\n" + "\n".join(lines) + "\n"


def with_section(readme: str, new: str) -> str:
    """A README with its list of public names replaced; a new one goes to the end, before the citation."""
    parts = [part for part in _parts(readme) if not part.startswith(HEADING)]
    last = len(parts) - 1 if parts[-1].startswith("## Citation") else len(parts)
    parts.insert(last, new)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _parts(readme: str) -> list[str]:
    parts, fenced = [""], False
    for line in readme.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append("")
        parts[-1] += line
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.api``."""
    parser = argparse.ArgumentParser(prog="python -m tools.api", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where a list is not up to date"
    )
    parser.add_argument("packages", nargs="*", help="only these packages")
    arguments = parser.parse_args(argv)
    stale = []
    for member in workspace.packages():
        if arguments.packages and member.name not in arguments.packages:
            continue
        file: Path = member.folder / "README.md"
        text = file.read_text(encoding="utf-8")
        wanted = with_section(text, section(member))
        if wanted != text:
            stale.append(str(file.relative_to(workspace.ROOT)))
            if not arguments.check:
                replace_text(file, wanted)
    print("\n".join(stale) or "all lists are up to date")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
