"""Runs the packages' proofs one after another and writes runs/report.html; ``make prove`` calls it.

Exit code: 0 where every claim holds, 1 where one does not, 70 where a proof crashed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from tools import child, record, report, workspace
from tools.record import Outcome
from tools.workspace import Member

_COLOURS = {"holds": "green", "does not hold": "yellow", "crashed": "red"}


def prove(member: Member, runs: Path, *, quick: bool, timeout: float, console: Console) -> Outcome:
    """Runs the proof of one package with one live line of progress."""
    folder = runs / member.name
    # A proof that crashes must not be judged by what an earlier one wrote.
    (folder / record.PROOF).unlink(missing_ok=True)
    if member.command is None:
        ended = child.Ended(127, 0.0, "", "its pyproject.toml names no command in [project.scripts]")
        return record.judge(ended, folder, member.name, _now())
    command = [member.command, "prove", "--out", str(folder), *(["--quick"] if quick else [])]
    console.print(f"[bold]{member.name}[/]  {escape(' '.join(command))}", highlight=False)
    command[0] = _installed(member.command)
    with console.status("starting") as status:
        ended = child.run(
            command,
            log=folder / record.LOG,
            timeout=timeout,
            environment=_environment(console),
            tail=lambda line: _show(status, member.name, line, console.width),
        )
    outcome = record.judge(ended, folder, member.name, _now())
    if ended.output.strip():
        console.file.write(ended.output if console.is_terminal else child.plain(ended.output))
        console.file.write("\n")
    if outcome.status == "crashed":
        console.print(
            f"  {escape(report.log_tail(folder, 15))}", style="dim", highlight=False, soft_wrap=True
        )
    console.print(
        f"[bold]{member.name}[/]  [{_COLOURS[outcome.status]}]{outcome.status}[/]  {outcome.seconds:.0f} s"
        + (f"  {escape(outcome.reason)}" if outcome.reason else ""),
        highlight=False,
    )
    return outcome


def repeated(
    member: Member, runs: Path, outcome: Outcome, *, quick: bool, timeout: float, console: Console
) -> Outcome:
    """Runs a proof again, and calls it crashed where its numbers are others than the first time."""
    again = runs / "again"
    if outcome.status == "crashed":
        return outcome
    second = prove(member, again, quick=quick, timeout=timeout, console=console)
    if second.status == "crashed":
        return second
    found = record.differences(*(record.load(at / member.name / record.PROOF) for at in (runs, again)))
    for line in found:
        console.print(f"  {escape(line)}", style="red", highlight=False, soft_wrap=True)
    if not found:
        console.print(f"[bold]{member.name}[/]  the second run gave the same numbers", highlight=False)
        return outcome
    reason = f"{len(found)} numbers are others in a second run: {found[0]}"
    return replace(outcome, status="crashed", reason=reason)


def under_construction(member: Member) -> bool:
    """Whether the package has code but no proof so far: `make prove` says so and runs the others."""
    code = member.folder / "src" / member.import_name
    return code.is_dir() and not (code / "proof.py").exists()


def _installed(command: str) -> str:
    """The command of the environment that runs this, whether or not it is activated."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which(command, path=beside) or command


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _environment(console: Console) -> dict[str, str]:
    """Lets the child draw its progress and tables as if it wrote to our terminal, where we have one."""
    width = {"COLUMNS": str(max(console.width, 80))}
    return {**width, "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"} if console.is_terminal else width


def _show(status: Status, name: str, line: str, width: int) -> None:
    status.update(escape(f"{name}  {line}"[: max(width - 8, 20)]))


def merged(new: list[Outcome], earlier: list[Outcome], order: list[str]) -> list[Outcome]:
    """This run's outcomes, and those of packages that it did not run again, in the workspace's order."""
    known = {outcome.package: outcome for outcome in [*earlier, *new]}
    return [known[name] for name in order if name in known]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.prove``."""
    parser = argparse.ArgumentParser(prog="python -m tools.prove", description=__doc__)
    parser.add_argument("--package", help="only this package")
    parser.add_argument("--quick", action="store_true", help="the packages' short proofs, which show less")
    parser.add_argument(
        "--again", action="store_true", help="run each proof twice: all but measured times must be the same"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one proof may take (900)")
    parser.add_argument("--runs", type=Path, help="where results go (runs/ in the workspace)")
    parser.add_argument(
        "--root", type=Path, default=workspace.ROOT, help="another workspace than this repository"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    runs = arguments.runs or arguments.root / "runs"
    try:
        chosen = workspace.packages(arguments.root, arguments.package)
        order = [member.name for member in workspace.packages(arguments.root)]
    except workspace.WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"error: {arguments.root}/packages holds no package yet", file=sys.stderr)
        return 2
    if not arguments.package:
        for member in [one for one in chosen if under_construction(one)]:
            console.print(f"[bold]{member.name}[/]  [yellow]under construction: it has no proof yet[/]")
            chosen.remove(member)
    earlier = record.read_summary(runs)
    (runs / record.SUMMARY).unlink(missing_ok=True)
    options = {"quick": arguments.quick, "timeout": arguments.timeout, "console": console}
    outcomes = [prove(member, runs, **options) for member in chosen]
    if arguments.again:
        outcomes = [
            repeated(member, runs, outcome, **options)
            for member, outcome in zip(chosen, outcomes, strict=True)
        ]
    code = max((record.EXIT_CODES[outcome.status] for outcome in outcomes), default=0)
    everything = merged(outcomes, earlier, order)
    record.write_summary(everything, code, runs)
    page = report.write(runs, everything)
    counts = {status: sum(o.status == status for o in outcomes) for status in _COLOURS}
    console.print(
        ", ".join(f"{n} {status}" for status, n in counts.items() if n), style="bold", highlight=False
    )
    console.print(f"report: {os.path.relpath(page)}", highlight=False)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
