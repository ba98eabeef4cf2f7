"""Runs the packages' benchmarks and writes runs/bench.html; ``make bench`` calls it.

Each package measures itself beside what a user would pick instead, in one run of its benchmarks/bench.py,
which writes bench.json. A row's ratio says how many times better ours is: above 1 ours wins.
Exit code: 0 where all ran, 70 where one crashed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from tools import child, workspace
from tools.page import duration, page
from tools.record import replace_text
from tools.workspace import Member

RESULT = "bench.json"


@dataclass(frozen=True)
class Row:
    """One comparison; ``ratio`` is how many times better ours is, ``unit`` is of ``ours`` and ``theirs``."""

    what: str
    ours: float
    theirs: float
    peer: str
    peer_version: str
    ratio: float
    unit: str


@dataclass(frozen=True)
class Result:
    """What one package's benchmark wrote; ``error`` says why there are no rows."""

    package: str
    seconds: float
    machine: str = ""
    rows: tuple[Row, ...] = ()
    error: str = ""


def load(file: Path) -> tuple[str, tuple[Row, ...]]:
    """Machine and rows of a bench.json; a ValueError says what is wrong with it in one line."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.name} was not written") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("rows"), list) or not raw["rows"]:
        raise ValueError(f"{file.name}: expected an object with a list rows that is not empty")
    machine = raw.get("machine", "")
    if isinstance(machine, dict):
        machine = ", ".join(f"{key} {value}" for key, value in machine.items())
    return str(machine), tuple(_row(entry, f"{file.name}: rows[{i}]") for i, entry in enumerate(raw["rows"]))


def _row(entry: object, where: str) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} should be an object, found {entry!r}")
    missing = [name for name in Row.__dataclass_fields__ if name not in entry]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    for name in ("ours", "theirs", "ratio"):
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: {name} should be a number, found {value!r}")
    return Row(
        what=str(entry["what"]),
        ours=float(entry["ours"]),
        theirs=float(entry["theirs"]),
        peer=str(entry["peer"]),
        peer_version=str(entry["peer_version"]),
        ratio=float(entry["ratio"]),
        unit=str(entry["unit"]),
    )


def bench(member: Member, runs: Path, *, timeout: float, console: Console) -> Result:
    """Runs the benchmark of one package."""
    folder = runs / member.name
    (folder / RESULT).unlink(missing_ok=True)
    script = member.folder / "benchmarks" / "bench.py"
    command = [sys.executable, str(script), "--out", str(folder)]
    with console.status(member.name) as status:
        ended = child.run(
            command,
            log=folder / "bench.log",
            timeout=timeout,
            tail=lambda line: status.update(
                escape_markup(f"{member.name}  {line}"[: max(console.width - 8, 20)])
            ),
        )
    if ended.error or ended.code != 0:
        return Result(member.name, ended.seconds, error=ended.error or f"exit code {ended.code}")
    try:
        machine, rows = load(folder / RESULT)
    except (OSError, ValueError) as error:
        return Result(member.name, ended.seconds, error=str(error))
    return Result(member.name, ended.seconds, machine, rows)


def show(results: list[Result], console: Console) -> None:
    """Prints the ratios of all packages as one table."""
    table = Table(title="ours beside what a user would pick instead")
    for heading in ("package", "what", "ours", "theirs", "peer", "times better"):
        table.add_column(
            heading, justify="right" if heading in ("ours", "theirs", "times better") else "left"
        )
    for result in results:
        for row in result.rows:
            numbers = (f"{row.ours:.4g} {row.unit}", f"{row.theirs:.4g} {row.unit}")
            cells = (result.package, row.what, *numbers, f"{row.peer} {row.peer_version}".strip())
            table.add_row(*(escape_markup(cell) for cell in cells), f"{row.ratio:.2f}×")
        if result.error:
            table.add_row(result.package, f"[red]crashed: {escape_markup(result.error)}[/]")
    console.print(table)


def render(results: list[Result]) -> str:
    """The page of all benchmarks as HTML."""
    sections = "".join(_section(result) for result in results)
    return page(
        "Benchmarks",
        f"""<div class="over">Benchmarks</div><h1>Ours beside what a user would pick instead</h1>
<p class="lead">Both sides of a row were measured in one run on one machine. The bar is how many times better
ours is, on a logarithmic scale; the mark in its middle is 1×, equal.</p>{sections}
<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by <code>make bench</code>.</footer>""",
    )


def _section(result: Result) -> str:
    head = f'<section class="card"><div class="head"><h2>{escape(result.package)}</h2>'
    if result.error:
        return f'{head}<span class="pill crashed">crashed</span></div><p>{escape(result.error)}</p></section>'
    rows = "".join(
        f"<tr><td>{escape(row.what)}</td><td>{row.ours:.4g} {escape(row.unit)}</td>"
        f"<td>{row.theirs:.4g} {escape(row.unit)}</td><td>{escape(row.peer)} {escape(row.peer_version)}</td>"
        f'<td><span class="value">{row.ratio:.2f}×</span>{_bar(row.ratio)}</td></tr>'
        for row in result.rows
    )
    return (
        f'{head}</div><p class="soft small">{escape(result.machine)} · {duration(result.seconds)}</p>'
        f'<div class="scroll"><table><thead><tr><th>what</th><th>ours</th><th>theirs</th><th>peer</th>'
        f"<th>times better</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _bar(ratio: float) -> str:
    """A bar on a logarithmic scale from 1/100 to 100 with the mark for 1 in its middle."""
    place = 50 + 25 * math.log10(min(max(ratio, 0.01), 100.0))
    return f'<div class="bar"><i style="width:{place:.1f}%"></i><b style="left:50%"></b></div>'


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.bench``."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--package", help="only this package")
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds that one benchmark may take (900)"
    )
    parser.add_argument("--runs", type=Path, help="where results go (runs/ in the workspace)")
    parser.add_argument(
        "--root", type=Path, default=workspace.ROOT, help="another workspace than this repository"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    runs = arguments.runs or arguments.root / "runs"
    try:
        chosen = workspace.packages(arguments.root, arguments.package)
    except workspace.WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [m for m in chosen if arguments.package or (m.folder / "benchmarks" / "bench.py").is_file()]
    if not chosen:
        print(f"error: no package below {arguments.root}/packages has a benchmarks/bench.py", file=sys.stderr)
        return 2
    results = [bench(m, runs / "bench", timeout=arguments.timeout, console=console) for m in chosen]
    show(results, console)
    target = runs / "bench.html"
    replace_text(target, render(results))
    console.print(f"page: {os.path.relpath(target)}", highlight=False)
    return 70 if any(result.error for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
