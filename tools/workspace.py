"""The members of this workspace, found by their folders: nothing in the repository lists packages by name.

``python -m tools.workspace list`` prints all members as a CI matrix, ``affected --base REV`` those that the
changes since REV touch, and ``requirements`` what ``make setup`` installs. Standard library only: it runs
before set-up.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = "shared"
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
"""The Python versions that CI tests each package with."""

_TOUCHES_ALL = (f"{SHARED}/", "ci/", ".github/", "pyproject.toml", "constraints.txt", "embedded.txt")


class WorkspaceError(Exception):
    """The workspace or what was asked of it is wrong; the message is one line for a person."""


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace: a folder under packages/, or shared/."""

    folder: Path
    distribution: str
    import_name: str
    command: str | None
    extras: tuple[str, ...]
    dependencies: tuple[str, ...]
    """Requirements of the plain install, as pyproject.toml has them."""

    @property
    def name(self) -> str:
        """The folder's name, which is how PKG= and the CI matrix call the member."""
        return self.folder.name

    def needs(self, library: str) -> bool:
        """Whether the plain install names a library."""
        return any(re.split(r"[^\w.-]", line)[0] == library for line in self.dependencies)


def discover(root: Path = ROOT) -> list[Member]:
    """All members below ``root``: shared/ first, where it exists, then packages/* by name."""
    folders = [root / SHARED, *sorted((root / "packages").glob("*"))]
    return [_read(folder) for folder in folders if (folder / "pyproject.toml").is_file()]


def packages(root: Path = ROOT, only: str | None = None) -> list[Member]:
    """The method packages, or the one that ``only`` names by folder, distribution or command."""
    found = [member for member in discover(root) if member.name != SHARED]
    return found if not only else [_named(found, only)]


def members(root: Path = ROOT, only: str | None = None) -> list[Member]:
    """All members, or the one that ``only`` names by folder, distribution or command."""
    found = discover(root)
    return found if not only else [_named(found, only)]


def _named(found: list[Member], name: str) -> Member:
    for member in found:
        if name in (member.name, member.distribution, member.command):
            return member
    known = ", ".join(member.name for member in found) or "none yet"
    raise WorkspaceError(f"no package is named {name!r}; packages here: {known}")


def _read(folder: Path) -> Member:
    file = folder / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        distribution = project["name"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise WorkspaceError(f"{file}: not a member's pyproject.toml: {error}") from error
    modules = sorted(path.parent.name for path in folder.glob("src/*/__init__.py"))
    if len(modules) != 1:
        raise WorkspaceError(
            f"{folder}/src: expected one import package, found {', '.join(modules) or 'none'}"
        )
    return Member(
        folder=folder,
        distribution=distribution,
        import_name=modules[0],
        command=next(iter(project.get("scripts", {})), None),
        extras=tuple(project.get("optional-dependencies", {})),
        dependencies=tuple(project.get("dependencies", [])),
    )


def matrix(chosen: Iterable[Member]) -> dict[str, list[str]]:
    """The matrix of GitHub Actions: one job a package and Python version."""
    names = [member.name for member in chosen]
    return {"package": names, "python": list(PYTHON_VERSIONS) if names else []}


def touched(files: Iterable[str], root: Path = ROOT) -> list[Member]:
    """The members that a change of ``files`` (paths below the root, with /) can break."""
    files = list(files)
    found = discover(root)
    if any(file.startswith(_TOUCHES_ALL) for file in files):
        return found
    return [member for member in found if any(file.startswith(f"packages/{member.name}/") for file in files)]


def changed_files(base: str, root: Path = ROOT) -> list[str] | None:
    """Files that differ from where HEAD left ``base``, uncommitted too; None where ``base`` is unknown."""
    fork = _git(root, "merge-base", base, "HEAD")
    if fork is None:
        return None
    # Without renames a moved file counts as changed in the folder that it left and in the one it entered.
    tracked = _git(root, "diff", "--no-renames", "--name-only", "-z", fork.strip())
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if tracked is None or untracked is None:
        raise WorkspaceError(f"git cannot compare {root} with {base}")
    return [file for file in (tracked + untracked).split("\0") if file]


def affected(base: str, root: Path = ROOT) -> list[Member]:
    """The members to test for the changes since ``base``; all where git does not know it (a forced push)."""
    files = changed_files(base, root)
    return discover(root) if files is None else touched(files, root)


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def requirements(root: Path = ROOT) -> list[str]:
    """What a development environment installs, as lines of a requirements file.

    The dev group of the root, and every member editable with all its extras. A member whose extras cannot all
    be installed together declares an extra ``all`` of those that can; then that one and ``test`` are taken.
    """
    groups = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("dependency-groups", {})
    lines = list(groups.get("dev", []))
    for member in discover(root):
        extras = (
            [extra for extra in ("all", "test") if extra in member.extras]
            if "all" in member.extras
            else member.extras
        )
        lines.append(f"-e {member.folder}" + (f"[{','.join(extras)}]" if extras else ""))
    return lines


def _answer(arguments: argparse.Namespace) -> str:
    root = arguments.root
    if arguments.what == "requirements":
        return "\n".join(requirements(root))
    if arguments.what == "pythons":
        return "\n".join(PYTHON_VERSIONS)
    if arguments.what == "without":
        return "\n".join(member.name for member in packages(root) if not member.needs(arguments.library))
    if arguments.what == "folders":
        return "\n".join(str(member.folder) for member in discover(root))
    if arguments.what == "facts":
        [one] = members(root, arguments.name)
        facts = {"folder": one.folder, "distribution": one.distribution, "import_name": one.import_name}
        return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in facts.items())
    return json.dumps(
        matrix(affected(arguments.base, root) if arguments.what == "affected" else discover(root))
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.workspace``."""
    parser = argparse.ArgumentParser(prog="python -m tools.workspace", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="another workspace than this repository")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("list", help="all members as a CI matrix (JSON)")
    command = commands.add_parser(
        "affected", help="the members that the changes since a revision touch (JSON)"
    )
    command.add_argument("--base", required=True, help="the revision to compare with, e.g. origin/main")
    commands.add_parser("requirements", help="what make setup installs, as a requirements file")
    commands.add_parser("folders", help="the folders of all members, one a line")
    commands.add_parser("pythons", help="the Python versions that CI tests with, one a line")
    command = commands.add_parser(
        "without", help="the packages that can be installed without a library, one a line"
    )
    command.add_argument("library")
    command = commands.add_parser("facts", help="one member as assignments for a shell")
    command.add_argument("name")
    arguments = parser.parse_args(argv)
    try:
        print(_answer(arguments))
    except WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
